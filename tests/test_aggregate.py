"""Are the rules what their papers say, to the last bit the same for whoever recomputes them?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.aggregate import RULES, median, trimmed_mean, weighted_mean


def vectors(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def test_weighted_mean_by_hand() -> None:
    parts = vectors([1.0, 2.0], [3.0, -2.0], [8.0, 0.0])
    assert weighted_mean(parts, [1.0, 1.0, 1.0]).tolist() == [4.0, 0.0]
    assert weighted_mean(parts, [2.0, 2.0, 2.0]).tolist() == [4.0, 0.0]
    assert weighted_mean(parts, [1.0, 1.0, 2.0]).tolist() == [5.0, 0.0]  # (1 + 3 + 16) / 4
    assert weighted_mean(parts[:1], [0.3]).tolist() == [1.0, 2.0]


def test_trimmed_mean_by_hand() -> None:
    """Of five, one at each end is cut: the liar's 1e30 and -1e30 cost nothing."""
    parts = vectors([1.0, 5.0], [2.0, 4.0], [3.0, 3.0], [4.0, 1e30], [1e30, -1e30])
    assert trimmed_mean(parts, [1.0] * 5).tolist() == [3.0, 4.0]
    assert trimmed_mean(parts[:4], [1.0] * 4)[0].item() == 2.5  # four: nothing is cut
    assert trimmed_mean(parts, [4.0, 1.0, 1.0, 1.0, 1.0]).tolist() == [3.0, 4.0]  # weights do not count


def test_median_by_hand() -> None:
    parts = vectors([1.0, 5.0], [2.0, 4.0], [1e30, -1e30])
    assert median(parts, [1.0] * 3).tolist() == [2.0, 4.0]
    assert median(parts[:2], [1.0] * 2).tolist() == [1.5, 4.5]
    assert median(parts[:1], [1.0]).tolist() == [1.0, 5.0]


def reference_mean(values: np.ndarray, weights: list[float]) -> np.ndarray:
    return np.average(values, axis=0, weights=weights)


def reference_trimmed(values: np.ndarray, _weights: list[float]) -> np.ndarray:
    cut = len(values) // 5
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def reference_median(values: np.ndarray, _weights: list[float]) -> np.ndarray:
    return np.median(values, axis=0)


REFERENCES = {"mean": reference_mean, "trimmed_mean": reference_trimmed, "median": reference_median}


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("num_peers", [1, 2, 3, 5, 8, 11])
def test_against_float64(rule: str, num_peers: int) -> None:
    """Within half a unit in the last place per operation: three per peer."""
    generator = torch.Generator().manual_seed(num_peers)
    parts = [torch.randn(1000, generator=generator) for _ in range(num_peers)]
    weights = [0.5 + 0.25 * index for index in range(num_peers)]
    values = torch.stack(parts).double().numpy()
    expected = REFERENCES[rule](values, weights)
    result = RULES[rule](parts, weights).double().numpy()
    bound = 3 * num_peers * 2.0**-24 * np.abs(values).max(axis=0)
    assert np.all(np.abs(result - expected) <= bound)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_recomputed_slice_has_the_same_bits(rule: str) -> None:
    """An auditor has a part of it, at another address: alignment and vector width must not matter."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4097, generator=generator) for _ in range(5)]
    weights = [1.0, 0.3, 2.0, 4.0, 0.01]
    whole = RULES[rule](parts, weights)
    for start, stop in [(0, 4097), (1, 4097), (3, 20), (4096, 4097)]:
        again = RULES[rule]([part[start:stop].clone() for part in parts], weights)
        assert again.numpy().tobytes() == whole[start:stop].numpy().tobytes()


def test_the_mean_is_a_separate_multiply_and_add_in_order() -> None:
    """Pinned to numpy's float32, which rounds after each of the two; `torch.add(alpha=)` may not."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(10_000, generator=generator) for _ in range(3)]
    weights = [0.7, 1.1, 3.3]
    total: np.ndarray = parts[0].numpy() * np.float32(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part.numpy() * np.float32(weight)
    total = total / np.float32(math.fsum(weights))
    assert weighted_mean(parts, weights).numpy().tobytes() == total.tobytes()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_inputs_are_left_alone(rule: str) -> None:
    parts = vectors([1.0, 2.0], [3.0, 4.0])
    result = RULES[rule](parts, [1.0, 1.0])
    result.add_(1.0)
    assert [part.tolist() for part in parts] == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        ([], []),
        (vectors([1.0], [2.0]), [1.0]),
        (vectors([1.0], [2.0, 3.0]), [1.0, 1.0]),
        ([torch.zeros(1, dtype=torch.float64)], [1.0]),
        (vectors([1.0]), [0.0]),
        (vectors([1.0]), [-1.0]),
        (vectors([1.0]), [math.inf]),
        (vectors([1.0]), [math.nan]),
    ],
)
def test_wrong_input(rule: str, parts: list[torch.Tensor], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|float32"):
        RULES[rule](parts, weights)


ROWS = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=7)


@given(ROWS, st.sampled_from([weighted_mean, trimmed_mean, median]))
def test_every_rule_stays_between_smallest_and_largest(
    rows: list[list[float]], rule: Callable[..., torch.Tensor]
) -> None:
    parts = vectors(*rows)
    result, stacked = rule(parts, [1.0] * len(parts)), torch.stack(parts)
    slack = 1e-5 * stacked.abs().max() + 1e-30
    assert bool((result >= stacked.amin(dim=0) - slack).all())
    assert bool((result <= stacked.amax(dim=0) + slack).all())
