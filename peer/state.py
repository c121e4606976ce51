"""How a peer keeps what it has so that a kill at any instant leaves something complete to resume from.

    DIR/.lock                      held (flock) by the one process that may use DIR; holds its pid
    DIR/checkpoints/00000042/      one checkpoint; the highest number is the newest
        backbone.safetensors       the state, one tensor per name; its data is the flat vector
        head.safetensors           this peer's own head; absent when there is none
        kept_delta.safetensors     a delta that no commit contains yet; absent when there is none
        residual.safetensors       what compression cut off of the own deltas; absent when there is none
        residuals.safetensors      the same of the results that this peer reduced, by part
        checkpoint.json            run, round, hashes, layout, commits, extra
    DIR/model/, DIR/task_model/    each replaced as a whole: `replace_directory`
    DIR/rounds.jsonl               appended line by line: `append_json_line`

A directory is written under a name that starts with a dot, synced, and renamed. What still bears
such a name at the next start was cut short (or was being deleted) and is removed. Nothing here
unpickles, and nothing here knows of models: only tensors, JSON and directories.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from coordinator.errors import StateError
from peer.layout import TensorLayout, flat_bytes, make_manifest

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of checkpoint.json
NUM_KEPT_STATES = 2  # the newest, and the one before it: a commit can still be rolled back
CONVICTIONS_NAME = "excluded.jsonl"
MAX_KEPT_CONVICTIONS = 1024
ADDRESSES_NAME = "known_peers.json"
MAX_KNOWN_ADDRESSES = 64  # in it
NUM_CARD_ROUNDS = 50  # rows of the lineage table; the whole chain is in the checkpoint

_METADATA = "checkpoint.json"
_BACKBONE = "backbone.safetensors"
_HEAD = "head.safetensors"
_KEPT_DELTA = "kept_delta.safetensors"
_RESIDUAL = "residual.safetensors"
_RESIDUALS = "residuals.safetensors"
_KEPT = "kept.json"  # beside a classifier: which one it is
_MARKER = ".written-by-peer"  # in directories that `replace_directory` made and may replace


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a peer needs to go on. Compared by identity: comparing tensors is the caller's choice."""

    run_digest: str  # sha256 of the run spec; a directory holds checkpoints of one run only
    round: int  # number of the committed round whose state `flat` is
    layout: TensorLayout  # names and shapes of the backbone
    flat: torch.Tensor  # (layout.num_values,) float32 on the CPU, contiguous: the committed backbone
    commits: tuple[dict[str, Any], ...] = ()  # the chain of commit records, oldest first, as JSON
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by name; empty when there is none
    kept_delta: torch.Tensor | None = None  # (layout.backbone.num_values,) float32: own, not in any commit
    residual: torch.Tensor | None = None  # (layout.backbone.num_values,) float32: error feedback as a sender
    residuals: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the same as a reducer, by part
    extra: Mapping[str, Any] = field(default_factory=dict)  # whatever else the session keeps, as JSON


class CheckpointStore:
    """The checkpoints below one output directory; open it once per process, close it at the end.

    Raises StateError when the directory cannot be used, another process uses it, or it holds
    another run than `run_digest` (None: whichever run it holds; see the property of that name).
    """

    def __init__(self, directory: Path | str, run_digest: str | None = None) -> None:
        self.directory = Path(directory)
        self._root = self.directory / "checkpoints"
        self._broken: set[str] = set()  # found by load; replaced by the next save, never before
        self._state_hashes: dict[str, str | None] = {}  # by name; of broken ones None
        self._lock_fd: int | None = _open_directory(self.directory, self._root)
        try:
            self.run_digest = self._stored_run()  # None until something is saved
            if run_digest is not None:
                self._require_run(run_digest)
        except StateError:
            self.close()
            raise

    def save(self, checkpoint: Checkpoint) -> None:
        """Durable when this returns; killed at any earlier instant, the older ones are untouched.

        Kept are the newest checkpoint and the newest one of another (round, state). The flat vectors
        are written from where they are, without a copy (90 MB: 0.3 s beside the fsync).
        Raises StateError (another run, disk full, ...), ValueError for tensors that do not fit the layout.
        """
        self._require_run(checkpoint.run_digest)
        metadata = _describe(checkpoint)
        name = f"{max(map(int, self._names()), default=0) + 1:08d}"
        temporary = self._root / f".{name}"
        try:
            _remove(temporary)
            temporary.mkdir()
            _write_checkpoint(temporary, checkpoint, metadata)
            os.rename(temporary, self._root / name)
            _fsync(self._root)
        except (OSError, SafetensorError) as error:
            _remove(temporary, ignore_errors=True)
            raise _cannot_write(self._root, error) from error
        self.run_digest = checkpoint.run_digest
        self._prune()

    def load(self) -> Checkpoint | None:
        """The newest complete checkpoint, or None. A broken one is logged and skipped.

        Raises StateError when one cannot be read for lack of permission, or is of a newer format.
        """
        return next(self.checkpoints(), None)

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Every complete checkpoint, newest first: the second is the state before, if it is kept."""
        for name in reversed(self._names()):
            try:
                yield _read_checkpoint(self._root / name)
            except _BrokenCheckpointError as error:
                self._broken.add(name)
                logger.warning("checkpoint %s is broken and skipped: %s", self._root / name, error)

    def map_state(self, state_hash: str) -> torch.Tensor | None:
        """The state of a kept checkpoint as a mapped file: it takes no memory until it is read.

        (layout.num_values,) float32; None when no kept checkpoint holds that state. Never write to it.
        """
        for name in reversed(self._names()):
            if name not in self._broken and self._state_hash(name) == state_hash:
                return _map_vector(self._root / name / _BACKBONE)
        return None

    def _state_hash(self, name: str) -> str | None:
        """Read once: others may ask for a state as often as they like, and the file holds the whole chain."""
        if name not in self._state_hashes:
            try:
                self._state_hashes[name] = _read_metadata(self._root / name)["state_hash"]
            except _BrokenCheckpointError:
                self._state_hashes[name] = None
        return self._state_hashes[name]

    def map_residual(self) -> torch.Tensor | None:
        """The same of the newest checkpoint's residual; None when it has none."""
        path = self._root / self._names()[-1] / _RESIDUAL
        return _map_vector(path) if path.exists() else None

    def close(self) -> None:
        """Gives the directory back to other processes. May be called twice."""
        if self._lock_fd is not None:
            _unlock(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _names(self) -> list[str]:
        return sorted((p.name for p in self._root.iterdir() if p.name.isdecimal()), key=int)

    def _stored_run(self) -> str | None:
        for name in reversed(self._names()):
            try:
                return str(_read_metadata(self._root / name)["run_digest"])
            except _BrokenCheckpointError:
                continue  # load says why
        return None

    def _require_run(self, run_digest: str) -> None:
        if self._lock_fd is None:
            raise StateError(f"the checkpoints in {self._root} are closed; open the store again")
        if self.run_digest not in (None, run_digest):
            raise StateError(
                f"{self.directory} holds run {self.run_digest}, not {run_digest}: choose another"
                f" --output-dir, or delete {self._root} if that run is of no use any more"
            )

    def _prune(self) -> None:
        seen: set[tuple[int, str]] = set()
        for name in reversed(self._names()):
            try:
                metadata = _read_metadata(self._root / name)
            except _BrokenCheckpointError:
                self._delete(name)
                continue
            state = (metadata["round"], metadata["state_hash"])
            if name in self._broken or state in seen or len(seen) == NUM_KEPT_STATES:
                self._delete(name)
            else:
                seen.add(state)

    def _delete(self, name: str) -> None:
        try:
            # Renamed first: a deletion that is cut short must not look like a broken checkpoint.
            os.rename(self._root / name, self._root / f".{name}")
            _remove(self._root / f".{name}")
        except OSError as error:  # the new checkpoint is safe; the old one only takes up space
            logger.warning("cannot delete the old checkpoint %s: %s", self._root / name, error)
        self._broken.discard(name)
        self._state_hashes.pop(name, None)


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """`write` fills an empty directory beside `target`, which then takes its place, whole.

    Whatever the instant of a crash, after `recover_directory(target)` the old or the new one is there,
    complete. (Between two renames, for microseconds, `target` does not exist: portable file systems
    cannot exchange directories.) Raises StateError when it cannot be written, or when `target` was
    not made by this function; errors of `write` pass, and leave the old one in place.
    """
    recover_directory(target)
    building, retired = _siblings(target)
    try:
        _build(building, write)
        if os.path.lexists(target):
            os.rename(target, retired)
        os.rename(building, target)
        _fsync(target.parent)
        _remove(retired)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error


def recover_directory(target: Path) -> None:
    """Finishes or undoes a `replace_directory` that was cut short; call it at start, before reading.

    Raises StateError when `target` holds something that `replace_directory` did not make: at the
    start of a run, that is the moment to learn that the output would overwrite it.
    """
    building, retired = _siblings(target)
    try:
        if not os.path.lexists(target) and os.path.lexists(retired):
            # The old one steps aside only when the new one is complete and synced.
            os.rename(building if building.is_dir() else retired, target)
        if target.is_dir() and any(target.iterdir()) and not (target / _MARKER).is_file():
            raise StateError(
                f"{target} exists and was not written by this program, so it is not replaced:"
                " move it away, or choose another --output-dir"
            )
        _remove(building)
        _remove(retired)
    except OSError as error:
        raise _cannot_write(target, error) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a small file atomically and durably. Raises StateError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb", buffering=0) as file:
            _write_all(file.fileno(), text.encode())
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line to a JSON Lines file, durably; NaN and infinities become null.

    Raises StateError when it cannot be written; the file is then as it was.
    """
    line = json.dumps(_without_nan(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    try:
        is_new = not path.exists()
        with path.open("ab", buffering=0) as file:
            size_bytes = file.seek(0, os.SEEK_END)
            try:
                _write_all(file.fileno(), line)
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size_bytes)
                raise
        if is_new:
            _fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def repair_json_lines(path: Path) -> None:
    """Drops a last line that a kill or a power cut left torn; call it at start, before appending.

    Raises StateError when the file cannot be read or written. A missing file is in order.
    """
    try:
        if not path.exists():
            return
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        tail = content[len(complete) :]
        if not tail:
            return
        with path.open("r+b", buffering=0) as file:
            if _is_json_object(tail):  # only its newline is missing, as some editors leave it
                file.seek(0, os.SEEK_END)
                _write_all(file.fileno(), b"\n")
            else:
                file.truncate(len(complete))
                logger.warning("%s: dropped a torn last line of %d bytes", path, len(tail))
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from error


@dataclass(frozen=True)
class KeptModel:
    """Which of its models a peer keeps as its own classifier."""

    what: str  # in words
    round: int
    metric_name: str
    score: float
    num_examples: int  # of the held-out split
    held_out: str = ""  # `held_out_digest`: which split; empty: written by an earlier version
    test_score: float | None = None  # of the same metric, on examples by which nothing was chosen
    num_test: int = 0  # so many


def write_model_card(
    directory: Path,
    *,
    base_model: str,
    base_revision: str | None,
    run_name: str,
    spec_digest: str,
    round: int,
    state_hash: str,
    num_contributions: int,
    peers: Sequence[str],
    commits: Sequence[Mapping[str, Any]],
) -> None:
    """README.md of a fused model, in the form of the Hugging Face Hub: front matter, use, lineage.

    `commits`: oldest first; of each, `round`, `state_hash` and `contributors` (a list, or a mapping
    by peer) are shown where present. Everything that other peers chose is quoted, escaped and cut.
    """
    front_matter = [
        "---",
        "library_name: transformers",
        "pipeline_tag: feature-extraction",
        *([f"base_model: {json.dumps(base_model)}"] if _is_hub_id(base_model) else []),
        "tags:",
        "- cold-fusion",
        "- model-fusion",
        "- feature-extraction",
        "---",
    ]
    facts = {
        "base model": _base_model_name(base_model, base_revision),
        "run": _code(run_name),
        "spec digest": _code(spec_digest),
        "rounds": str(round),
        "contributions": str(num_contributions),
        "peers": str(len(peers)),
        "state hash": _code(state_hash),
    }
    body = [
        "",
        f"# {_plain(run_name)}, round {round}",
        "",
        "An encoder fused by ColD Fusion (Don-Yehiya et al., ACL 2023, arXiv 2212.01378): in each round,",
        "peers finetuned the shared backbone on data of their own, which stayed with them, and averaged it.",
        "Use it where you would use the base model, as a starting point for finetuning or for its features:",
        "",
        "```python",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'model = AutoModel.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
        "",
        "It holds no task head. The license is that of the base model.",
        "",
        "## Lineage",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        *_lineage_table(commits),
        *(["", "Peers:", "", *(f"- {_code(peer)}" for peer in peers)] if peers else []),
    ]
    text = "\n".join(front_matter + body) + "\n"
    (directory / "README.md").write_text(text, encoding="utf-8")


def write_task_card(directory: Path, kept: KeptModel) -> None:
    """README.md of a peer's own classifier, and the same for programs: which model it is, and its score."""
    text = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "---",
        "",
        "# Your own classifier",
        "",
        f"This is {kept.what}, of round {kept.round}.",
        f"Its {kept.metric_name} on your {kept.num_examples} held-out examples is {kept.score:.4f}: the best",
        "that this peer has seen there so far of three kinds: its own finetuned backbones, the fused",
        "ones with a head fitted to them, and the one that the run began with. Only one that does no",
        "worse replaces it.",
        "The choice was made on those examples, so on new ones expect a little less.",
        *_tested(kept),
        "",
        "It holds your label names. It has never left this machine.",
    ]
    write_text(directory / "README.md", "\n".join(text) + "\n")
    write_text(directory / _KEPT, json.dumps(asdict(kept), indent=1) + "\n")


def kept_model(directory: Path) -> KeptModel | None:
    """Which classifier is in `directory`; None where there is none, or nobody can tell."""
    try:
        kept = KeptModel(**json.loads((directory / _KEPT).read_bytes()))
        return replace(kept, score=float(kept.score))
    except (OSError, ValueError, TypeError):
        return None


def _tested(kept: KeptModel) -> list[str]:
    if kept.test_score is None:
        return []
    examples = f"{kept.num_test} test examples, by which nothing was chosen,"
    return ["", f"Its {kept.metric_name} on {examples} is {kept.test_score:.4f}."]


def kept_score(directory: Path, metric_name: str, held_out: str) -> float | None:
    """Of the classifier in `directory`; None where there is none, or one of another metric or split."""
    kept = kept_model(directory)
    if kept is None or kept.metric_name != metric_name or kept.held_out not in ("", held_out):
        return None
    return kept.score


def is_kept(score: float, best: float | None) -> bool:
    """Whether a classifier takes the place of the one kept so far, of score `best`; None: there is none.

    Of equals the newer one, since it has seen more. NaN beats nothing and is beaten by any score.
    """
    if best is None or math.isnan(best):
        return True
    return score >= best


# --- for who only looks: nothing is written, and no other process is kept out


def kept_run(directory: Path) -> str | None:
    """Digest of the run whose checkpoints `directory` holds; None: there are none.

    Raises StateError as `CheckpointStore` does.
    """
    for path in _checkpoint_paths(directory):
        try:
            return str(_read_metadata(path)["run_digest"])
        except _BrokenCheckpointError:
            continue
    return None


def kept_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest complete one, or None. Raises StateError as `CheckpointStore.load` does."""
    for path in _checkpoint_paths(directory):
        try:
            return _read_checkpoint(path)
        except _BrokenCheckpointError as error:
            logger.info("checkpoint %s is broken: %s", path, error)
    return None


def kept_addresses(directory: Path) -> tuple[str, ...]:
    """Of peers met earlier, so that a peer comes back even when its entry point is gone."""
    try:
        value = json.loads((directory / ADDRESSES_NAME).read_bytes())
    except (OSError, ValueError):
        return ()
    addresses = value if isinstance(value, list) else []
    return tuple(address for address in addresses if isinstance(address, str))[:MAX_KNOWN_ADDRESSES]


class Conviction(BaseModel):
    """One line of `excluded.jsonl`: an audit has proven that a reducer lied in a round."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    run: str  # its digest
    peer: str
    round: int
    why: str


def kept_convictions(directory: Path, run: str) -> tuple[Conviction, ...]:
    """Those of `run` that this peer knew of before, the newest ones; what is no conviction is passed over."""
    try:
        lines = (directory / CONVICTIONS_NAME).read_bytes().splitlines()
    except OSError:
        return ()
    found = []
    for line in lines[-MAX_KEPT_CONVICTIONS:]:
        try:
            found.append(Conviction.model_validate_json(line))
        except ValidationError:
            logger.info("%s: a line is no conviction", CONVICTIONS_NAME)
    return tuple(conviction for conviction in found if conviction.run == run)


def _checkpoint_paths(directory: Path) -> list[Path]:
    """Newest first."""
    try:
        found = [path for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StateError(f"cannot read {directory}: {error.strerror}; fix its permissions") from error
    return sorted(found, key=lambda path: int(path.name), reverse=True)


# --- the directory and its lock


_lock_fds: set[int] = set()  # of this process; a forked child gives up its copies


def _drop_inherited_locks() -> None:
    for fd in _lock_fds:
        os.close(fd)  # closing a copy does not unlock; keeping one would outlive a killed peer
    _lock_fds.clear()


os.register_at_fork(after_in_child=_drop_inherited_locks)


def _open_directory(directory: Path, root: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock_fd = _lock(directory / ".lock")
    except OSError as error:
        raise _cannot_write(directory, error) from error
    try:
        root.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass  # told now rather than after a round of work
        for entry in root.iterdir():
            if re.fullmatch(r"\.\d+", entry.name):
                _remove(entry)
    except OSError as error:
        _unlock(lock_fd)
        raise _cannot_write(root, error) from error
    return lock_fd


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        os.close(fd)
        if not isinstance(error, BlockingIOError):
            raise
        raise StateError(
            f"{path.parent} is in use by process {holder or '(unknown)'}:"
            " stop that process, or choose another --output-dir"
        ) from None
    _lock_fds.add(fd)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _unlock(fd: int) -> None:
    if fd in _lock_fds:  # not so in a forked child, which must not touch the parent's lock
        _lock_fds.discard(fd)
        os.ftruncate(fd, 0)
        os.close(fd)


# --- one checkpoint


class _BrokenCheckpointError(Exception):
    """A checkpoint that cannot be used: torn, changed, or incomplete. Never leaves this module."""


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    layout = checkpoint.layout
    _require_size("flat", checkpoint.flat, layout)
    for name, vector in (("kept_delta", checkpoint.kept_delta), ("residual", checkpoint.residual)):
        if vector is not None:
            _require_size(name, vector, layout.backbone)
    return {
        "format": FORMAT_VERSION,
        "run_digest": checkpoint.run_digest,
        "round": checkpoint.round,
        "state_hash": make_manifest(layout, checkpoint.flat).state_hash,
        "kept_delta_hash": _hash_of(layout.backbone, checkpoint.kept_delta),
        "residual_hash": _hash_of(layout.backbone, checkpoint.residual),
        "layout": layout.to_json(),
        "commits": list(checkpoint.commits),
        "extra": dict(checkpoint.extra),
    }


def _hash_of(layout: TensorLayout, vector: torch.Tensor | None) -> str | None:
    return None if vector is None else make_manifest(layout, vector).state_hash


def _require_size(name: str, vector: torch.Tensor, layout: TensorLayout) -> None:
    if vector.shape != (layout.num_values,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, the layout {layout.num_values} values")


def _write_checkpoint(directory: Path, checkpoint: Checkpoint, metadata: dict[str, Any]) -> None:
    layout = checkpoint.layout
    _write_vector(directory / _BACKBONE, layout, checkpoint.flat)
    for name, vector in ((_KEPT_DELTA, checkpoint.kept_delta), (_RESIDUAL, checkpoint.residual)):
        if vector is not None:
            _write_vector(directory / name, layout.backbone, vector)
    residuals = {name: tensor.contiguous() for name, tensor in checkpoint.residuals.items()}
    # Cloned, because tied or strided tensors are refused; a head is small.
    head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.head.items()}
    hashes = {
        "head_sha256": _write_tensors(directory / _HEAD, head),
        "residuals_sha256": _write_tensors(directory / _RESIDUALS, residuals),
    }
    text = json.dumps({**metadata, **hashes}, indent=1)
    (directory / _METADATA).write_text(text + "\n", encoding="utf-8")
    _fsync_tree(directory)


def _write_vector(path: Path, layout: TensorLayout, flat: torch.Tensor) -> None:
    """A safetensors file whose data is the flat vector, without the copy that the library makes of it."""
    header, start = {}, 0
    for name, view in layout.unflatten(flat.detach()).items():
        stop = start + 4 * view.numel()
        header[name] = {"dtype": "F32", "shape": list(view.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        _write_all(file.fileno(), flat_bytes(flat))


def _map_vector(path: Path) -> torch.Tensor:
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    # Copy on write: torch wants a writable array, and nothing that is written would reach the file.
    return torch.from_numpy(np.memmap(path, dtype="<f4", mode="c", offset=offset))


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Returns the file's sha256; None, and no file, when there are no tensors."""
    if not tensors:
        return None
    save_file(dict(tensors), path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_metadata(directory: Path) -> dict[str, Any]:
    path = directory / _METADATA
    try:
        metadata = json.loads(path.read_bytes())
    except PermissionError as error:
        raise StateError(f"cannot read {path}: {error.strerror}; fix its permissions") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _BrokenCheckpointError(f"{_METADATA}: {error}") from error
    version = metadata.get("format") if isinstance(metadata, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise StateError(
            f"{directory} was written by a newer version of this program (format {version}, this one"
            f" reads up to {FORMAT_VERSION}): upgrade, or choose another --output-dir"
        )
    expected = {"run_digest": str, "round": int, "state_hash": str, "commits": list, "extra": dict}
    if version != FORMAT_VERSION or any(type(metadata.get(k)) is not kind for k, kind in expected.items()):
        raise _BrokenCheckpointError(f"{_METADATA} lacks a key, or one is of the wrong kind")
    return dict(metadata)


def _read_checkpoint(directory: Path) -> Checkpoint:
    metadata = _read_metadata(directory)
    try:
        layout = TensorLayout.from_json(metadata.get("layout"))
        flat = _read_vector(directory / _BACKBONE, layout, metadata["state_hash"])
        kept_delta, residual = (
            _read_optional(directory / name, layout.backbone, metadata.get(key))
            for name, key in ((_KEPT_DELTA, "kept_delta_hash"), (_RESIDUAL, "residual_hash"))
        )
        head = _read_tensors(directory / _HEAD, metadata.get("head_sha256"))
        residuals = _read_tensors(directory / _RESIDUALS, metadata.get("residuals_sha256"))
    except PermissionError as error:
        raise StateError(f"cannot read {directory}: {error}; fix its permissions") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise _BrokenCheckpointError(str(error)) from error
    return Checkpoint(
        run_digest=metadata["run_digest"],
        round=metadata["round"],
        layout=layout,
        flat=flat,
        commits=tuple(metadata["commits"]),
        head=head,
        kept_delta=kept_delta,
        residual=residual,
        residuals=residuals,
        extra=metadata["extra"],
    )


def _read_optional(path: Path, layout: TensorLayout, expected_hash: str | None) -> torch.Tensor | None:
    return None if expected_hash is None else _read_vector(path, layout, expected_hash)


def _read_vector(path: Path, layout: TensorLayout, expected_hash: str) -> torch.Tensor:
    if path.stat().st_size < layout.size_bytes:
        raise _BrokenCheckpointError(f"{path.name} is shorter than its layout")  # before memory is taken
    flat = torch.empty(layout.num_values, dtype=torch.float32)
    with safe_open(path, framework="pt") as file:
        if sorted(file.keys()) != list(layout.names):
            raise _BrokenCheckpointError(f"{path.name} does not hold the tensors of its layout")
        for name, view in layout.unflatten(flat).items():
            tensor = file.get_tensor(name)  # a view of the mapped file: no second copy in memory
            if tensor.shape != view.shape or tensor.dtype != view.dtype:
                raise _BrokenCheckpointError(f"{name[:80]!r} in {path.name} is not as in its layout")
            view.copy_(tensor)
    if make_manifest(layout, flat).state_hash != expected_hash:
        raise _BrokenCheckpointError(f"the hash of {path.name} does not fit")
    return flat


def _read_tensors(path: Path, expected_sha256: str | None) -> dict[str, torch.Tensor]:
    if expected_sha256 is None:
        return {}
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected_sha256:
            raise _BrokenCheckpointError(f"the hash of {path.name} does not fit")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}  # off the mapped file


# --- directories and files


def _siblings(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def _build(building: Path, write: Callable[[Path], None]) -> None:
    complete = False
    try:
        building.mkdir(parents=True)
        write(building)
        (building / _MARKER).write_text("Replaced as a whole, again and again: keep your files elsewhere.\n")
        _fsync_tree(building)
        complete = True
    finally:
        if not complete:
            _remove(building, ignore_errors=True)


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _fsync_tree(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            _fsync_tree(entry)
        else:
            _fsync(entry)
    _fsync(directory)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _cannot_write(path: Path, error: Exception) -> StateError:
    reason = getattr(error, "strerror", None) or str(error)
    return StateError(
        f"cannot write {path}: {reason}. Check its permissions and the free space,"
        " or choose another --output-dir"
    )


# --- JSON and Markdown


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value


def _is_json_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _lineage_table(commits: Sequence[Mapping[str, Any]]) -> list[str]:
    if not commits:
        return []
    shown = commits[-NUM_CARD_ROUNDS:]
    cut = [f"The last {len(shown)} of {len(commits)} commits:", ""] if len(shown) < len(commits) else []
    rows = []
    for commit in shown:
        contributors = commit.get("contributors")
        num_peers = len(contributors) if isinstance(contributors, list | tuple | Mapping) else "-"
        state_hash = _code(commit["state_hash"]) if "state_hash" in commit else "-"
        rows.append(f"| {_plain(commit.get('round', '-'))} | {num_peers} | {state_hash} |")
    return ["", *cut, "| round | peers averaged | state hash |", "|---:|---:|---|", *rows]


def _is_hub_id(name: str) -> bool:
    """By the name alone, so that the card is the same on every machine (`peer.model.name_in_spec`)."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def _base_model_name(base_model: str, revision: str | None) -> str:
    if not _is_hub_id(base_model):  # where somebody keeps his models is nobody's business
        return f"{_code(Path(base_model).name)}, a local directory"
    return _code(base_model) + (f", revision {_code(revision)}" if revision else "")


def _code(value: object) -> str:
    return f"`{_plain(value)}`"


def _plain(value: object) -> str:
    """One short line without anything that Markdown, a table or a terminal would act on."""
    text = str(value)
    text = text if len(text) <= 100 else text[:99] + "…"
    return "".join(c if c.isprintable() and c not in "`|<>[]*\\" else "?" for c in text)
