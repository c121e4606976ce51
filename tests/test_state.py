"""Does a peer find a complete state again, whatever the instant at which it was killed?

The crashes are real: a child process ends by os._exit at a chosen file operation, or by SIGKILL at a
random instant. Page cache survives both, so what is shown is the order of the operations; that each
file is synced before its directory is renamed is checked apart.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from coordinator.errors import StateError
from peer.layout import TensorLayout, make_manifest
from peer.state import (
    MAX_KNOWN_ADDRESSES,
    Checkpoint,
    CheckpointStore,
    KeptModel,
    append_json_line,
    is_kept,
    kept_addresses,
    kept_checkpoint,
    kept_run,
    kept_score,
    recover_directory,
    repair_json_lines,
    replace_directory,
    write_model_card,
    write_task_card,
)

RUN = "ab" * 32
LAYOUT = TensorLayout(names=("embed.weight", "layer.bias"), shapes=((2, 3), (4,)))
CRASH_STATUS = 77
SURVIVED_STATUS = 0

# Forked, because hundreds of children are needed: 5 ms each, where an import of torch takes seconds.
processes = multiprocessing.get_context("fork")


def make_checkpoint(round: int, **changes: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "run_digest": RUN,
        "round": round,
        "layout": LAYOUT,
        "flat": torch.arange(10, dtype=torch.float32) + round,
        "commits": tuple({"round": r, "state_hash": f"{r:064x}"} for r in range(1, round + 1)),
        "head": {"classifier.weight": torch.full((2, 3), float(round))},
        "kept_delta": torch.full((10,), 0.5 * round),
        "extra": {"seed": round, "nested": {"list": [1, 2.5, None]}},
    }
    return Checkpoint(**{**values, **changes})


def assert_same(actual: Checkpoint | None, expected: Checkpoint) -> None:
    assert actual is not None
    assert (actual.run_digest, actual.round, actual.layout) == (
        expected.run_digest,
        expected.round,
        expected.layout,
    )
    assert torch.equal(actual.flat, expected.flat)
    assert actual.commits == expected.commits
    assert actual.extra == expected.extra
    assert actual.head.keys() == expected.head.keys()
    assert all(torch.equal(actual.head[name], tensor) for name, tensor in expected.head.items())
    if expected.kept_delta is None:
        assert actual.kept_delta is None
    else:
        assert actual.kept_delta is not None
        assert torch.equal(actual.kept_delta, expected.kept_delta)


def save(directory: Path, *rounds: int) -> None:
    with CheckpointStore(directory) as store:
        for round in rounds:
            store.save(make_checkpoint(round))


def load(directory: Path) -> Checkpoint | None:
    with CheckpointStore(directory) as store:
        return store.load()


def checkpoint_directories(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "checkpoints").iterdir() if path.name[0] != ".")


# --- what is saved comes back


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert_same(load(tmp_path), make_checkpoint(3))


def test_round_trip_of_the_least(tmp_path: Path) -> None:
    least = Checkpoint(run_digest=RUN, round=0, layout=LAYOUT, flat=torch.zeros(10))
    with CheckpointStore(tmp_path) as store:
        store.save(least)
    assert_same(load(tmp_path), least)


def test_an_empty_directory_holds_nothing_and_belongs_to_no_run(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "a" / "b", run_digest=RUN) as store:
        assert store.load() is None
        assert store.run_digest is None


def test_looking_needs_no_lock_and_writes_nothing(tmp_path: Path) -> None:
    assert (kept_run(tmp_path), kept_checkpoint(tmp_path)) == (None, None)
    assert kept_run(tmp_path / "nowhere") is None
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 1, 2)
    cut(checkpoint_directories(tmp_path)[-1] / "backbone.safetensors")
    before = sorted(tmp_path.rglob("*"))
    with CheckpointStore(tmp_path):  # as a running peer has it
        assert kept_run(tmp_path) == make_checkpoint(1).run_digest
        assert_same(kept_checkpoint(tmp_path), make_checkpoint(1))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["[", "{}", '{"a": 1}', "7"])
def test_addresses_that_cannot_be_read_are_none(text: str, tmp_path: Path) -> None:
    assert kept_addresses(tmp_path) == ()
    (tmp_path / "known_peers.json").write_text(text)
    assert kept_addresses(tmp_path) == ()
    (tmp_path / "known_peers.json").write_text(json.dumps(["/ip4/1.2.3.4/tcp/1", 7, *map(str, range(99))]))
    assert kept_addresses(tmp_path)[:2] == ("/ip4/1.2.3.4/tcp/1", "0")
    assert len(kept_addresses(tmp_path)) == MAX_KNOWN_ADDRESSES


def test_every_bit_comes_back(tmp_path: Path) -> None:
    flat = torch.tensor([float("nan"), -0.0, 1e-45, 3.4e38, float("inf"), 0.1, 1, 2, 3, 4])
    with CheckpointStore(tmp_path) as store:
        store.save(make_checkpoint(1, flat=flat))
        loaded = store.load()
    assert loaded is not None
    assert loaded.flat.numpy().tobytes() == flat.numpy().tobytes()
    assert make_manifest(LAYOUT, loaded.flat) == make_manifest(LAYOUT, flat)


def test_the_files_can_be_inspected_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (directory,) = checkpoint_directories(tmp_path)
    tensors = load_file(directory / "backbone.safetensors")
    assert tensors["embed.weight"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tensors["layer.bias"].tolist() == [7, 8, 9, 10]
    metadata = json.loads((directory / "checkpoint.json").read_text())
    assert metadata["round"] == 1
    assert metadata["state_hash"] == make_manifest(LAYOUT, make_checkpoint(1).flat).state_hash


def test_tied_strided_and_half_precision_heads_are_kept(tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float16).view(2, 3)
    head = {"a": weight, "tied": weight, "transposed": weight.T, "scalar": torch.tensor(2.0)}
    with CheckpointStore(tmp_path) as store:
        store.save(make_checkpoint(1, head=head))
        assert_same(store.load(), make_checkpoint(1, head=head))


def test_loaded_tensors_do_not_depend_on_the_files(tmp_path: Path) -> None:
    save(tmp_path, 1)
    loaded = load(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_same(loaded, make_checkpoint(1))
    assert loaded is not None
    loaded.flat.add_(1)  # writable


@pytest.mark.parametrize("field", ["flat", "kept_delta"])
@pytest.mark.parametrize("vector", [torch.zeros(9), torch.zeros(2, 5), torch.zeros(10, dtype=torch.float64)])
def test_a_vector_that_does_not_fit_is_refused(tmp_path: Path, field: str, vector: torch.Tensor) -> None:
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match=r"shape|float32"):
        store.save(make_checkpoint(1, **{field: vector}))
    assert list((tmp_path / "checkpoints").iterdir()) == []


# --- which ones are kept


def test_the_two_newest_states_are_kept(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        for round in range(1, 6):
            store.save(make_checkpoint(round))
        assert [checkpoint.round for checkpoint in store.checkpoints()] == [5, 4]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_saving_a_state_again_does_not_push_out_the_one_before(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(make_checkpoint(1))
        store.save(make_checkpoint(2, kept_delta=None))
        store.save(make_checkpoint(2))
        assert [checkpoint.round for checkpoint in store.checkpoints()] == [2, 1]
        assert_same(store.load(), make_checkpoint(2))


def test_the_last_saved_is_the_newest_even_at_a_lower_round(tmp_path: Path) -> None:
    # The chain that wins when two partitions meet may be the shorter one.
    save(tmp_path, 7, 8, 5)
    assert_same(load(tmp_path), make_checkpoint(5))


def test_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (directory,) = checkpoint_directories(tmp_path)
    directory.rename(directory.with_name("99999999"))
    save(tmp_path, 2)
    assert_same(load(tmp_path), make_checkpoint(2))


# --- broken ones


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_by_text(path: Path) -> None:
    path.write_text("\x80\x04not what it was" * 99)


DAMAGE = [cut, empty, flip_last_bit, replace_by_text, Path.unlink]
TENSOR_FILES = ["backbone.safetensors", "head.safetensors", "kept_delta.safetensors"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_broken_tensor_file_is_skipped_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1, 2)
    newest = checkpoint_directories(tmp_path)[-1]
    damage(newest / name)
    assert_same(load(tmp_path), make_checkpoint(1))
    assert str(newest) in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": "1"}',
        b'{"format": 1, "run_digest": "r", "round": true, "state_hash": "", "commits": [], "extra": {}}',
    ],
)
def test_broken_metadata_is_skipped(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1, 2)
    (checkpoint_directories(tmp_path)[-1] / "checkpoint.json").write_bytes(content)
    assert_same(load(tmp_path), make_checkpoint(1))


@pytest.mark.parametrize(
    "layout",
    [
        None,
        [],
        [["embed.weight", [2, 3]]],
        [["embed.weight", [2, 3]], ["layer.bias", [-4]]],
        [["embed.weight", [3, 2]], ["layer.bias", [4]]],
        [["embed.weight", [2, 3]], ["other", [4]]],
        [["embed.weight", [2, 3]], ["layer.bias", [10**15]]],
    ],
)
def test_a_layout_that_does_not_fit_is_skipped(tmp_path: Path, layout: object) -> None:
    save(tmp_path, 1, 2)
    path = checkpoint_directories(tmp_path)[-1] / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layout": layout}))
    assert_same(load(tmp_path), make_checkpoint(1))


def test_broken_ones_are_replaced_before_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip_last_bit(checkpoint_directories(tmp_path)[-1] / "backbone.safetensors")
    with CheckpointStore(tmp_path) as store:
        assert_same(store.load(), make_checkpoint(1))
        assert len(checkpoint_directories(tmp_path)) == 2  # reading deletes nothing
        store.save(make_checkpoint(3))
        assert [checkpoint.round for checkpoint in store.checkpoints()] == [3, 1]


def test_all_broken_is_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    empty(checkpoint_directories(tmp_path)[0] / "checkpoint.json")
    assert load(tmp_path) is None
    save(tmp_path, 2)
    assert_same(load(tmp_path), make_checkpoint(2))
    assert len(checkpoint_directories(tmp_path)) == 1


def test_a_newer_format_is_neither_read_nor_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = checkpoint_directories(tmp_path)[0] / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(StateError, match="newer version"):
        CheckpointStore(tmp_path)
    assert path.exists()


# --- whose directory it is


def test_another_run_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(StateError, match=f"holds run {RUN}, not other"):
        CheckpointStore(tmp_path, run_digest="other")
    with CheckpointStore(tmp_path) as store:  # the failed one gave the lock back
        assert store.run_digest == RUN
        with pytest.raises(StateError, match=f"holds run {RUN}, not other"):
            store.save(make_checkpoint(1, run_digest="other"))
        assert_same(store.load(), make_checkpoint(1))


def test_the_first_save_decides_the_run(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(make_checkpoint(1))
        with pytest.raises(StateError, match="holds run"):
            store.save(make_checkpoint(2, run_digest="other"))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nobody-can-write-here"])
def test_a_place_that_cannot_hold_it_is_told_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write"):
        CheckpointStore(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_directory_is_told_at_once(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StateError, match="Permission denied"):
        CheckpointStore(tmp_path)
    (tmp_path / "checkpoints").chmod(stat.S_IRWXU)


def test_a_directory_in_use_names_the_process(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path), pytest.raises(StateError, match=f"process {os.getpid()}:"):
        CheckpointStore(tmp_path)
    CheckpointStore(tmp_path).close()


def test_a_closed_store_saves_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StateError, match="closed"):
        store.save(make_checkpoint(1))


def hold_lock(directory: Path, pipe: Connection) -> None:
    with CheckpointStore(directory):
        pipe.send(os.getpid())
        pipe.recv()


def test_the_lock_of_another_process_ends_with_it_even_by_sigkill(tmp_path: Path) -> None:
    here, there = processes.Pipe()
    child = processes.Process(target=hold_lock, args=(tmp_path, there))
    child.start()
    pid = here.recv()
    with pytest.raises(StateError, match=f"process {pid}:"):
        CheckpointStore(tmp_path)
    os.kill(pid, signal.SIGKILL)
    child.join()
    CheckpointStore(tmp_path).close()


def hold_lock_and_fork(directory: Path, pipe: Connection) -> None:
    store = CheckpointStore(directory)
    if os.fork() == 0:
        store.close()  # of no effect in the child
        pipe.send(os.getpid())
        pipe.recv()
        os._exit(0)
    signal.pause()


def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path: Path) -> None:
    here, there = processes.Pipe()
    peer = processes.Process(target=hold_lock_and_fork, args=(tmp_path, there))
    peer.start()
    here.recv()  # the grandchild lives, and has closed its store
    with pytest.raises(StateError, match=f"process {peer.pid}:"):
        CheckpointStore(tmp_path)
    peer.kill()
    peer.join()
    CheckpointStore(tmp_path).close()  # though the grandchild still lives
    here.send("end")


# --- a crash at every file operation

CRASH_OPERATIONS = ("fsync", "rename", "unlink", "rmdir", "mkdir")


def crash_at(step: int, when: str) -> None:
    """Ends this process without any clean-up before or after its `step`-th file operation."""
    count = 0

    def wrapped(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == step and when == "before":
                os._exit(CRASH_STATUS)
            try:
                return operation(*args, **kwargs)
            finally:
                if count == step:
                    os._exit(CRASH_STATUS)

        return run

    for name in CRASH_OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))


def crash_while_saving(directory: Path, step: int, when: str) -> None:
    store = CheckpointStore(directory)
    crash_at(step, when)
    store.save(make_checkpoint(3))
    os._exit(SURVIVED_STATUS)


def write_version(version: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "config.json").write_text(version)
        (directory / "onnx").mkdir()
        (directory / "onnx" / "weights").write_text(version)

    return write


def read_version(directory: Path) -> str:
    assert (directory / "config.json").read_text() == (directory / "onnx" / "weights").read_text()
    return (directory / "config.json").read_text()


def crash_while_replacing(target: Path, step: int, when: str) -> None:
    crash_at(step, when)
    replace_directory(target, write_version("new"))
    os._exit(SURVIVED_STATUS)


def crash_while_recovering(target: Path, step: int, when: str) -> None:
    crash_at(step, when)
    recover_directory(target)
    os._exit(SURVIVED_STATUS)


def exit_status(target: Callable[..., None], *args: object) -> int | None:
    child = processes.Process(target=target, args=args)
    child.start()
    child.join()
    return child.exitcode


def crash_points(target: Callable[..., None], prepare: Callable[[], Path]) -> Iterator[tuple[Path, int, str]]:
    """Every (what the crash left, step, when), until a run has fewer operations than the step."""
    for when in ("before", "after"):
        for step in range(1, 100):
            place = prepare()
            status = exit_status(target, place, step, when)
            assert status in (CRASH_STATUS, SURVIVED_STATUS)
            yield place, step, when
            if status == SURVIVED_STATUS:
                assert step > 5  # there is something to crash at
                break
        else:
            pytest.fail("the run did not end within 100 operations")


def numbered(tmp_path: Path, prepare: Callable[[Path], None]) -> Callable[[], Path]:
    def make() -> Path:
        place = tmp_path / str(len(list(tmp_path.iterdir()))) / "place"
        place.parent.mkdir()
        prepare(place)
        return place

    return make


def test_a_crash_at_any_operation_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    rounds = []
    for place, step, when in crash_points(crash_while_saving, numbered(tmp_path, lambda p: save(p, 1, 2))):
        loaded = load(place)
        assert loaded is not None, (step, when)
        assert loaded.round in (2, 3), (step, when)
        assert_same(loaded, make_checkpoint(loaded.round))
        rounds.append(loaded.round)
        save(place, 4)  # goes on as if nothing had been
        with CheckpointStore(place) as store:
            assert [c.round for c in store.checkpoints()] == [4, loaded.round], (step, when)
        assert len(list((place / "checkpoints").iterdir())) == 2, "leftovers are removed"
    assert {2, 3} == set(rounds)


def test_a_crash_in_the_very_first_save_leaves_nothing_or_all(tmp_path: Path) -> None:
    for place, step, when in crash_points(
        crash_while_saving, numbered(tmp_path, lambda p: p.mkdir(parents=True))
    ):
        loaded = load(place)
        assert loaded is None or loaded.round == 3, (step, when)


def test_a_crash_while_replacing_leaves_the_old_or_the_new_directory(tmp_path: Path) -> None:
    seen = set()
    prepare = numbered(tmp_path, lambda p: replace_directory(p, write_version("old")))
    for place, step, when in crash_points(crash_while_replacing, prepare):
        recover_directory(place)
        assert [path.name for path in place.parent.iterdir()] == ["place"], (step, when)
        seen.add(read_version(place))
        replace_directory(place, write_version("next"))
        assert read_version(place) == "next"
    assert seen == {"old", "new"}


def test_a_crash_while_recovering_is_recovered(tmp_path: Path) -> None:
    def leave_between_the_renames(place: Path) -> None:
        replace_directory(place, write_version("old"))
        place.rename(place.with_name(".place.old"))
        replace_directory(place.with_name("built"), write_version("new"))
        place.with_name("built").rename(place.with_name(".place.new"))

    for place, _step, _when in crash_points(
        crash_while_recovering, numbered(tmp_path, leave_between_the_renames)
    ):
        recover_directory(place)
        assert read_version(place) == "new"
        assert [path.name for path in place.parent.iterdir()] == ["place"]


# --- SIGKILL at random instants


def keep_on_saving(directory: Path, first_round: int, pipe: Connection) -> None:
    """One of everything that a round writes, again and again; tells each round when it is durable."""
    recover_directory(directory / "model")
    repair_json_lines(directory / "rounds.jsonl")
    with CheckpointStore(directory) as store:
        for round in range(first_round, first_round + 10_000):
            store.save(make_checkpoint(round))
            append_json_line(directory / "rounds.jsonl", {"round": round, "text": "x" * 100})
            replace_directory(directory / "model", write_version(str(round)))
            pipe.send(round)


def test_sigkill_at_random_instants_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    draw = random.Random(0)
    last_durable = 0
    for _ in range(20):
        here, there = processes.Pipe()
        child = processes.Process(target=keep_on_saving, args=(tmp_path, last_durable + 1, there))
        child.start()
        there.close()
        for _ in range(draw.randint(1, 4)):
            last_durable = here.recv()
        here.poll(draw.uniform(0, 0.01))  # the random instant within the next round
        child.kill()
        child.join()
        try:
            while True:
                last_durable = here.recv()
        except EOFError:
            pass

        loaded = load(tmp_path)
        assert loaded is not None
        assert loaded.round in (last_durable, last_durable + 1)
        assert_same(loaded, make_checkpoint(loaded.round))
        recover_directory(tmp_path / "model")
        assert int(read_version(tmp_path / "model")) in (last_durable, last_durable + 1)
        repair_json_lines(tmp_path / "rounds.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
        assert rows[-1]["round"] in (last_durable, last_durable + 1)
        assert len(list((tmp_path / "checkpoints").iterdir())) <= 3
        last_durable = loaded.round  # the next child goes on from here, as a peer does


# --- durability and failures


def test_every_file_is_synced_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(fd: int) -> None:
        operations.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def record_rename(source: Path, target: Path) -> None:
        operations.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(tmp_path, 1)
    assert sorted(operations[:4]) == ["backbone.safetensors", "checkpoint.json", *TENSOR_FILES[1:]]
    assert operations[4:] == [".00000001", ".00000001 -> 00000001", "checkpoints"]


def fail_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("operation", ["fsync", "rename"])
def test_a_full_disk_is_a_state_error_and_costs_nothing_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(make_checkpoint(1))
        with monkeypatch.context() as patch:
            fail_on(patch, operation)
            with pytest.raises(StateError, match="No space left on device"):
                store.save(make_checkpoint(2))
        assert_same(store.load(), make_checkpoint(1))
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
        store.save(make_checkpoint(2))
        assert_same(store.load(), make_checkpoint(2))


def test_a_save_makes_no_copy_of_the_vector(tmp_path: Path) -> None:
    layout = TensorLayout(names=("w",), shapes=((4_000_000,),))
    flat = torch.ones(4_000_000)  # 16 MB
    peak_kb = os.sysconf("SC_PAGE_SIZE") // 1024

    def resident_kb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * peak_kb

    with CheckpointStore(tmp_path) as store:
        store.save(Checkpoint(run_digest=RUN, round=1, layout=layout, flat=flat))
        before = resident_kb()
        store.save(Checkpoint(run_digest=RUN, round=2, layout=layout, flat=flat))
        assert resident_kb() - before < 4_000


# --- directories


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    replace_directory(tmp_path / "deep" / "model", write_version("1"))
    (tmp_path / "deep" / "model" / "stale").write_text("")
    replace_directory(tmp_path / "deep" / "model", write_version("2"))
    assert read_version(tmp_path / "deep" / "model") == "2"
    assert not (tmp_path / "deep" / "model" / "stale").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_an_empty_directory_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    replace_directory(tmp_path / "model", write_version("1"))
    assert read_version(tmp_path / "model") == "1"


@pytest.mark.parametrize("act", [recover_directory, lambda t: replace_directory(t, write_version("1"))])
def test_a_directory_of_somebody_else_is_never_replaced(tmp_path: Path, act: Callable[[Path], None]) -> None:
    # `--model ./model --output-dir .` must not eat the model.
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("precious")
    with pytest.raises(StateError, match="was not written by this program"):
        act(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_text() == "precious"


def test_a_failing_writer_leaves_the_old_directory(tmp_path: Path) -> None:
    replace_directory(tmp_path / "model", write_version("1"))

    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise KeyError("of the writer")

    with pytest.raises(KeyError):
        replace_directory(tmp_path / "model", fail)
    assert read_version(tmp_path / "model") == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_is_replaced_and_what_it_points_to_left_alone(tmp_path: Path) -> None:
    replace_directory(tmp_path / "elsewhere", write_version("1"))
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    replace_directory(tmp_path / "model", write_version("2"))
    assert read_version(tmp_path / "model") == "2"
    assert read_version(tmp_path / "elsewhere") == "1"


def test_recovering_nothing_is_in_order(tmp_path: Path) -> None:
    recover_directory(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# --- JSON lines


def test_lines_are_appended_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    append_json_line(path, {"round": 1, "loss": float("nan"), "scores": [float("inf"), 0.5]})
    append_json_line(path, {"round": 2, "text": "two\nlines, é"})
    assert path.read_bytes() == (
        b'{"round":1,"loss":null,"scores":[null,0.5]}\n{"round":2,"text":"two\\nlines, \\u00e9"}\n'
    )


@pytest.mark.parametrize(
    ("content", "repaired"),
    [
        (b"", b""),
        (b'{"a":1}\n', b'{"a":1}\n'),
        (b'{"a":1}\n{"a"', b'{"a":1}\n'),
        (b'{"a":1}\n\x00\x00\x00', b'{"a":1}\n'),
        (b'{"a":1}\n{"a":"\xc3', b'{"a":1}\n'),
        (b'{"a":1}\n12', b'{"a":1}\n'),
        (b'{"a', b""),
        (b'{"a":1}\n{"a":2}', b'{"a":1}\n{"a":2}\n'),
    ],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, content: bytes, repaired: bytes) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(content)
    repair_json_lines(path)
    assert path.read_bytes() == repaired
    append_json_line(path, {"b": 3})
    assert path.read_bytes() == repaired + b'{"b":3}\n'


def test_repairing_a_missing_file_makes_none(tmp_path: Path) -> None:
    repair_json_lines(tmp_path / "rounds.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_cannot_be_made_durable_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rounds.jsonl"
    append_json_line(path, {"a": 1})
    fail_on(monkeypatch, "fsync")
    with pytest.raises(StateError, match="No space left"):
        append_json_line(path, {"a": 2})
    assert path.read_bytes() == b'{"a":1}\n'


def test_a_directory_instead_of_the_file_is_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot write"):
        append_json_line(tmp_path, {})
    with pytest.raises(StateError, match="cannot write"):
        repair_json_lines(tmp_path)


# --- the model card


def write_card(directory: Path, **changes: Any) -> str:
    values: dict[str, Any] = {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "base_revision": "c9745ed1",
        "run_name": "fruit-2024",
        "spec_digest": "5" * 64,
        "round": 2,
        "state_hash": "7" * 64,
        "num_contributions": 5,
        "peers": ["12D3KooWA", "12D3KooWB"],
        "commits": [
            {"round": 1, "state_hash": "6" * 64, "contributors": {"a": 0.5, "b": 0.5}},
            {"round": 2, "state_hash": "7" * 64, "contributors": ["a", "b", "c"]},
        ],
    }
    write_model_card(directory, **{**values, **changes})
    return (directory / "README.md").read_text(encoding="utf-8")


def test_the_card_is_read_by_the_hub_library(tmp_path: Path) -> None:
    text = write_card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "feature-extraction"
    assert "cold-fusion" in data["tags"]
    assert f"| 1 | 2 | `{'6' * 64}` |" in text
    assert f"| 2 | 3 | `{'7' * 64}` |" in text
    for fact in ("5" * 64, "c9745ed1", "| contributions | 5 |", "12D3KooWB", "# fruit-2024, round 2"):
        assert fact in text


def test_a_local_base_model_is_no_hub_id_and_its_place_stays_private(tmp_path: Path) -> None:
    text = write_card(tmp_path, base_model="/home/alice/secret/minilm", base_revision=None)
    assert "base_model" not in ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "`minilm`, a local directory" in text
    text = write_card(tmp_path, base_model="./mine/minilm", base_revision=None)  # wherever it is read
    assert "`minilm`, a local directory" in text
    assert "alice" not in text


def test_what_other_peers_chose_breaks_neither_markdown_nor_front_matter(tmp_path: Path) -> None:
    hostile = "x`|\n---\nlicense: mit\n<script>[a](b)\x1b[2J\u202e" + "y" * 500
    text = write_card(
        tmp_path,
        base_model=hostile,
        run_name=hostile,
        peers=[hostile],
        commits=[{"round": hostile, "state_hash": hostile, "contributors": 3}, {}],
    )
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert not any(c in text for c in ("<script", "\x1b", "\u202e", "\nlicense", "y" * 101))
    assert "| - | - | - |" in text


def test_a_long_chain_is_cut_to_its_end(tmp_path: Path) -> None:
    text = write_card(tmp_path, commits=[{"round": r} for r in range(1, 1001)])
    assert "The last 50 of 1000 commits" in text
    assert "| 1000 |" in text
    assert "| 950 |" not in text


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for path in checkpoint_directories(tmp_path)[0].iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        else:
            json.loads(path.read_text())


def test_the_card_of_the_own_classifier_says_which_one_it_is(tmp_path: Path) -> None:
    kept = KeptModel("your own finetuned backbone with its head", 3, "accuracy", 0.8125, 160)
    assert kept_score(tmp_path, "accuracy", "rows") is None
    write_task_card(tmp_path, kept)
    assert kept_score(tmp_path, "accuracy", "rows") == 0.8125
    assert kept_score(tmp_path, "pearson", "rows") is None  # a score of another metric is no measure
    write_task_card(tmp_path, replace(kept, held_out="rows"))
    assert kept_score(tmp_path, "accuracy", "rows") == 0.8125
    assert kept_score(tmp_path, "accuracy", "others") is None  # nor one on other rows
    text = (tmp_path / "README.md").read_text()
    assert "This is your own finetuned backbone with its head, of round 3." in text
    assert "0.8125" in text
    for broken in ("[1]", '"accuracy"', "{"):
        (tmp_path / "kept.json").write_text(broken)
        assert kept_score(tmp_path, "accuracy", "rows") is None


NAN = float("nan")


@pytest.mark.parametrize(
    ("score", "best", "expected"),
    [
        (0.1, None, True),  # the first one, however bad
        (NAN, None, True),
        (0.8, 0.7, True),
        (0.7, 0.8, False),
        (0.8, 0.8, True),  # of equals the newer one
        (-0.2, -0.3, True),  # a correlation
        (NAN, -0.3, False),
        (-0.3, NAN, True),
    ],
)
def test_which_classifier_is_kept(score: float, best: float | None, expected: bool) -> None:
    assert is_kept(score, best) is expected


def test_what_an_earlier_process_kept_is_the_measure(tmp_path: Path) -> None:
    write_task_card(tmp_path, KeptModel("the fused backbone", 3, "accuracy", 0.8125, 160))
    assert not is_kept(0.8, kept_score(tmp_path, "accuracy", "rows"))
    assert is_kept(0.8125, kept_score(tmp_path, "accuracy", "rows"))
    assert is_kept(0.1, kept_score(tmp_path, "pearson", "rows"))  # nothing of this metric is kept
