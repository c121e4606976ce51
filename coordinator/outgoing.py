"""What leaves this process for other peers? The type in which the lowest layers report every message.

`network.py`, `streams.py` and `guard.py` hand everything of ours to hivemind, and report each message
at that moment: what it is, for whom, how many bytes, and their hash. Modules above add what only they
know (the round, which values of the state, a hash that exists already) as an `About`. Who listens is
told to the `Network`; `peer/ledger_file.py` writes the reports down.

A message is reported when it is handed over to the p2p daemon, whether it arrives or not, and also where the
connection turns out to be broken that moment, or the door of a private run to be closed: rather too much
than too little. Bytes are those of the payload, without a few of framing (protobuf, frame headers) and
without the encryption.

Not reported, since it is not ours: what hivemind's DHT nodes say to each other (pings, searches, and
the passing on of records that their authors signed), libp2p's own protocols (identify, ping,
AutoNAT), and what a relay carries for others. Of the DHT the stores that we make are reported.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

DHT = "DHT"  # in the place of a peer: which nodes hold a record is hivemind's choice


@dataclass(frozen=True)
class About:
    """What a module knows about a message that it gives to the layer below."""

    kind: str = ""  # such as "delta part"; empty: what the layer below calls it
    of: str = ""  # what it is a piece of: a state's hash, a file's name
    round: int | None = None
    values: tuple[int, int] | None = None  # of the flat vector: the first one, and the first behind
    squared_norm: float | None = None  # of those values
    sha256: bytes = b""  # of the whole message, where it is known; empty: to be computed
    data: memoryview | None = None  # all of an answer in parts: to be hashed when it is cut off


@dataclass(frozen=True)
class Sent:
    """One message that was handed over to the p2p daemon."""

    kind: str  # "call", "reply", "delta part" ...
    name: str  # of the method, where there is one
    peer_id: str  # for whom
    num_bytes: int  # of the payload
    sha256: bytes  # of the payload
    about: About = About()
    at: float = field(default_factory=time.time)  # seconds since 1970


Recorder = Callable[[Sent], None]  # called in the network's thread: it must be quick and must not raise


def ignore(_sent: Sent) -> None:
    """For whoever keeps no ledger."""


def report(
    record: Recorder,
    kind: str,
    name: str,
    peer_id: str,
    *chunks: bytes | bytearray | memoryview,
    about: About | None = None,
) -> None:
    """One message, given as its chunks."""
    if record is ignore:
        return
    about = about or About()
    digest = about.sha256
    if not digest:
        hasher = hashlib.sha256()
        for chunk in chunks:
            hasher.update(chunk)
        digest = hasher.digest()
    record(Sent(about.kind or kind, name, peer_id, sum(map(len, chunks)), digest, about))


class Answer:
    """An answer that leaves in parts; one message, reported when it has ended, however it did."""

    def __init__(self, record: Recorder, name: str, peer_id: str) -> None:
        self._record, self._name, self._peer_id = record, name, peer_id
        self._hasher, self._num_bytes, self._num_hashed = hashlib.sha256(), 0, 0
        self._is_ended = False
        self.about = About()

    def add(self, part: bytes) -> None:
        """The next part is about to leave."""
        self._num_bytes += len(part)
        if not self.about.sha256 and self._record is not ignore:
            self._hasher.update(part)
            self._num_hashed += len(part)

    def end(self) -> None:
        if self._is_ended or self._num_bytes == 0:
            return
        self._is_ended = True
        digest, about = self._digest(), replace(self.about, data=None)  # what was sent is not held any longer
        self._record(Sent(about.kind or "reply", self._name, self._peer_id, self._num_bytes, digest, about))

    def _digest(self) -> bytes:
        about = self.about
        if self._num_hashed == self._num_bytes:
            return self._hasher.digest()
        if about.data is None or self._num_bytes == len(about.data):
            return about.sha256
        return hashlib.sha256(about.data[: self._num_bytes]).digest()  # the other side broke off


_answering: ContextVar[Answer | None] = ContextVar("answering", default=None)


def describe(about: About) -> None:
    """Called by a handler, before its first part: what the answer is that it gives now."""
    answer = _answering.get()
    if answer is not None:
        answer.about = about


def begin_answer(answer: Answer) -> None:
    """From here on `describe` is about this answer: each is given in a task of its own."""
    _answering.set(answer)
