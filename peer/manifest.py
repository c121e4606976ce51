"""What does a peer promise before it sends, and what does a reducer say that it did? Two signed records.

A **manifest** names every encoded part of a contribution by its hash and its norm, before the first part
travels. So a reducer can hold a sender to it, norms are known before anything is added up, and an auditor
who asks for a part later gets the bytes that the reducer got, or can tell.

A **statement** is the reducer's: which results it sent, made of whose parts, with which weights.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from coordinator.identity import Identity
from coordinator.records import (
    Count,
    HashText,
    PeerIdText,
    Record,
    RecordError,
    open_signed,
    sign,
)
from peer.compression import Codec
from peer.parts import MAX_PARTS, PartGrid

HASH_BYTES = 32
MAX_SIGNED_BYTES = 1024 * 1024  # of a manifest or a statement, with 4096 parts
MAX_GRAM_MEMBERS = 128  # rules that need a Gram matrix are for groups up to that
MAX_FIGURES = MAX_GRAM_MEMBERS**2
MAX_VALUES = 2**32  # of a delta: 16 GB
MAX_SQUARED_NORM = 1e39  # of a part: what float32 holds, so that no sum of them overflows
NORM_TOLERANCE = 1e-3  # relative: sums of squares differ a little between machines

_SquaredNorm = Annotated[float, Field(ge=0, le=MAX_SQUARED_NORM, allow_inf_nan=False)]
_Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Figure = Annotated[float, Field(allow_inf_nan=False)]
_Hashes = Annotated[
    str, Field(max_length=4 * ((MAX_PARTS * HASH_BYTES + 2) // 3))
]  # base64, one after another


class Manifest(Record):
    """What one peer contributes to one round, whatever the attempt."""

    kind: Literal["manifest"] = "manifest"
    run: HashText
    round: Annotated[int, Field(ge=1)]
    previous: HashText  # the commit that the delta starts from
    codec: Annotated[str, Field(max_length=16)]
    num_values: Annotated[int, Field(ge=1, le=MAX_VALUES)]
    hashes: _Hashes  # sha256 of each encoded part
    squared_norms: Annotated[list[_SquaredNorm], Field(max_length=MAX_PARTS)]  # of each decoded part

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def norm(self) -> float:
        """Of the whole contribution, as it arrives."""
        return math.sqrt(math.fsum(self.squared_norms))

    def part_hashes(self) -> list[bytes]:
        return split_hashes(self.hashes)


class SenderReport(Record):
    """What a reducer took from one sender."""

    peer: PeerIdText
    manifest: HashText | None  # digest; None when none arrived
    declared: _Positive  # its weight in the group, from its signed record
    is_planned: bool  # whether the rule was planned with it; it may have stopped later
    norm: _Positive  # of the whole contribution, from the manifest
    num_parts: Count  # so many of the reducer's parts, from its first on, contain this sender
    reason: Annotated[str, Field(max_length=200)] = ""  # why not all; empty as well for who merely stopped
    weight: _Positive = 0.0  # that the rule gave it; 0: left out
    factor: Annotated[float, Field(ge=0, le=1)] = 1.0  # what clipping or screening left of it


class Statement(Record):
    """What a reducer did with its parts."""

    kind: Literal["statement"] = "statement"
    run: HashText
    group: HashText  # id of the attempt; the commit that came of it names it
    round: Annotated[int, Field(ge=1)]
    previous: HashText  # the commit that the round starts from
    first_part: Count
    senders: Annotated[list[SenderReport], Field(min_length=1, max_length=1024)]  # in the order of the group
    results: _Hashes  # sha256 of each encoded result
    figures: Annotated[tuple[_Figure | None, ...], Field(strict=False, max_length=MAX_FIGURES)] = ()  # Gram
    told: _Hashes = ""  # sha256 of every reducer's figures, by peer id: what the weights follow from
    residuals_before: _Hashes = ""  # of its error feedback, by part; empty: all zero
    residuals_after: _Hashes = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


@dataclass(frozen=True)
class Outgoing:
    """One peer's contribution, encoded once, for all attempts of a round and for the audit after it."""

    grid: PartGrid
    codec: Codec
    parts: Sequence[bytes | memoryview]  # encoded; of fp32 views into the delta
    manifest: Manifest
    signed: bytes  # the manifest with its signature, as it travels

    def decoded(self, part: int) -> torch.Tensor:
        """(grid.size(part),) float32: what the others will see."""
        return self.codec.decode(self.parts[part], self.grid.size(part))


def prepare(
    delta: torch.Tensor, codec: Codec, identity: Identity, *, run: str, round: int, previous: str
) -> Outgoing:
    """Encode and hash a delta (num_values,) float32. Raises ValueError where it is not finite.

    It must not change while the result is in use: fp32 parts are views of it.
    """
    grid = PartGrid(delta.numel())
    parts: list[bytes | memoryview] = []
    hashes = bytearray()
    norms = []
    for part in range(grid.num_parts):
        start, stop = grid.bounds(part)
        data, values = codec.encode_and_decode(delta[start:stop])
        parts.append(data)
        hashes += part_hash(data)
        norms.append(squared_norm(values))
    if not all(map(math.isfinite, norms)):
        raise ValueError("the delta holds values that are not finite, or too large to be averaged")
    manifest = Manifest(
        run=run,
        round=round,
        previous=previous,
        codec=codec.name,
        num_values=delta.numel(),
        hashes=join_hashes(hashes),
        squared_norms=norms,
    )
    return Outgoing(grid, codec, parts, manifest, sign(manifest, identity).to_bytes())


def open_manifest(
    data: bytes, *, sender: str, run: str, round: int, previous: str, codec: str, grid: PartGrid
) -> Manifest:
    """Check a sender's manifest against the round that it is for. Raises RecordError."""
    author, manifest = open_signed(data, Manifest, max_bytes=MAX_SIGNED_BYTES)
    if author != sender:
        raise RecordError("the manifest is signed by somebody else")
    if (manifest.run, manifest.round, manifest.previous) != (run, round, previous):
        raise RecordError("the manifest is of another round")
    if manifest.codec != codec or manifest.num_values != grid.num_values:
        raise RecordError(
            f"the manifest is of {manifest.num_values} values as {manifest.codec[:16]!r}, "
            f"not of {grid.num_values} as {codec!r}"
        )
    if len(manifest.squared_norms) != grid.num_parts or len(manifest.part_hashes()) != grid.num_parts:
        raise RecordError(f"the manifest does not name {grid.num_parts} parts")
    return manifest


def open_statement(
    data: bytes, *, reducer: str, run: str, group: str, round: int, previous: str, parts: range
) -> Statement:
    """Check a reducer's statement about `parts`. Raises RecordError."""
    author, statement = open_signed(data, Statement, max_bytes=MAX_SIGNED_BYTES)
    if author != reducer or statement.run != run or statement.group != group:
        raise RecordError("the statement is of another reducer or another group")
    if (statement.round, statement.previous) != (round, previous):
        raise RecordError("the statement is of another round")
    if statement.first_part != parts.start or len(split_hashes(statement.results)) != len(parts):
        raise RecordError(f"the statement is not about parts {parts.start} to {parts.stop}")
    if any(
        len(split_hashes(residuals)) not in (0, len(parts))
        for residuals in (statement.residuals_before, statement.residuals_after)
    ):
        raise RecordError("the statement does not name the error feedback of each of its parts")
    split_hashes(statement.told)  # how many there must be, only who knows the group's rule can say
    if len(statement.figures) not in (0, len(statement.senders) ** 2):
        raise RecordError("the figures are not a square matrix of the senders")
    if any(report.num_parts > len(parts) for report in statement.senders):
        raise RecordError("the statement counts more parts than there are")
    if any(report.weight == 0 and report.num_parts > 0 for report in statement.senders):
        raise RecordError("the statement counts parts of a sender that it left out")
    if any(report.weight != 0 and report.manifest is None for report in statement.senders):
        raise RecordError("the statement gives a weight to a sender without a manifest")
    return statement


def figures_to_json(figures: np.ndarray | None) -> tuple[float | None, ...]:
    """Row by row; None for what is not known, because a sender was not complete."""
    if figures is None:
        return ()
    return tuple(value if math.isfinite(value) else None for value in figures.ravel().tolist())


def figures_of(statement: Statement) -> np.ndarray | None:
    """(n, n) float64, the inverse of `figures_to_json`. Raises RecordError."""
    size = len(statement.senders)
    if not statement.figures:
        return None
    if len(statement.figures) != size * size:
        raise RecordError("the figures are not a square matrix of the senders")
    return np.array(statement.figures, dtype=np.float64).reshape(size, size)


def figures_hash(figures: Sequence[float | None]) -> bytes:
    """Of what `figures_to_json` gave."""
    return hashlib.sha256(np.array(figures, dtype="<f8").tobytes()).digest()


def part_hash(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def squared_norm(values: torch.Tensor) -> float:
    """Not finite when a value is not: one pass answers both questions.

    Its last bits differ between machines; nothing that decides the state follows from one side's sum alone.
    In numpy, since torch's products wake threads that finetuning needs.
    """
    array = values.numpy()
    return float(np.einsum("i,i->", array, array))


def norms_agree(one: float, other: float) -> bool:
    return abs(one - other) <= NORM_TOLERANCE * max(one, other) + 1e-30


def join_hashes(hashes: bytes | bytearray) -> str:
    return base64.b64encode(hashes).decode()


def split_hashes(text: str) -> list[bytes]:
    """Raises RecordError."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RecordError("hashes that are not base64") from error
    if len(data) % HASH_BYTES:
        raise RecordError("a hash is cut short")
    return [data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES)]
