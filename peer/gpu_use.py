"""How much of the GPU do other programs use, as far as that can be told?

Asked of NVML (NVIDIA Management Library), by the package nvidia-ml-py: `nvmlDeviceGetProcessUtilization`
says what each process did lately, `nvmlDeviceGetComputeRunningProcesses` which ones have memory there,
busy or not.

Both name processes as the driver's own namespace does. In a container ours may have another number there,
which nothing inside tells; our own work would look like that of others, and this peer would rest for good.
So where we have memory on a GPU, and NVML does not name us, nothing of what it says is believed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

LOOK_BACK_SECONDS = 2.0  # of what processes did
NOT_INSTALLED = "the package nvidia-ml-py is missing: pip install nvidia-ml-py"
OTHER_NUMBERS = (
    "the driver gives our process another number, as in a container: share the host's, as --pid=host"
)


@dataclass(frozen=True)
class Reading:
    """Of one GPU."""

    holders: frozenset[int]  # ids of the processes that have memory on it
    shares: Mapping[int, float]  # part of its processors, 0 to 1, that each lately used, by process id


@dataclass(frozen=True)
class GpuUse:
    others: float  # part of the busiest GPU, 0 to 1, that other processes use; of what can be seen
    blind: str | None = None  # why something cannot be seen


class GpuWatch:
    """Looks at the GPUs again and again, and says once what it cannot see."""

    def __init__(self, *, is_used: bool, holds_memory: Callable[[], bool] | None = None) -> None:
        """`is_used`: whether this peer is to compute on one, so that others there matter to the person."""
        self._is_used = is_used
        self._holds_memory = holds_memory or holds_gpu_memory
        self._said: set[str] = set()

    def others_share(self) -> float:
        """Part of the busiest GPU, 0 to 1, that other processes use; 0 where that cannot be told."""
        use = look(own_pids(), holds_memory=self._is_used and self._holds_memory())
        if self._is_used and use.blind is not None and use.blind not in self._said:
            self._said.add(use.blind)
            logger.warning(
                "--pause-when-busy does not see who uses the GPU: %s. It goes by the processors alone",
                use.blind,
            )
        return use.others


def look(own: frozenset[int], *, holds_memory: bool) -> GpuUse:
    """`own`: ids of our processes; `holds_memory`: whether one of them has memory on a GPU."""
    try:
        import pynvml
    except ImportError:
        return GpuUse(0.0, NOT_INSTALLED)
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        try:
            readings, failures = _read_all(nvml)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return GpuUse(0.0, _failure(error))
    use = judge(readings, own, holds_memory=holds_memory)
    return use if not failures else GpuUse(use.others, failures[0])


def judge(readings: Sequence[Reading], own: frozenset[int], *, holds_memory: bool) -> GpuUse:
    named = {pid for reading in readings for pid in (*reading.holders, *reading.shares)}
    if holds_memory and named and not named & own:
        return GpuUse(0.0, OTHER_NUMBERS)
    shares = (sum(share for pid, share in r.shares.items() if pid not in own) for r in readings)
    return GpuUse(min(1.0, max(shares, default=0.0)))


def own_pids() -> frozenset[int]:
    """Of this process and its children, in all namespaces that can be seen from here."""
    process = psutil.Process()
    visible = {process.pid, *(child.pid for child in process.children(recursive=True))}
    pids = set(visible)
    for pid in visible:
        try:
            pids.update(namespace_pids(Path(f"/proc/{pid}/status").read_text().splitlines()))
        except OSError:  # it has ended, or this is not Linux
            continue
    return frozenset(pids)


def namespace_pids(status: Iterable[str]) -> list[int]:
    """Of the lines of /proc/PID/status: the outermost that is visible comes first (Linux 4.1 and newer)."""
    for line in status:
        if line.startswith("NSpid:"):
            return [int(number) for number in line.split()[1:]]
    return []


def uses_gpu(use_cpu: bool) -> bool:
    """Whether this peer is to compute on a GPU, given --use-cpu."""
    return not use_cpu and torch.cuda.is_available()


def holds_gpu_memory() -> bool:
    """Whether torch has taken memory of a GPU: from then on NVML names this process."""
    if not torch.cuda.is_initialized():
        return False
    return any(torch.cuda.memory_reserved(index) > 0 for index in range(torch.cuda.device_count()))


def _read_all(nvml: Any) -> tuple[list[Reading], list[str]]:
    """What can be read, and why the rest cannot."""
    readings, failures = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            readings.append(_read(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            failures.append(_failure(error))
    return readings, failures


def _read(nvml: Any, handle: Any) -> Reading:
    """Raises NVMLError."""
    holders = frozenset(process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    since_microseconds = int((time.time() - LOOK_BACK_SECONDS) * 1e6)
    try:
        samples = nvml.nvmlDeviceGetProcessUtilization(handle, since_microseconds)
    except nvml.NVMLError as error:
        # Nobody used it; the package turns an empty list into an error whose value is that of success.
        if error.value not in (nvml.NVML_SUCCESS, nvml.NVML_ERROR_NOT_FOUND):
            raise
        samples = []
    return Reading(holders, {sample.pid: sample.smUtil / 100 for sample in samples})


def _failure(error: Exception) -> str:
    return f"NVML says {str(error)[:100]!r}"
