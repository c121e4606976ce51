"""What exactly does a reducer compute? Pure steps, so that an auditor who repeats them gets the same bytes.

    check every part against its sender's manifest -> plan the weights -> combine -> add the own error
    feedback -> encode once

Deterministic on every machine: `peer.aggregate` adds in the order of the group with separate multiply
and add, the plan is float64 arithmetic of Python numbers, and a codec's decoding is one multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from peer.aggregate import TRIMMED_FRACTION, Plan, combine, make_plan, needs_gram
from peer.compression import Codec
from peer.manifest import Manifest, join_hashes, norms_agree, part_hash, squared_norm
from peer.parts import PartGrid

FEEDBACK_CAP = 2.2  # error feedback that makes a result longer is dropped; rounding may add a third, of int4
_CHUNK_VALUES = 16 * 1024  # of a Gram matrix: 128 KB per contribution
_ROUNDING = 1e-6  # relative, of sums of products: what a norm or a product may be beyond its bound


class BadPartError(Exception):
    """What a sender sent cannot be used; says why. Never leaves the all-reduce and the audit."""


def checked_part(
    codec: Codec,
    grid: PartGrid,
    manifest: Manifest,
    expected_hash: bytes,
    part: int,
    data: bytes | bytearray | memoryview,
) -> torch.Tensor:
    """(grid.size(part),) float32: a part that is what its sender's manifest promised. Raises BadPartError."""
    if len(data) != codec.size_bytes(grid.size(part)):
        raise BadPartError(f"part {part} has {len(data)} bytes, a wrong shape")
    if part_hash(data) != expected_hash:
        raise BadPartError(f"part {part} is not the one that its manifest names")
    try:
        values = decoded(codec, data, grid.size(part))
    except ValueError as error:
        raise BadPartError(f"part {part} cannot be decoded: {error}") from error
    squared = squared_norm(values)
    if not math.isfinite(squared):
        raise BadPartError(f"part {part} holds values that are not finite")
    if not norms_agree(squared, manifest.squared_norms[part]):
        raise BadPartError(
            f"part {part} has norm {math.sqrt(squared):.4g}, its manifest says "
            f"{math.sqrt(manifest.squared_norms[part]):.4g}"
        )
    return values


def decoded(codec: Codec, data: bytes | bytearray | memoryview, num_values: int) -> torch.Tensor:
    """(num_values,) float32; of a lossless codec a view of `data`, which may hold values that are not finite.

    Raises ValueError.
    """
    if codec.is_lossy:
        return codec.decode(data, num_values)
    buffer = data if isinstance(data, bytearray) else bytearray(data)  # torch wants to be able to write
    return torch.frombuffer(buffer, dtype=torch.float32)


def plan_of(
    aggregation: str,
    screening: str,
    weights: Sequence[float],
    norms: Sequence[float | None],
    figures: Sequence[np.ndarray],
) -> Plan:
    """What each member's values are multiplied with, in the order of the group.

    `weights` from the signed records; `norms` from the manifests, None for who gave none; `figures`
    one (n, n) Gram matrix per reducer, in the order of the reducers, not finite for who is not complete.
    Raises ValueError for figures that no contributions have.
    """
    gram = None
    if needs_gram(aggregation, screening):
        gram = np.zeros((len(weights), len(weights)))
        for matrix in figures:  # in this order on every member: float64 addition is not associative
            gram = gram + matrix
    is_in = [norm is not None and (gram is None or math.isfinite(gram[i, i])) for i, norm in enumerate(norms)]
    present = [index for index, here in enumerate(is_in) if here]
    plan = make_plan(
        aggregation,
        screening,
        [weights[i] for i in present],
        [norms[i] or 0.0 for i in present],
        None if gram is None else gram[np.ix_(present, present)],
    )
    at = {index: position for position, index in enumerate(present)}
    return Plan(
        weights=tuple(plan.weights[at[i]] if i in at else 0.0 for i in range(len(weights))),
        factors=tuple(plan.factors[at[i]] if i in at else 0.0 for i in range(len(weights))),
        reasons=tuple(plan.reasons[at[i]] if i in at else "" for i in range(len(weights))),
    )


def gram_matrix(values: Sequence[torch.Tensor]) -> np.ndarray:
    """(n, n) float64: inner products of n vectors (size,).

    Its last bits differ between machines: the reducer's own are told to all, and nobody else's count.
    Pair by pair, without BLAS: that wakes threads that finetuning needs.
    """
    arrays = [vector.numpy() for vector in values]
    gram = np.zeros((len(arrays), len(arrays)))
    for start in range(0, arrays[0].size if arrays else 0, _CHUNK_VALUES):
        rows = [array[start : start + _CHUNK_VALUES].astype(np.float64) for array in arrays]
        for i, first in enumerate(rows):
            for j, second in enumerate(rows[: i + 1]):
                gram[i, j] += np.einsum("k,k->", first, second)
    return gram + np.tril(gram, -1).T


def figures_problem(figures: np.ndarray, squared_norms: Sequence[float | None]) -> str:
    """Why an (n, n) Gram matrix cannot be one of n slices with these squared norms; empty when it can.

    A norm of None is not known. Who was not complete has a diagonal that is not finite, and is left out.
    """
    squares = np.diagonal(figures)
    complete = np.flatnonzero(np.isfinite(squares))
    if (squares[complete] < 0).any():
        return "a square is negative"
    for index in complete.tolist():
        expected = squared_norms[index]
        if expected is not None and not norms_agree(float(squares[index]), expected):
            return f"contribution {index} has not the norm that its manifest says"
    lengths = np.sqrt(squares[complete])
    bounds = np.outer(lengths, lengths) * (1 + _ROUNDING)
    if not (np.abs(figures[np.ix_(complete, complete)]) <= bounds).all():  # a NaN is not, either
        return "a product is larger than the lengths of its vectors allow"
    return ""


def reduce_values(
    aggregation: str,
    values: Sequence[torch.Tensor],
    weights: Sequence[float],
    size: int,
) -> torch.Tensor:
    """(size,) float32: what stands for one part of those that are in; zeros when nobody is."""
    if not values:
        return torch.zeros(size, dtype=torch.float32)
    return combine(aggregation, values, weights)


def squared_bound(rule: str, squared_norms: Sequence[float], weights: Sequence[float]) -> float:
    """A square that the squared norm of one part's result is never above, whoever of the others lies.

    squared_norms: of that part, of every member of the group. weights: of the plan, 0 for who did not give
    the part. With m rows x_i that count, and r what `peer.aggregate.combine` makes of them:

    - **mean, disjoint_mean.** In each coordinate |r| is at most the largest |x_i|, so r^2 <= sum(x_i^2): the
      sum of all squared norms. Who declares a long vector of its own raises this; that is in the record.
    - **median.** Take any h = floor(m / 2) + 1 of the rows. If r > 0 in a coordinate, let u be its upper
      middle value (of an odd m the middle one), so u >= r. At least m - floor(m / 2) values are >= u, m - h
      rows are outside, and m - floor(m / 2) > m - h: one of the h rows has x >= u >= r, and r^2 <= the sum of
      their squares. For r < 0 turn the signs round. So the sum of the h smallest squared norms is a bound.
    - **trimmed_mean.** b = floor(m / 4) are cut at each end. Take any m - b rows. If r > 0, then r is at most
      the largest value that is kept; b + 1 values are >= that, b rows are outside, so one of these rows is
      among them. Turned round for r < 0. So the sum of the m - b smallest is a bound.
    - **clipped_mean, centered_clipping.** r = sum(a_i x_i) = sum(m a_i x_i) / m, and a square is convex:
      |r|^2 <= sum(m^2 a_i^2 |x_i|^2) / m. Used is m times that, which for equal weights without clipping is
      the bound of the mean: error feedback needs that room (`FEEDBACK_CAP`).

    A reducer can claim that others stopped. Of the rules against liars, half of the group or fewer, two of a
    larger group, and too few to cut any of prove nothing; then the floor(n / 2) + 1 smallest of all n members
    stand in. That is no bound for an honest reducer, but those whose parts it has must be several times as
    long as most members for it to be blamed.
    """
    if rule in ("mean", "disjoint_mean"):
        return math.fsum(squared_norms)
    size = len(squared_norms)
    rows = [(square, weight) for square, weight in zip(squared_norms, weights, strict=True) if weight != 0]
    num_cut = int(TRIMMED_FRACTION * len(rows))
    has_lost_its_cut = rule == "trimmed_mean" and num_cut == 0 < int(TRIMMED_FRACTION * size)
    if has_lost_its_cut or len(rows) < max(size // 2 + 1, min(size, 3)):
        return math.fsum(sorted(squared_norms)[: size // 2 + 1])
    if rule in ("clipped_mean", "centered_clipping"):
        return math.fsum((len(rows) * weight) ** 2 * square for square, weight in rows)
    num_kept = len(rows) // 2 + 1 if rule == "median" else len(rows) - num_cut
    return math.fsum(sorted(square for square, _ in rows)[:num_kept])


def is_usable(residual: torch.Tensor, result: torch.Tensor, bound: float) -> bool:
    """Whether a reducer's feedback (size,) may be added to a part's result (size,).

    bound: the `squared_bound` of the part. Feedback would make a liar of the reducer, by the cap on the norms
    of results, when deltas have become far shorter than those that left it; then it is dropped. So is one of
    another size, from a checkpoint of a version that cut the vector elsewhere.
    """
    if residual.shape != result.shape:
        return False
    with_it = torch.from_numpy(np.add(result.numpy(), residual.numpy()))
    return squared_norm(with_it) <= FEEDBACK_CAP**2 * bound


def encode_result(
    codec: Codec, values: torch.Tensor, residual: torch.Tensor | None
) -> tuple[bytes | memoryview, torch.Tensor | None]:
    """The bytes of a result, with the error feedback of this part added; and the feedback for the next round.

    `values` (size,) float32 is used up. Seide et al. 2014; Karimireddy et al. 2019, algorithm 1.
    """
    if not codec.is_lossy:
        return codec.encode(values), None
    if residual is not None:
        np.add(values.numpy(), residual.numpy(), out=values.numpy())
    data, sent = codec.encode_and_decode(values)
    np.subtract(values.numpy(), sent.numpy(), out=values.numpy())
    return data, values


def residual_hashes(residuals: Mapping[int, torch.Tensor], parts: range) -> str:
    """The hashes of a reducer's feedback, by part; empty when there is none at all."""
    if not any(part in residuals for part in parts):
        return ""
    return join_hashes(b"".join(residual_hash(residuals.get(part)) for part in parts))


def residual_hash(residual: torch.Tensor | None) -> bytes:
    """32 zeros stand for no feedback."""
    if residual is None:
        return bytes(32)
    return part_hash(memoryview(residual.numpy()).cast("B"))  # type: ignore[arg-type]  # a numpy array is a buffer
