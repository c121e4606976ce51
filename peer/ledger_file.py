"""How does everything that a peer sends become one chained line after the other in `ledger.jsonl`?

A line is a JSON object. Its last key, `hash`, is the sha256 of the hash of the line before and of the line's
own text without it; so a line that is changed, removed or put in shows at the next one. Cutting off
the last lines does not: whoever fears that writes down the last hash (`python -m peer.ledger`
prints it, and `--expect` looks for it).

What is sent often is summed: one line for messages of one kind, name, round and object, with their number,
bytes by peer, and one hash: of the message, or of the hashes of all its messages in the order in
which they left. Tensors (parts of a delta, of a result, of a state) are summed for one peer and as long as
they follow each other, so such a line says which values [start, stop) of the flat vector went
there. A line is written when it is a minute old (with tensors: 5 s), after every commit, and at the end.
After SIGKILL the lines that were still open are missing; the chain holds, and the missing "end" shows it.
Two processes may write one ledger, as when a peer runs and `coordinator.invite revoke` is called for its
directory: each line is put behind the last one there, under a lock of the file.

What is not in it: see `coordinator/outgoing.py`; and what is asked of the model hub over HTTP.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from coordinator.errors import StateError
from coordinator.outgoing import Sent
from peer.layout import TensorLayout
from peer.state import repair_json_lines

logger = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"
NO_HASH = "0" * 64  # before the first line
OPEN_SECONDS = 60.0  # messages are summed in one line for so long
TENSOR_OPEN_SECONDS = 5.0
WRITE_SECONDS = 0.5  # between two looks of the writing thread: no message wakes it
MAX_WAITING = 100_000  # messages that the thread has not taken yet: 20 s of the fastest exchange
FLUSH_SECONDS = 30.0
_HASH_KEY = ',"hash":"'
_TAIL_CHARS = len(_HASH_KEY) + 64 + len('"}')
_READ_BYTES = 1 << 16  # of the end of a ledger that is continued


@dataclass
class _Open:
    """A line to be: messages that are summed."""

    first: Sent
    round: int | None
    until: float
    num: int = 0
    peers: dict[str, int] = field(default_factory=dict)  # bytes by peer
    values: tuple[int, int] | None = None
    squared_norm: float | None = None
    hashes: bytearray = field(default_factory=bytearray)

    def add(self, sent: Sent) -> None:
        self.num += 1
        self.until = max(self.until, sent.at)
        self.peers[sent.peer_id] = self.peers.get(sent.peer_id, 0) + sent.num_bytes
        self.hashes += sent.sha256
        values, squared = sent.about.values, sent.about.squared_norm
        if values is not None:
            self.values = (values[0] if self.values is None else self.values[0], values[1])
        if squared is not None:
            self.squared_norm = squared + (self.squared_norm or 0.0)

    def is_continued_by(self, sent: Sent) -> bool:
        """Whether the values follow each other; a part that is sent again begins a line of its own."""
        values = sent.about.values
        return values is None or self.values is None or values[0] == self.values[1]

    def is_due(self, now: float) -> bool:
        limit = OPEN_SECONDS if self.values is None else TENSOR_OPEN_SECONDS
        return not 0 <= now - self.first.at < limit  # a clock that was set back ends it as well

    def content(self, layout: TensorLayout | None) -> dict[str, Any]:
        """The line, without number and hash."""
        content: dict[str, Any] = {"time": round(self.first.at, 3), "kind": self.first.kind}
        if self.num > 1:
            content["seconds"] = round(self.until - self.first.at, 3)
        named = {"name": self.first.name, "of": self.first.about.of}
        content |= {key: value for key, value in named.items() if value}
        if self.round is not None:
            content["round"] = self.round
        content |= {"num": self.num, "bytes": sum(self.peers.values()), "peers": self.peers}
        if self.values is not None:
            content["values"] = list(self.values)
            content["tensors"] = None if layout is None else covered(layout, *self.values)
        if self.squared_norm is not None:
            content["norm"] = float(f"{math.sqrt(self.squared_norm):.6g}")
        content["sha256"] = bytes(self.hashes).hex() if self.num == 1 else joined_hash(self.hashes)
        return content


class Sums:
    """The lines that are still open. Pure: what is done depends on what was sent and on the time given."""

    def __init__(self) -> None:
        self._open: dict[tuple[Any, ...], _Open] = {}

    def take(self, sent: Sent, round_: int | None) -> _Open | None:
        """Returns a line that ends with this message's coming."""
        about = sent.about
        number = round_ if about.round is None else about.round
        key: tuple[Any, ...] = (sent.kind, sent.name, about.of, number)
        if about.values is not None:
            key += (sent.peer_id,)
        ended = None
        if key in self._open and not self._open[key].is_continued_by(sent):
            ended = self._open.pop(key)
        self._open.setdefault(key, _Open(sent, number, sent.at)).add(sent)
        return ended

    def due(self, now: float) -> list[_Open]:
        """Lines that have been open long enough, in the order of their first messages."""
        keys = [key for key, line in self._open.items() if line.is_due(now)]
        return sorted((self._open.pop(key) for key in keys), key=lambda line: line.first.at)

    def all(self) -> list[_Open]:
        lines = sorted(self._open.values(), key=lambda line: line.first.at)
        self._open.clear()
        return lines


def covered(layout: TensorLayout, start: int, stop: int) -> dict[str, Any]:
    """Which tensors the values [start, stop) of a flat vector belong to: how many, the first and the last.

    The names of a layout are sorted, so those between follow from the "layout" line of the ledger.
    """
    touched, first = [], 0
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        last = first + math.prod(shape)
        if first < stop and start < last:
            touched.append([name, list(shape)])
        first = last
    if not touched:
        return {"num": 0}
    return {"num": len(touched), "first": touched[0], "last": touched[-1]}


def joined_hash(hashes: bytes | bytearray) -> str:
    """Of several messages: their hashes, one after another, hashed."""
    return hashlib.sha256(hashes).hexdigest()


def chained(content: Mapping[str, Any], previous_hash: str) -> tuple[str, str]:
    """A line (without its end) and its hash."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    digest = line_hash(text, previous_hash)
    return f'{text[:-1]}{_HASH_KEY}{digest}"}}', digest


def line_hash(text: str, previous_hash: str) -> str:
    return hashlib.sha256(f"{previous_hash}{text}".encode()).hexdigest()


def split_line(line: str) -> tuple[str, str, dict[str, Any]]:
    """Text without hash, hash, and content. Raises ValueError when it is not a line of a ledger."""
    text, tail = f"{line[:-_TAIL_CHARS]}}}", line[-_TAIL_CHARS:]
    if not tail.startswith(_HASH_KEY) or not tail.endswith('"}'):
        raise ValueError("it does not end with a hash")
    content = json.loads(text)
    if not isinstance(content, dict) or type(content.get("n")) is not int:
        raise ValueError("it has no number")
    return text, tail[len(_HASH_KEY) : -2], content


class Ledger:
    """Takes reports from any thread and writes them in one of its own. A context manager."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Continues the chain of an earlier process. Raises StateError when that cannot be."""
        self._path, self._now = path, now
        self.round: int | None = None  # in which the session is: of messages that do not say theirs
        self._layout: TensorLayout | None = None
        self._waiting: deque[tuple[Sent | dict[str, Any], int | None]] = deque()
        self._num_lost = 0
        self._sums = Sums()
        self._lock = threading.Lock()  # of the file and the sums
        self._ended = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._keep_writing, name="ledger", daemon=True)
        self._size_bytes = -1  # when this process wrote last; another size: others have written since
        with _locked_where_it_exists(path):
            repair_json_lines(path)
            self._num_lines, self._last_hash = _last_line(path)

    def __enter__(self) -> Ledger:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._note("start", version=1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(FLUSH_SECONDS)
        try:
            with self._lock:
                self._write_waiting(is_last=True)
                os.fsync(self._file)
        except OSError as failure:
            logger.error("the ledger is not complete: %s", failure)
        finally:
            os.close(self._file)

    # for any thread

    def sent(self, sent: Sent) -> None:
        """One message; takes a microsecond, and never waits."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append((sent, self.round))
        else:
            self._num_lost += 1

    def know(self, run_digest: str, layout: TensorLayout) -> None:
        """Which tensors the flat vector of this run holds; written once, so that a ledger explains itself."""
        self._layout = layout
        self._note("layout", run=run_digest, num_values=layout.num_values, tensors=layout.to_json())

    def flush(self) -> None:
        """All that was sent until now is on the disk then. Raises StateError."""
        try:
            with self._lock:
                self._write_waiting(is_all=True)
                os.fsync(self._file)
        except OSError as error:
            self._failure = error
        if self._failure is not None:
            raise self._cannot_write(self._failure)

    # helpers

    def _note(self, kind: str, **content: Any) -> None:
        """A line that says nothing about a message."""
        self._waiting.append(({"time": round(self._now(), 3), "kind": kind, **content}, None))

    def _keep_writing(self) -> None:
        while not self._ended.wait(WRITE_SECONDS):
            try:
                with self._lock:
                    self._write_waiting()
            except OSError as error:  # told by the next flush, which ends the session
                self._failure = error
                logger.error("cannot write the ledger: %s", error)

    def _write_waiting(self, *, is_all: bool = False, is_last: bool = False) -> None:
        """Raises OSError. With the lock held."""
        lines: list[_Open | dict[str, Any]] = []
        while self._waiting:
            entry, round_ = self._waiting.popleft()
            if isinstance(entry, Sent):
                ended = self._sums.take(entry, round_)
                lines += [] if ended is None else [ended]
            else:
                lines.append(entry)
        lines += self._sums.all() if is_all or is_last else self._sums.due(self._now())
        if self._num_lost:
            lines.append({"time": round(self._now(), 3), "kind": "lost", "num": self._num_lost})
            self._num_lost = 0
        if is_last:
            lines.append({"time": round(self._now(), 3), "kind": "end"})
        try:
            self._append(line.content(self._layout) if isinstance(line, _Open) else line for line in lines)
        except OSError:
            self._num_lost += sum(line.num for line in lines if isinstance(line, _Open))
            raise

    def _append(self, contents: Iterable[dict[str, Any]]) -> None:
        """Raises OSError; then nothing of it is in the file."""
        waiting = list(contents)
        if waiting:
            with _locked(self._file):
                self._append_locked(waiting)

    def _append_locked(self, contents: Iterable[dict[str, Any]]) -> None:
        size_bytes = os.lseek(self._file, 0, os.SEEK_END)
        if size_bytes != self._size_bytes:
            self._num_lines, self._last_hash = self._last_line_now()
        num_lines, last_hash, texts = self._num_lines, self._last_hash, []
        for content in contents:
            num_lines += 1
            text, last_hash = chained({"n": num_lines, **content}, last_hash)
            texts.append(f"{text}\n".encode())
        data = memoryview(b"".join(texts))
        end_bytes = size_bytes + len(data)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            with suppress(OSError):  # where that fails, too, the next start drops the torn line
                os.ftruncate(self._file, size_bytes)
            raise
        self._num_lines, self._last_hash, self._size_bytes = num_lines, last_hash, end_bytes

    def _last_line_now(self) -> tuple[int, str]:
        """Of the file that is open, wherever it has been moved to. Raises OSError."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            try:
                return _read_last_line(file)
            except ValueError as error:
                raise OSError(errno.EIO, f"its last line is damaged: {error}") from error

    def _cannot_write(self, error: OSError) -> StateError:
        return StateError(
            f"cannot write {self._path}: {error.strerror or error}. A peer stops that cannot record what it "
            "sends: check permissions and the free space, or choose another --output-dir"
        )


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """No other process writes meanwhile. Raises OSError."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def _locked_where_it_exists(path: Path) -> Iterator[None]:
    """Else a line that another process is writing this moment would be taken for a torn one."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # what is wrong with it is told by who reads it
        yield
        return
    try:
        with _locked(descriptor):
            yield
    finally:
        os.close(descriptor)


def _last_line(path: Path) -> tuple[int, str]:
    """Number and hash of the last line; 0 and NO_HASH of a ledger that begins. Raises StateError."""
    try:
        with path.open("rb") as file:
            return _read_last_line(file)
    except FileNotFoundError:
        return 0, NO_HASH
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StateError(
            f"the last line of {path} is damaged: {error}. `python -m peer.ledger {path.parent}` says more; "
            "to go on, move the file to another place: a new ledger is begun"
        ) from error


def _read_last_line(file: BinaryIO) -> tuple[int, str]:
    """Raises OSError, and ValueError when it is not a line of a ledger."""
    size_bytes = file.seek(0, os.SEEK_END)
    if size_bytes == 0:
        return 0, NO_HASH
    wanted = _READ_BYTES
    while True:
        file.seek(max(0, size_bytes - wanted))
        lines = file.read().splitlines()
        if len(lines) > 1 or wanted >= size_bytes:
            break
        wanted *= 4  # one line longer than that
    _, digest, content = split_line(lines[-1].decode())
    return content["n"], digest
