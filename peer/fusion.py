"""What does one round make of many deltas? The all-reduce, without a network.

    manifests and Gram matrices -> plan -> each part: combine, add the reducer's error feedback, encode once
    -> all decode the same bytes

The same functions in the same order as `peer.allreduce` and what an audit repeats, so the same bytes. For
experiments and simulations: here everybody delivers everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peer.aggregate import Plan, needs_gram
from peer.compression import Codec
from peer.manifest import Outgoing
from peer.parts import PartGrid
from peer.reduction import (
    decoded,
    encode_result,
    gram_matrix,
    is_usable,
    plan_of,
    reduce_values,
    squared_bound,
)

_NO_RESIDUALS: Mapping[int, torch.Tensor] = {}


@dataclass(frozen=True)
class Member:
    """One contributor of a group."""

    peer_id: str  # decides which parts it reduces
    weight: float  # from the spec
    outgoing: Outgoing  # its contribution, encoded


@dataclass(frozen=True)
class Fusion:
    """What a round computes; the same on every member."""

    plan: Plan  # what each contribution counts, in the order of the group
    results: tuple[bytes | memoryview, ...]  # encoded, by part: what travels back
    residuals: Mapping[int, torch.Tensor]  # by part: the reducers' error feedback, once this is committed
    gram: np.ndarray | None = None  # (n, n) inner products of the contributions, where they were asked for

    def delta(self, grid: PartGrid, codec: Codec) -> torch.Tensor:
        """(num_values,) float32: the fused delta, as every member decodes it."""
        flat = torch.empty(grid.num_values, dtype=torch.float32)
        for part, data in enumerate(self.results):
            start, stop = grid.bounds(part)
            codec.decode(data, stop - start, flat[start:stop])
        return flat


def fuse(
    members: Sequence[Member],
    *,
    aggregation: str,
    screening: str = "none",
    residuals: Mapping[int, torch.Tensor] = _NO_RESIDUALS,
    has_gram: bool = False,
) -> Fusion:
    """Fuse what the members, in the order of the group, contribute.

    residuals: the reducers' error feedback by part; it stays as it is. has_gram: whether the gate asks for
    inner products. Raises ValueError for an empty group and for contributions that do not fit together.
    """
    grid, codec = _common(members)
    norms = [member.outgoing.manifest.norm for member in members]
    weights = [member.weight for member in members]
    figures = _figures(members, grid) if has_gram or needs_gram(aggregation, screening) else []
    plan = plan_of(aggregation, screening, weights, norms, figures)
    counting = [index for index, weight in enumerate(plan.weights) if weight != 0]
    results, new_residuals = [], {}
    for part in range(grid.num_parts):
        values = reduce_values(
            aggregation,
            [_values(members[index], part) for index in counting],
            [plan.weights[index] for index in counting],
            grid.size(part),
        )
        feedback = residuals.get(part)
        squared_norms = [member.outgoing.manifest.squared_norms[part] for member in members]
        bound = squared_bound(aggregation, squared_norms, plan.weights)
        if feedback is not None and not is_usable(feedback, values, bound):
            feedback = None
        data, residual = encode_result(codec, values, feedback)
        results.append(data)
        if residual is not None:
            new_residuals[part] = residual
    gram = np.sum(figures, axis=0) if figures else None
    if gram is not None:
        uncounted = [index for index in range(len(members)) if index not in counting]
        gram[uncounted, :] = gram[:, uncounted] = np.nan
    return Fusion(plan, tuple(results), new_residuals, gram)


def _figures(members: Sequence[Member], grid: PartGrid) -> list[np.ndarray]:
    """One Gram matrix per reducer, in the order of the peer ids: float64 addition has an order, too."""
    owned = grid.owned([member.peer_id for member in members])
    matrices = []
    for _, parts in sorted(owned.items()):
        total = np.zeros((len(members), len(members)))
        for part in parts:
            total += gram_matrix([_values(member, part) for member in members])
        if len(parts) > 0:
            matrices.append(total)
    return matrices


def _values(member: Member, part: int) -> torch.Tensor:
    return decoded(member.outgoing.codec, member.outgoing.parts[part], member.outgoing.grid.size(part))


def _common(members: Sequence[Member]) -> tuple[PartGrid, Codec]:
    if not members:
        raise ValueError("nobody contributes")
    first = members[0].outgoing
    if any((m.outgoing.grid, m.outgoing.codec) != (first.grid, first.codec) for m in members):
        raise ValueError("the contributions differ in their size or codec")
    return first.grid, first.codec
