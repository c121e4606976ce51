"""Which vector stands for many? Pure rules on slices of shape (num_peers, size).

A rule sees one slice of all contributions, in the order of the group, and returns a slice (size,).
The arithmetic is float32, element by element and peer by peer in that order, with separate
multiply and add: an audit that recomputes a slice gets the same bits. (`torch.add(alpha=)` may
fuse the two and differs in a quarter of the elements.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Rule = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]

TRIMMED_FRACTION = 0.2  # from each end: up to a fifth of the peers may lie


def weighted_mean(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum(w_i x_i) / sum(w_i); with equal weights the plain mean of ColD Fusion (section 3).

    parts: one (size,) float32 tensor per peer; weights: positive. Returns (size,) float32.
    """
    _check(parts, weights)
    equal = all(weight == weights[0] for weight in weights)
    total = parts[0].clone() if equal else parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part if equal else part * weight
    total /= len(parts) if equal else math.fsum(weights)
    return total


def trimmed_mean(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Coordinate-wise mean without the largest and smallest values (Yin et al. 2018, definition 2).

    A fifth of the peers, rounded down, is cut at each end; weights do not count, since whoever
    lies about values lies about examples too. parts: (size,) each. Returns (size,) float32.
    """
    _check(parts, weights)
    num_cut = int(TRIMMED_FRACTION * len(parts))
    ordered = torch.stack(list(parts)).sort(dim=0).values
    kept = ordered[num_cut : len(parts) - num_cut]
    return weighted_mean(list(kept), [1.0] * len(kept))


def median(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Coordinate-wise median, the mean of the middle two for an even number (Yin et al. 2018, definition 1).

    parts: (size,) each. Returns (size,) float32.
    """
    _check(parts, weights)
    ordered = torch.stack(list(parts)).sort(dim=0).values
    low, high = ordered[(len(parts) - 1) // 2], ordered[len(parts) // 2]
    return (low + high) / 2


RULES: dict[str, Rule] = {"mean": weighted_mean, "trimmed_mean": trimmed_mean, "median": median}


def _check(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"{len(parts)} parts and {len(weights)} weights: one weight per peer, at least one peer"
        )
    if any(part.shape != parts[0].shape or part.dtype != torch.float32 for part in parts):
        raise ValueError("parts must be float32 and of one shape")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError("weights must be positive and finite")
