"""Whose accusations are heard, in which order, and how much of them is kept? Pure: the time is passed in.

To check an accusation costs a download of up to 64 MB and the computation of a part. So one is checked at a
time; each accuser has one waiting at most, and those of the last round's members come first. Who was shown to
lie is not heard again; whose evidence cannot be had, or is of a round that is not known here, is heard again
after doubling pauses.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from coordinator.limits import Recent
from coordinator.records import Count, HashText, Record, RecordError
from coordinator.spec import RunSpec
from peer.compression import CODECS
from peer.manifest import MAX_GRAM_MEMBERS
from peer.parts import PartGrid

MAX_EVIDENCE_BYTES = 64 * 1024 * 1024
MAX_PUBLISHED_BYTES = 2 * MAX_EVIDENCE_BYTES
MAX_WAITING = 64
MAX_REMEMBERED = 4096  # liars and pauses; whoever has more identities than that is heard as a stranger is
FIRST_PAUSE_SECONDS = 10.0
MAX_PAUSE_SECONDS = 3600.0
# Of what is signed, as text: a report of a sender, a hash with a norm, a figure. What does not fit them
# was padded: each of a few liars may bring 1 MB more, or its proof would be too large to be taken.
_REPORT_BYTES, _HASH_BYTES, _FIGURE_BYTES = 640, 80, 28
_PADDING_BYTES = 8 * 1024 * 1024


class Accusation(Record):
    """What an accuser tells all: where the evidence is, and whom it is about."""

    run: HashText
    evidence: HashText  # sha256
    size_bytes: int
    reducer: Annotated[str, Field(max_length=64)]  # who is accused; so that nobody fetches what convinced it
    round: Count


@dataclass(frozen=True)
class RunRules:
    """What of the spec evidence has to agree with."""

    aggregation: str
    screening: str
    codec: str
    num_values: int  # of a delta
    max_peers: int

    @classmethod
    def of(cls, spec: RunSpec) -> RunRules:
        return cls(spec.aggregation, spec.screening, spec.compression, spec.num_parameters, spec.max_peers)

    @property
    def max_evidence_bytes(self) -> int:
        """One part of all members, with what all of them signed."""
        grid, num_peers = PartGrid(self.num_values), self.max_peers
        num_figures = num_peers**2 if num_peers <= MAX_GRAM_MEMBERS else 0
        parts = num_peers * CODECS[self.codec].size_bytes(grid.part_values) + 4 * grid.part_values
        manifests = num_peers * grid.num_parts * _HASH_BYTES
        statements = num_peers * (num_peers * _REPORT_BYTES + num_figures * _FIGURE_BYTES)
        hashes = 4 * grid.num_parts * _HASH_BYTES  # of results and feedback: each part has one reducer
        return min(MAX_EVIDENCE_BYTES, _PADDING_BYTES + parts + manifests + statements + hashes)


@dataclass(frozen=True)
class _Pause:
    seconds: float
    until: float


class Docket:
    """The accusations that wait, and who is heard."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[Accusation, bool]] = {}  # by accuser, and whether it comes first
        self._pauses: OrderedDict[str, _Pause] = OrderedDict()
        self.liars: Recent[str] = Recent(MAX_REMEMBERED)  # published false evidence

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, accuser: str, accusation: Accusation, *, comes_first: bool, now: float) -> None:
        """Raises RecordError when this accuser is not heard now."""
        pause = self._pauses.get(accuser)
        if accuser in self.liars or accuser in self._waiting or (pause is not None and now < pause.until):
            raise RecordError("not listening to you now")
        if len(self._waiting) >= MAX_WAITING:
            last = next((a for a, (_, is_first) in reversed(self._waiting.items()) if not is_first), None)
            if not comes_first or last is None:
                raise RecordError("too many accusations are waiting")
            del self._waiting[last]
        self._waiting[accuser] = accusation, comes_first

    def take(self) -> tuple[str, Accusation] | None:
        """The next one to check."""
        waiting = self._waiting
        accuser = next((a for a, (_, is_first) in waiting.items() if is_first), next(iter(waiting), None))
        return None if accuser is None else (accuser, waiting.pop(accuser)[0])

    def lied(self, accuser: str) -> None:
        self.liars.add(accuser)

    def failed(self, accuser: str, now: float) -> None:
        """Its evidence was not to be had, or not to be judged here."""
        earlier = self._pauses.pop(accuser, None)
        seconds = FIRST_PAUSE_SECONDS if earlier is None else min(MAX_PAUSE_SECONDS, 2 * earlier.seconds)
        self._pauses[accuser] = _Pause(seconds, now + seconds)
        if len(self._pauses) > MAX_REMEMBERED:
            self._pauses.popitem(last=False)


class Published:
    """Evidence by its hash, for who asks; what nobody has asked for longest goes first. For any thread."""

    def __init__(self, max_bytes: int = MAX_PUBLISHED_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._data: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> str:
        """Its hash. The newest is kept in any case."""
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            if digest not in self._data:
                self._data[digest] = data
                self._num_bytes += len(data)
            while self._num_bytes > self._max_bytes and len(self._data) > 1:
                self._num_bytes -= len(self._data.popitem(last=False)[1])
        return digest

    def get(self, digest: str) -> bytes | None:
        with self._lock:
            if digest in self._data:
                self._data.move_to_end(digest)
            return self._data.get(digest)
