"""Which vector stands for many? A plan from figures of whole contributions, then a rule for one part of each.

Two phases, both pure. `make_plan` sees one norm per contributor and, where a rule needs them, all inner
products (the Gram matrix); it says who is left out and how much of the others counts. `combine` applies that
to one part of the vectors. The rules:

| rule | result | source |
|---|---|---|
| mean | sum(w_i x_i) / sum(w_i); with equal weights sum(x_i) / n | ColD Fusion, section 3 |
| clipped_mean | the same of x_i min(1, median norm / norm_i) | the clipping of centered_clipping, once |
| trimmed_mean | per coordinate, without a quarter at each end | Yin et al. 2018, definition 2 |
| median | per coordinate; of an even number the mean of the middle two | Yin et al. 2018, definition 1 |
| disjoint_mean | per coordinate, of those with the sign of the sum | TIES: Yadav et al. 2023, steps 2 and 3 |
| centered_clipping | sum(a_i x_i), see `_centered_clipping` | Karimireddy et al. 2021, algorithm 2 |

Weights count for mean and clipped_mean only: whoever lies about values lies about examples, too. The first
step of TIES, which drops small values, is left out: what is small is known of a whole contribution only.

Deterministic across machines, so that an audit gets the same bits:
- `make_plan` computes in float64 with +, -, x, / and square roots, each rounded by IEEE 754, and with
  `math.fsum`, which rounds a sum correctly whatever its order. There is no BLAS in it: that has an order of
  each machine's own.
- `combine` computes in float32, element by element and contributor by contributor in the order of the
  group, with separate multiply and add (`torch.add(alpha=)` may fuse the two and differs in a quarter of
  the elements); in numpy, so in one thread. Minima and maxima are exact; which zero they give for -0 and +0
  is not, so theirs is +0.
- The Gram matrix comes from outside: its last bits differ between machines, so one computes it and tells all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from typing import Any

import numpy as np
import torch

_Array = np.ndarray[Any, Any]
_Matrix = list[list[float]]

TRIMMED_FRACTION = 0.25  # from each end: up to a quarter may lie. Of 8 two are cut, of 4 one, of 3 none
MAX_NORM = 1e18  # of a usable contribution: its sums, weights and squares stay finite in float32
TOO_LONG = 3.0  # screening by norm: so many median norms
TOO_ALIKE = 0.8  # screening by cosine: of two contributions, where the others are far less alike
OPPOSED = -0.05  # screening by cosine: what is above that is no direction against the others
CENTERED_CLIPPING_STEPS = 5
_STANDARD_DEVIATIONS = 1.4826  # of normally distributed figures, per median absolute deviation
_SORT_VALUES = 32 * 1024  # sorted at once: bounds the copies, 128 KB per contributor


@dataclass(frozen=True)
class Plan:
    """What whole contributions decide; one entry per contributor, in the order of the group."""

    weights: tuple[float, ...]  # what `combine` takes, never negative; 0: left out
    factors: tuple[float, ...]  # for the record, 0..1: what the rule left of the contribution; 0: left out
    reasons: tuple[str, ...]  # "", or why it was left out


def needs_gram(rule: str, screening: str) -> bool:
    """Do all inner products have to be exchanged before parts can be combined?"""
    return rule == "centered_clipping" or screening in ("cosine", "norm_cosine")


def make_plan(
    rule: str, screening: str, weights: Sequence[float], norms: Sequence[float], gram: _Array | None
) -> Plan:
    """Who is left out, and how much of the others counts; nobody's may be left.

    weights: positive, from the spec. norms: of whole contributions; one that is no number up to MAX_NORM
    leaves its contributor out. gram: (n, n) float64 inner products, of which the lower triangle counts;
    None unless `needs_gram`. Raises ValueError for other input.
    """
    _check_whole(rule, screening, weights, norms)
    reasons = [_unusable(norm) for norm in norms]
    usable = _kept(reasons)
    products = _products(gram, usable) if needs_gram(rule, screening) else {}
    for index, reason in _suspects(screening, usable, norms, products):
        reasons[index] = reason
    kept = _kept(reasons)
    shares, factors = _shares(
        rule, [weights[i] for i in kept], [norms[i] for i in kept], _rows(products, kept)
    )
    share_of, factor_of = dict(zip(kept, shares, strict=True)), dict(zip(kept, factors, strict=True))
    return Plan(
        weights=tuple(share_of.get(index, 0.0) for index in range(len(norms))),
        factors=tuple(factor_of.get(index, 0.0) for index in range(len(norms))),
        reasons=tuple(reasons),
    )


def combine(rule: str, parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """One part of the result, (size,) float32, from the parts of those who delivered it.

    parts: (size,) float32 each, left as they are. weights: their entries of the plan; weight 0 does not
    count, and where nobody counts the result is 0. Who did not deliver is in none of the means of values, nor
    in the median; for the clipping rules, whose weights sum up over all contributors, it counts as a delta
    of 0, since what is left of the others must not grow by it. Raises ValueError for other input.
    """
    _check(parts, weights)
    kept = [(part.numpy(), weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    if not kept:
        return torch.zeros_like(parts[0])
    arrays, shares = [array for array, _ in kept], [weight for _, weight in kept]
    if rule == "mean":
        return torch.from_numpy(_weighted_mean(arrays, shares))
    if rule in ("clipped_mean", "centered_clipping"):
        return torch.from_numpy(_weighted_sum(arrays, shares))
    if rule == "trimmed_mean":
        num_cut = int(TRIMMED_FRACTION * len(arrays))
        return torch.from_numpy(_mean_of_ranks(arrays, num_cut, len(arrays) - num_cut))
    if rule == "disjoint_mean":
        return torch.from_numpy(_disjoint_mean(arrays))
    if rule == "median":
        return torch.from_numpy(_mean_of_ranks(arrays, (len(arrays) - 1) // 2, len(arrays) // 2 + 1))
    raise ValueError(f"unknown rule {rule!r}")


# One part.


def _weighted_mean(arrays: list[_Array], weights: list[float]) -> _Array:
    """sum(w_i x_i) / sum(w_i); equal weights are not multiplied with at all."""
    if all(weight == weights[0] for weight in weights):
        total, divisor = _sum(arrays), float(len(arrays))
    else:
        total, divisor = _weighted_sum(arrays, weights), math.fsum(weights)
    total /= np.float32(divisor)
    return total


def _weighted_sum(arrays: list[_Array], weights: list[float]) -> _Array:
    total, product = arrays[0] * np.float32(weights[0]), np.empty_like(arrays[0])
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total += np.multiply(array, np.float32(weight), out=product)
    return total


def _sum(arrays: list[_Array]) -> _Array:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


def _disjoint_mean(arrays: list[_Array]) -> _Array:
    """Per coordinate, the mean of those that have the sign of the sum of all; 0 where that is 0."""
    sign = np.sign(_sum(arrays))
    total, num = np.zeros_like(arrays[0]), np.zeros_like(arrays[0])
    for array in arrays:
        agrees = array * sign > 0
        total += np.where(agrees, array, np.float32(0.0))
        num += agrees
    total /= np.maximum(num, np.float32(1.0))
    return total


def _mean_of_ranks(arrays: list[_Array], first: int, stop: int) -> _Array:
    """Per coordinate, the mean of the values from rank `first` (0 is the smallest) to before `stop`."""
    result = np.empty_like(arrays[0])
    for part, rows in _sorted_chunks(arrays):
        result[part] = _sum(rows[first:stop])
    result /= np.float32(stop - first)
    result += np.float32(0.0)  # -0 + 0 is +0
    return result


def _sorted_chunks(arrays: list[_Array]) -> Iterator[tuple[slice, list[_Array]]]:
    """Copies, sorted coordinate by coordinate by a network of minima and maxima.

    Of 8 parts of 65,536 values in 0.4 ms, where torch.sort takes 9 ms (one core of an AMD EPYC).
    """
    comparators = _sorting_network(len(arrays))
    for start in range(0, arrays[0].size, _SORT_VALUES):
        part = slice(start, start + _SORT_VALUES)
        rows = [array[part].copy() for array in arrays]
        spare = np.empty_like(rows[0])
        for low, high in comparators:
            np.minimum(rows[low], rows[high], out=spare)
            np.maximum(rows[low], rows[high], out=rows[high])
            rows[low], spare = spare, rows[low]
        yield part, rows


@lru_cache(maxsize=64)
def _sorting_network(num_rows: int) -> tuple[tuple[int, int], ...]:
    """Pairs to put in order, one after the other (Batcher 1968; Knuth, volume 3, algorithm 5.2.2M)."""
    return tuple(_comparators(num_rows))


def _comparators(num_rows: int) -> Iterator[tuple[int, int]]:
    sorted_run = 1
    while sorted_run < num_rows:
        distance = sorted_run
        while distance >= 1:
            for first in range(distance % sorted_run, num_rows - distance, 2 * distance):
                for low in range(first, min(first + distance, num_rows - distance)):
                    if low // (2 * sorted_run) == (low + distance) // (2 * sorted_run):
                        yield low, low + distance
            distance //= 2
        sorted_run *= 2


# Whole contributions: how much of each counts.


def _shares(
    rule: str, weights: list[float], norms: list[float], gram: _Matrix
) -> tuple[list[float], list[float]]:
    """Weights for `combine`, and factors, of those kept."""
    if rule == "centered_clipping":
        return _centered_clipping(gram)
    if rule == "clipped_mean":
        factors, total = _clips(norms), math.fsum(weights)
        return [weight * factor / total for weight, factor in zip(weights, factors, strict=True)], factors
    return weights, [1.0] * len(weights)


def _clips(norms: list[float]) -> list[float]:
    """min(1, median / norm).

    The median is of the norms above 0, as who had no time says nothing on how long a delta is, and of an
    even number the lower of the middle two: of two contributors, the longer is cut to the shorter.
    """
    limit = _lower_median([norm for norm in norms if norm > 0])
    return [_clip(norm, limit) for norm in norms]


def _centered_clipping(gram: _Matrix) -> tuple[list[float], list[float]]:
    """Coefficients a with result sum(a_i x_i), and the clip factors of the last step.

    Karimireddy et al. 2021, algorithm 2: v <- v + 1/n sum((x_i - v) min(1, tau / |x_i - v|)). Here v starts
    at 0, since deltas start from the common state; tau is the median of the distances at each step, the
    lower one of an even number. v is always a combination sum(a_k x_k), so the inner products suffice:
    |x_i - v|^2 = G_ii - 2 (G a)_i + a G a.
    """
    num = len(gram)
    coefficients, clips = [0.0] * num, [1.0] * num
    for _ in range(CENTERED_CLIPPING_STEPS if num else 0):
        distances = _distances(gram, coefficients)
        limit = _lower_median(distances)
        clips = [_clip(distance, limit) for distance in distances]
        shrink = 1.0 - math.fsum(clips) / num
        coefficients = [a * shrink + clip / num for a, clip in zip(coefficients, clips, strict=True)]
    return coefficients, clips


def _distances(gram: _Matrix, coefficients: list[float]) -> list[float]:
    """|x_i - sum(a_k x_k)| of each i; a square that is all rounding, so a billionth of its terms, is 0."""
    with_sum = [math.fsum(map(mul, row, coefficients)) for row in gram]
    square_of_sum = math.fsum(map(mul, coefficients, with_sum))
    distances = []
    for index, product in enumerate(with_sum):
        square, rounding = (
            gram[index][index] - 2.0 * product + square_of_sum,
            gram[index][index] + square_of_sum,
        )
        distances.append(math.sqrt(square) if square > 1e-9 * abs(rounding) else 0.0)
    return distances


def _clip(length: float, limit: float) -> float:
    return 1.0 if length <= limit else limit / length


def _lower_median(values: list[float]) -> float:
    """Of an even number the lower of the middle two: a liar among two does not move it upwards. Of none 0."""
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0


# Whole contributions: screening.

_Products = dict[tuple[int, int], float]  # inner products by pair of contributors, both ways round


def _unusable(norm: float) -> str:
    return "" if 0.0 <= norm <= MAX_NORM else f"norm {norm:.3g} is no length of a delta"


def _suspects(
    screening: str, usable: list[int], norms: Sequence[float], products: _Products
) -> Iterator[tuple[int, str]]:
    """Who is left out, and why; never half of them: floor((n - 1) / 2) at most, the clearest cases first."""
    left, allowed = list(usable), (len(usable) - 1) // 2
    tests: list[Callable[[list[int], int], list[tuple[int, str]]]] = []
    if screening in ("norm", "norm_cosine"):
        tests.append(lambda members, _: _too_long(members, norms))
    if screening in ("cosine", "norm_cosine"):
        tests.append(lambda members, limit: _too_alike(_Cosines(members, products), limit))
        tests.append(lambda members, _: _against_the_others(_Cosines(members, products)))
    for test in tests:
        found = test(left, allowed)[:allowed]
        allowed -= len(found)
        left = [index for index in left if index not in dict(found)]
        yield from found


def _too_long(members: list[int], norms: Sequence[float]) -> list[tuple[int, str]]:
    """Longer than three median norms; the longest first."""
    limit = TOO_LONG * _lower_median([norms[index] for index in members if norms[index] > 0])
    found = sorted((index for index in members if norms[index] > limit), key=lambda index: -norms[index])
    return [(index, f"norm {norms[index]:.3g}, over {TOO_LONG:g} times the median") for index in found]


class _Cosines:
    """Cosines between contributions; those of length 0 have no direction and are left aside."""

    def __init__(self, members: list[int], products: _Products) -> None:
        self.members = [index for index in members if products[index, index] > 0]
        self._products = products

    def of(self, first: int, second: int) -> float:
        lengths = math.sqrt(self._products[first, first]) * math.sqrt(self._products[second, second])
        return max(-1.0, min(1.0, self._products[first, second] / lengths))

    def pairs(self) -> dict[tuple[int, int], float]:
        return {pair: self.of(*pair) for pair in itertools.combinations(self.members, 2)}

    def to_the_others(self) -> dict[int, float]:
        """The median of each one's cosines to the others, of an even number the upper of the middle two."""
        return {
            index: -_lower_median([-self.of(index, other) for other in self.members if other != index])
            for index in self.members
        }


def _too_alike(cosines: _Cosines, limit: int) -> list[tuple[int, str]]:
    """Pairs far more alike than the rest: those who send one delta under several names.

    "A little is enough" (Baruch et al. 2019) hides within the spread of the honest, so neither norm nor
    direction tells it; but its senders send the same vector, where deltas of different tasks have cosines
    of 0.01 to 0.03. A pair is too alike beyond all of: 0.8; halfway from the median pair to 1; 6 robust
    standard deviations above the median pair. So in a swarm whose deltas are all alike nobody is. Both are
    left out, as nobody knows which of them is the copy: two who train on the same data with the same seed
    are, too. More than `limit` of them are no small clique, and nothing is done. Not caught: a clique that
    adds enough noise of each member's own.
    """
    pairs = cosines.pairs()
    if not pairs:
        return []
    middle, spread = _middle_and_spread(list(pairs.values()))
    bound = max(TOO_ALIKE, (1.0 + middle) / 2.0, middle + 6.0 * spread)
    closest: dict[int, float] = {}
    for pair, cosine in pairs.items():
        if cosine > bound:
            closest.update({index: max(cosine, closest.get(index, -1.0)) for index in pair})
    if len(closest) > limit:
        return []
    why = "cosine {:.3f} to another, the median pair has {:.3f}"
    return [(index, why.format(closest[index], middle)) for index in sorted(closest)]


def _against_the_others(cosines: _Cosines) -> list[tuple[int, str]]:
    """Whose median cosine to the others is too low; the lowest first.

    Too low: under -0.05, and 2 robust standard deviations below the swarm's. The second alone would take
    honest peers where most are very alike, the first where honest deltas oppose each other. Bounds relative
    to the swarm's left honest ones out for -0.005 (docs/experiments.md): deltas of different tasks have
    0.01 to 0.03 after long training, and 0.00 +- 0.01 after little. So noise (0.0000 +- 0.0002 for 22.7M
    values) and flipped deltas of a swarm that is nearly orthogonal pass: they are as long as others, and a
    mean divides them by n; what is sent to undo the others' mean has -1 / sqrt(n) of it, and more than that
    where all are alike. Medians, not the cosine to the sum of the others, which measured worse: two liars
    of seven turn so much of the sum that the honest spread as far as the liars lie below.
    """
    towards = cosines.to_the_others()
    if not towards:
        return []
    middle, spread = _middle_and_spread(list(towards.values()))
    bound = min(OPPOSED, middle - 2.0 * spread)
    found = sorted((index for index in towards if towards[index] < bound), key=lambda index: towards[index])
    why = "median cosine {:.3f} to the others, the swarm's is {:.3f}"
    return [(index, why.format(towards[index], middle)) for index in found]


def _middle_and_spread(values: list[float]) -> tuple[float, float]:
    """Median, and standard deviation as the median absolute deviation tells it: half may be anything."""
    middle = _lower_median(values)
    return middle, _STANDARD_DEVIATIONS * _lower_median([abs(value - middle) for value in values])


def _products(gram: _Array | None, members: list[int]) -> _Products:
    if gram is None:
        raise ValueError("this rule or screening needs the Gram matrix")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) <= max(members, default=-1):
        raise ValueError(f"the Gram matrix has shape {gram.shape}")
    lower = {(i, j): float(gram[i, j]) for i in members for j in members if j <= i}
    if not all(abs(value) <= 1.01 * MAX_NORM**2 for value in lower.values()):  # a NaN is not, either
        raise ValueError("the Gram matrix holds values that no usable contributions have")
    return lower | {(j, i): value for (i, j), value in lower.items()}


def _rows(products: _Products, kept: list[int]) -> _Matrix:
    return [[products[i, j] for j in kept] for i in kept] if products else []


def _kept(reasons: list[str]) -> list[int]:
    return [index for index, reason in enumerate(reasons) if not reason]


def _check_whole(rule: str, screening: str, weights: Sequence[float], norms: Sequence[float]) -> None:
    if rule not in ("mean", "clipped_mean", "trimmed_mean", "median", "disjoint_mean", "centered_clipping"):
        raise ValueError(f"unknown rule {rule!r}")
    if screening not in ("none", "norm", "cosine", "norm_cosine"):
        raise ValueError(f"unknown screening {screening!r}")
    if len(norms) != len(weights):
        raise ValueError(f"{len(norms)} norms and {len(weights)} weights: one of each per peer")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError("weights must be positive and finite")


def _check(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"{len(parts)} parts and {len(weights)} weights: one weight per peer, at least one peer"
        )
    if any(part.shape != parts[0].shape or part.dtype != torch.float32 or part.dim() != 1 for part in parts):
        raise ValueError("parts must be float32 vectors of one shape")
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
        raise ValueError("weights must be finite, and none negative")
