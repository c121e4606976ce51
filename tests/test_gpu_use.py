"""Are other programs on the GPU told from this one, and is it said once where they cannot be?"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from peer import gpu_use
from peer.gpu_use import (
    NOT_INSTALLED,
    OTHER_NUMBERS,
    GpuUse,
    GpuWatch,
    Reading,
    judge,
    look,
    namespace_pids,
    own_pids,
    uses_gpu,
)
from peer.join import _parse, make_manners

OWN, OTHER, THIRD = os.getpid(), 4_000_001, 4_000_002  # above what Linux gives by default


class FakeNvmlError(Exception):
    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


NOT_FOUND, NO_SAMPLES = FakeNvmlError(6, "Not Found"), FakeNvmlError(0, "Success")
NOT_SUPPORTED, NO_DRIVER = FakeNvmlError(3, "Not Supported"), FakeNvmlError(9, "Driver Not Loaded")


@dataclass
class FakeNvml:
    """The functions of pynvml that are called; each GPU: percent by process, or an error."""

    gpus: Sequence[Mapping[int, int] | FakeNvmlError]
    holders: frozenset[int] = frozenset()
    at_start: FakeNvmlError | None = None
    num_open: int = 0
    NVMLError: type[FakeNvmlError] = field(default=FakeNvmlError, init=False)
    NVML_SUCCESS: int = field(default=0, init=False)
    NVML_ERROR_NOT_FOUND: int = field(default=6, init=False)

    def nvmlInit(self) -> None:  # noqa: N802 (names of the library)
        if self.at_start is not None:
            raise self.at_start
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid) for pid in self.holders]

    def nvmlDeviceGetProcessUtilization(self, handle: int, since: int) -> list[Any]:  # noqa: N802
        gpu = self.gpus[handle]
        if isinstance(gpu, FakeNvmlError):
            raise gpu
        return [SimpleNamespace(pid=pid, smUtil=percent) for pid, percent in gpu.items()]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(nvml: FakeNvml | None) -> FakeNvml | None:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: importing it fails
        return nvml

    return put


@pytest.mark.parametrize(
    ("gpus", "holders", "expected"),
    [
        ([{OWN: 90}], {OWN}, GpuUse(0.0)),
        ([{OWN: 50, OTHER: 30, THIRD: 10}], {OWN, OTHER, THIRD}, GpuUse(0.4)),
        ([{OTHER: 90, THIRD: 90}], {OWN, OTHER, THIRD}, GpuUse(1.0)),  # we have memory, and compute nothing
        ([{OWN: 90}, {OTHER: 70}], {OWN}, GpuUse(0.7)),  # the busiest
        ([NOT_FOUND, NO_SAMPLES], {OWN}, GpuUse(0.0)),  # nobody used it
        ([NOT_SUPPORTED], {OWN}, GpuUse(0.0, "NVML says 'Not Supported'")),
        ([NOT_SUPPORTED, {OWN: 10, OTHER: 60}], {OWN}, GpuUse(0.6, "NVML says 'Not Supported'")),
        ([{OTHER: 90}], {OTHER}, GpuUse(0.0, OTHER_NUMBERS)),  # may be ourselves, by another number
        ([{}], {}, GpuUse(0.0)),
    ],
)
def test_what_others_use(install: Any, gpus: Sequence[Any], holders: Sequence[int], expected: GpuUse) -> None:
    nvml = install(FakeNvml(gpus, frozenset(holders)))
    found = look(own_pids(), holds_memory=True)
    assert found.others == pytest.approx(expected.others)
    assert found.blind == expected.blind
    assert nvml.num_open == 0


def test_before_we_have_memory_there_all_are_others() -> None:
    reading = Reading(frozenset({OTHER}), {OTHER: 0.9})
    assert judge([reading], frozenset({OWN}), holds_memory=False) == GpuUse(0.9)
    assert judge([], frozenset({OWN}), holds_memory=True) == GpuUse(0.0)


@pytest.mark.parametrize(
    ("nvml", "why"),
    [(None, NOT_INSTALLED), (FakeNvml([], at_start=NO_DRIVER), "NVML says 'Driver Not Loaded'")],
)
def test_without_package_or_driver_it_is_blind(install: Any, nvml: FakeNvml | None, why: str) -> None:
    install(nvml)
    assert look(own_pids(), holds_memory=False) == GpuUse(0.0, why)


def test_what_it_cannot_see_is_said_once_and_only_to_whom_it_matters(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install(None)
    for is_used in (False, True):
        watch = GpuWatch(is_used=is_used, holds_memory=lambda: False)
        with caplog.at_level(logging.WARNING):
            assert [watch.others_share() for _ in range(3)] == [0.0] * 3
        assert caplog.text.count("does not see who uses the GPU") == is_used
    assert "the package nvidia-ml-py is missing" in caplog.text


def test_in_a_container_it_does_not_take_itself_for_others(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It would rest as long as it works, and for good where it has no other GPU."""
    has_memory = False
    install(FakeNvml([{OTHER: 100}], frozenset({OTHER})))
    watch = GpuWatch(is_used=True, holds_memory=lambda: has_memory)
    assert watch.others_share() == 1.0  # others indeed: this peer has not begun
    has_memory = True
    assert [watch.others_share() for _ in range(3)] == [0.0] * 3
    assert caplog.text.count(OTHER_NUMBERS) == 1


def test_join_says_it_before_it_begins(
    install: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert uses_gpu(use_cpu=False)
    flags = ["--data", "x.csv", "--output-dir", "mine", "--pause-when-busy"]
    for extra in (["--use-cpu"], []):
        manners = make_manners(_parse([*flags, *extra]))
        assert caplog.text.count("does not see who uses the GPU") == (not extra)
    assert manners.reason() is None


def test_a_process_has_a_number_in_each_namespace() -> None:
    assert namespace_pids(["Name:\tpython", "NStgid:\t9", "NSpid:\t70211\t9", "NSsid:\t1"]) == [70211, 9]
    assert namespace_pids(["Name:\tpython"]) == []


def test_own_processes_are_this_one_and_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert {OWN, child.pid} <= own_pids()
        assert own_pids() <= {OWN, *(p.pid for p in psutil.Process().children(recursive=True))}
        monkeypatch.setattr(gpu_use, "namespace_pids", lambda _: [OTHER])  # as a container looks from outside
        assert {OWN, child.pid, OTHER} <= own_pids()
    finally:
        child.kill()
        child.wait()
