"""Are the rules what their papers say, to the last bit the same for whoever recomputes them?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.aggregate import MAX_NORM, combine, make_plan, needs_gram

ALL_RULES = ["mean", "clipped_mean", "trimmed_mean", "median", "disjoint_mean", "centered_clipping"]
ROBUST = ["trimmed_mean", "median"]  # per coordinate
SCREENINGS = ["none", "norm", "cosine", "norm_cosine"]


def vectors(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def gram_of(parts: Sequence[torch.Tensor]) -> np.ndarray:
    stacked = torch.stack(list(parts)).double().numpy()
    return stacked @ stacked.T


def norms_of(parts: Sequence[torch.Tensor]) -> list[float]:
    return [float(part.double().norm()) for part in parts]


def fuse(
    rule: str, parts: Sequence[torch.Tensor], weights: Sequence[float] | None = None, screening: str = "none"
) -> torch.Tensor:
    """Both phases, with contributions of one part."""
    shares = [1.0] * len(parts) if weights is None else weights
    plan = make_plan(rule, screening, shares, norms_of(parts), gram_of(parts))
    return combine(rule, parts, plan.weights)


# One part.


def test_mean_by_hand() -> None:
    parts = vectors([1.0, 2.0], [3.0, -2.0], [8.0, 0.0])
    assert combine("mean", parts, [1.0, 1.0, 1.0]).tolist() == [4.0, 0.0]
    assert combine("mean", parts, [2.0, 2.0, 2.0]).tolist() == [4.0, 0.0]
    assert combine("mean", parts, [1.0, 1.0, 2.0]).tolist() == [5.0, 0.0]  # (1 + 3 + 16) / 4
    assert combine("mean", parts, [1.0, 1.0, 0.0]).tolist() == [2.0, 0.0]  # the third is left out
    assert combine("mean", parts[:1], [0.3]).tolist() == [1.0, 2.0]


def test_trimmed_mean_by_hand() -> None:
    """Of five, one at each end is cut: the liar's 1e30 and -1e30 cost nothing."""
    parts = vectors([1.0, 5.0], [2.0, 4.0], [3.0, 3.0], [4.0, 1e30], [1e30, -1e30])
    assert combine("trimmed_mean", parts, [1.0] * 5).tolist() == [3.0, 4.0]
    assert combine("trimmed_mean", parts[:3], [1.0] * 3).tolist() == [2.0, 4.0]  # three: nothing is cut
    assert combine("trimmed_mean", parts, [4.0, 1.0, 1.0, 1.0, 1.0]).tolist() == [3.0, 4.0]  # no weights
    assert combine("trimmed_mean", parts, [1.0, 1.0, 1.0, 1.0, 0.0])[0].item() == 2.5  # four: one is cut


def test_two_of_eight_liars_are_trimmed() -> None:
    parts = vectors(*([float(value)] for value in (1, 2, 3, 4, 5, 6)), [1e30], [1e30])
    assert combine("trimmed_mean", parts, [1.0] * 8).tolist() == [4.5]  # 3, 4, 5, 6


def test_median_by_hand() -> None:
    parts = vectors([1.0, 5.0], [2.0, 4.0], [1e30, -1e30])
    assert combine("median", parts, [1.0] * 3).tolist() == [2.0, 4.0]
    assert combine("median", parts, [1.0, 9.0, 0.0]).tolist() == [1.5, 4.5]
    assert combine("median", parts[:1], [1.0]).tolist() == [1.0, 5.0]


def test_disjoint_mean_by_hand() -> None:
    """The sums are 2, -1, 0, 3: who points the other way, or nowhere, is not in the mean."""
    parts = vectors([4.0, -3.0, 1.0, 0.0], [2.0, -1.0, -1.0, 0.0], [-4.0, 3.0, 0.0, 3.0])
    assert combine("disjoint_mean", parts, [1.0] * 3).tolist() == [3.0, -2.0, 0.0, 3.0]
    assert combine("disjoint_mean", parts, [1.0, 9.0, 0.0]).tolist() == [3.0, -2.0, 0.0, 0.0]  # no weights
    assert not np.signbit(combine("disjoint_mean", vectors([-0.0]), [1.0]).numpy()).any()


@pytest.mark.parametrize("rule", ALL_RULES)
def test_where_nobody_counts_the_result_is_zero(rule: str) -> None:
    assert combine(rule, vectors([1.0, 2.0], [3.0, 4.0]), [0.0, 0.0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_peers", range(1, 14))
def test_ranks_of_any_number_of_peers(num_peers: int) -> None:
    """All vectors of zeros and ones: a network that sorts these sorts all (Knuth, 5.3.4, theorem Z)."""
    rows = torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_peers))).T.contiguous()
    expected = np.median(rows.numpy(), axis=0)
    assert combine("median", list(rows), [1.0] * num_peers).tolist() == expected.tolist()
    cut = num_peers // 4
    kept = np.sort(rows.numpy(), axis=0)[cut : num_peers - cut]
    trimmed = kept.sum(axis=0) / np.float32(len(kept))
    assert combine("trimmed_mean", list(rows), [1.0] * num_peers).tolist() == trimmed.tolist()


def reference(rule: str, values: np.ndarray, weights: list[float]) -> np.ndarray:
    if rule == "mean":
        return np.average(values, axis=0, weights=weights)
    if rule == "trimmed_mean":
        cut = len(values) // 4
        return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)
    if rule == "median":
        return np.median(values, axis=0)
    if rule == "disjoint_mean":
        agrees = values * values.sum(axis=0) > 0
        return (values * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1)
    if rule == "clipped_mean":
        norms = np.linalg.norm(values, axis=1)
        clips = np.minimum(1.0, np.sort(norms)[(len(norms) - 1) // 2] / norms)
        return np.average(values * clips[:, None], axis=0, weights=weights)
    return reference_centered_clipping(values)


def reference_centered_clipping(values: np.ndarray) -> np.ndarray:
    """The paper's recursion on the vectors themselves."""
    centre = np.zeros(values.shape[1])
    for _ in range(5):
        away = np.linalg.norm(values - centre, axis=1)
        tau = np.sort(away)[(len(away) - 1) // 2]
        clips = np.where(away > tau, tau / np.maximum(away, 1e-300), 1.0)
        centre = centre + ((values - centre) * clips[:, None]).sum(axis=0) / len(values)
    return centre


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("num_peers", [1, 2, 3, 5, 8, 11])
def test_against_float64(rule: str, num_peers: int) -> None:
    """Within half a unit in the last place per operation: three per peer."""
    generator = torch.Generator().manual_seed(num_peers)
    parts = [torch.randn(1000, generator=generator) * (1 + i % 3) for i in range(num_peers)]
    weights = [0.5 + 0.25 * index for index in range(num_peers)]
    values = torch.stack(parts).double().numpy()
    result = fuse(rule, parts, weights).double().numpy()
    bound = 3 * num_peers * 2.0**-24 * np.abs(values).max(axis=0)
    assert np.all(np.abs(result - reference(rule, values, weights)) <= bound)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_recomputed_part_has_the_same_bits(rule: str) -> None:
    """An auditor has a part of it, at another address: alignment and vector width must not matter."""
    generator = torch.Generator().manual_seed(0)
    size = 40_000  # more than is sorted at once
    parts = [torch.randn(size, generator=generator) for _ in range(5)]
    weights = [1.0, 0.3, 2.0, 4.0, 0.01]
    whole = combine(rule, parts, weights)
    assert combine(rule, parts, weights).numpy().tobytes() == whole.numpy().tobytes()
    for start, stop in [(1, size), (3, 20), (32_767, 32_769), (size - 1, size)]:
        again = combine(rule, [part[start:stop].clone() for part in parts], weights)
        assert again.numpy().tobytes() == whole[start:stop].numpy().tobytes()


@pytest.mark.parametrize("rule", ROBUST)
def test_the_order_of_the_group_does_not_change_a_bit_of_ranks(rule: str) -> None:
    """Also where -0 meets +0: they are equal, so a minimum of them may be either."""
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randint(-1, 2, (100,), generator=generator) * torch.randn(100) for _ in range(6)]
    parts[0][:50], parts[1][:50], parts[2][:50], parts[3][:50] = 0.0, -0.0, 0.0, -0.0
    first = combine(rule, parts, [1.0] * 6).numpy().tobytes()
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        assert combine(rule, [parts[i] for i in order], [1.0] * 6).numpy().tobytes() == first
    assert not np.signbit(combine(rule, vectors([-0.0]), [1.0]).numpy()).any()


@pytest.mark.parametrize("rule", ["mean", "clipped_mean", "centered_clipping"])
def test_the_order_of_the_group_changes_sums_by_rounding_only(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(100, generator=generator) * (1 + i) for i in range(6)]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    first = fuse(rule, parts, weights)
    for order in [(5, 4, 3, 2, 1, 0), (2, 0, 4, 1, 5, 3)]:
        again = fuse(rule, [parts[i] for i in order], [weights[i] for i in order])
        assert torch.allclose(again, first, rtol=0.0, atol=1e-6)


def test_the_mean_is_a_separate_multiply_and_add_in_order() -> None:
    """Pinned to float64, rounded to float32 after each of the two; `torch.add(alpha=)` may not be."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(500, generator=generator) for _ in range(3)]
    weights = [0.7, 1.1, 3.3]
    w = [float(np.float32(weight)) for weight in weights]
    divisor = float(np.float32(math.fsum(weights)))
    expected = []
    for a, b, c in zip(*(part.tolist() for part in parts), strict=True):
        total = float(np.float32(float(np.float32(a * w[0])) + float(np.float32(b * w[1]))))
        total = float(np.float32(total + float(np.float32(c * w[2]))))
        expected.append(float(np.float32(total / divisor)))
    assert combine("mean", parts, weights).tolist() == expected
    fused = parts[0].mul(weights[0]).add(parts[1], alpha=weights[1]).add(parts[2], alpha=weights[2])
    assert (fused / divisor).tolist() != expected  # so the test can tell


@pytest.mark.parametrize("rule", ALL_RULES)
def test_inputs_are_left_alone(rule: str) -> None:
    parts = vectors([1.0, 2.0], [3.0, 4.0])
    result = combine(rule, parts, [1.0, 1.0])
    result.add_(1.0)
    assert [part.tolist() for part in parts] == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        ([], []),
        (vectors([1.0], [2.0]), [1.0]),
        (vectors([1.0], [2.0, 3.0]), [1.0, 1.0]),
        ([torch.zeros(1, dtype=torch.float64)], [1.0]),
        ([torch.zeros(1, 1)], [1.0]),
        (vectors([1.0]), [-1.0]),
        (vectors([1.0]), [math.inf]),
        (vectors([1.0]), [math.nan]),
    ],
)
def test_wrong_parts(rule: str, parts: list[torch.Tensor], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|float32"):
        combine(rule, parts, weights)


ROWS = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=9)


@given(ROWS, st.sampled_from(ALL_RULES))
def test_every_rule_stays_between_smallest_and_largest_or_zero(rows: list[list[float]], rule: str) -> None:
    """Zero, too, for the clipping rules: they pull towards it."""
    parts = vectors(*rows)
    result, stacked = fuse(rule, parts), torch.stack(parts)
    slack = 1e-5 * stacked.abs().max() + 1e-30
    ends = torch.cat([stacked, torch.zeros(1, 3)]) if rule.startswith("c") else stacked
    assert bool((result >= ends.amin(dim=0) - slack).all())
    assert bool((result <= ends.amax(dim=0) + slack).all())


@given(
    st.lists(st.lists(st.floats(-1.0, 1.0, width=32), min_size=2, max_size=2), min_size=3, max_size=9),
    st.sampled_from([1e17, -1e17, 0.0]),
    st.randoms(use_true_random=False),
)
def test_a_quarter_of_liars_stays_within_the_honest(
    honest: list[list[float]], lie: float, random: np.random.Generator
) -> None:
    """The breakdown point: with n honest, n // 3 liars are at most a quarter of all."""
    lies = [[lie, -lie]] * (len(honest) // 3)
    rows = [*honest, *lies]
    random.shuffle(rows)
    low, high = np.min(honest, axis=0), np.max(honest, axis=0)
    for rule in ROBUST:
        result = fuse(rule, vectors(*rows)).numpy()
        assert np.all(result >= low - 1e-6)
        assert np.all(result <= high + 1e-6)


# Plans.


def test_who_needs_the_gram_matrix() -> None:
    needing = {(r, s) for r in ALL_RULES for s in SCREENINGS if needs_gram(r, s)}
    assert {(r, s) for r, s in needing if r != "centered_clipping"} == {
        (r, s) for r in ALL_RULES if r != "centered_clipping" for s in ("cosine", "norm_cosine")
    }
    assert {s for r, s in needing if r == "centered_clipping"} == set(SCREENINGS)


def test_the_plan_of_plain_rules_is_their_weights() -> None:
    for rule in ("mean", *ROBUST):
        plan = make_plan(rule, "none", [1.0, 0.5], [3.0, 1e6], None)
        assert (plan.weights, plan.factors, plan.reasons) == ((1.0, 0.5), (1.0, 1.0), ("", ""))


def test_clipping_to_the_median_norm_by_hand() -> None:
    """Norms 1, 2, 8: the third is cut to a quarter. Sum of weights 4."""
    plan = make_plan("clipped_mean", "none", [1.0, 1.0, 2.0], [1.0, 2.0, 8.0], None)
    assert plan.factors == (1.0, 1.0, 0.25)
    assert plan.weights == (0.25, 0.25, 0.125)
    result = combine("clipped_mean", vectors([1.0, 0.0], [0.0, 2.0], [8.0, 0.0]), plan.weights)
    assert result.tolist() == [1.25, 0.5]  # (1 + 2 x 2) / 4, 2 / 4
    assert combine("clipped_mean", vectors([1.0, 0.0]), plan.weights[:1]).tolist() == [0.25, 0.0]


@pytest.mark.parametrize(
    ("norms", "factors"),
    [
        ([5.0], (1.0,)),
        ([0.0], (1.0,)),
        ([2.0, 8.0], (1.0, 0.25)),  # of two, the longer is cut to the shorter
        ([0.0, 8.0], (1.0, 1.0)),  # who had no time has no say
        ([0.0, 0.0, 4.0, 16.0], (1.0, 1.0, 1.0, 0.25)),
        ([1.0, 2.0, 4.0, 8.0], (1.0, 1.0, 0.5, 0.25)),
    ],
)
def test_factors_of_clipping(norms: list[float], factors: tuple[float, ...]) -> None:
    assert make_plan("clipped_mean", "none", [1.0] * len(norms), norms, None).factors == factors


def test_centered_clipping_by_hand() -> None:
    """On a line: 1, 1, 4. The first step, with tau 1, reaches v = 1 by (1/3, 1/3, 1/12). There tau is 0.

    So v stays, while the coefficients shrink by 1 - 2/3 and gain (1/3, 1/3, 0), four times: that makes
    1/2 - 1/6 x 1/81 twice, and 1/12 x 1/81.
    """
    parts = vectors([1.0], [1.0], [4.0])
    plan = make_plan("centered_clipping", "none", [1.0] * 3, norms_of(parts), gram_of(parts))
    assert plan.weights == pytest.approx((1 / 2 - 1 / 486, 1 / 2 - 1 / 486, 1 / 972))
    assert plan.factors == (1.0, 1.0, 0.0)
    assert combine("centered_clipping", parts, plan.weights).item() == pytest.approx(1.0)


def test_centered_clipping_of_one_and_of_two() -> None:
    assert fuse("centered_clipping", vectors([3.0, 4.0])).tolist() == [3.0, 4.0]
    assert fuse("centered_clipping", vectors([3.0], [3.0])).tolist() == [3.0]
    assert fuse("centered_clipping", vectors([0.0], [0.0])).tolist() == [0.0]
    # 1 and -1: v = 0, and stays there
    assert fuse("centered_clipping", vectors([1.0], [-1.0])).tolist() == [0.0]


@pytest.mark.parametrize("rule", ["clipped_mean", "centered_clipping"])
def test_a_liar_moves_clipping_rules_by_a_bounded_length(rule: str) -> None:
    """Two of eight at a million times the length: within two honest lengths of the honest mean."""
    generator = torch.Generator().manual_seed(4)
    honest = [torch.randn(1000, generator=generator) for _ in range(6)]
    lies = [1e6 * torch.randn(1000, generator=generator) for _ in range(2)]
    away = fuse(rule, honest + lies) - torch.stack(honest).mean(dim=0)
    assert float(away.norm()) < 2 / 8 * 1.1 * float(honest[0].norm()) * 2
    plain = fuse("mean", honest + lies) - torch.stack(honest).mean(dim=0)
    assert float(plain.norm()) > 1e5 * float(honest[0].norm())  # the mean has no bound


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0, 2 * MAX_NORM])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_norm_that_is_no_length_leaves_its_sender_out(rule: str, norm: float) -> None:
    gram = np.diag([1.0, math.nan, 1.0])
    plan = make_plan(rule, "none", [1.0] * 3, [1.0, norm, 1.0], gram if rule == "centered_clipping" else None)
    assert plan.weights[1] == plan.factors[1] == 0.0
    assert "no length" in plan.reasons[1]
    assert min(plan.weights[0], plan.weights[2]) > 0
    nobody = make_plan(rule, "none", [1.0], [norm], gram[:1, :1])
    assert nobody.weights == nobody.factors == (0.0,)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_a_plan_for_nobody(rule: str, screening: str) -> None:
    assert make_plan(rule, screening, [], [], np.zeros((0, 0))).weights == ()


@pytest.mark.parametrize(
    ("rule", "screening", "weights", "gram"),
    [
        ("average", "none", [1.0, 1.0], None),
        ("mean", "smell", [1.0, 1.0], None),
        ("mean", "none", [1.0], None),
        ("mean", "none", [1.0, 0.0], None),
        ("mean", "none", [1.0, math.nan], None),
        ("mean", "cosine", [1.0, 1.0], None),
        ("mean", "cosine", [1.0, 1.0], np.zeros((1, 1))),
        ("mean", "cosine", [1.0, 1.0], np.zeros((2, 3))),
        ("mean", "cosine", [1.0, 1.0], np.full((2, 2), math.nan)),
        ("mean", "cosine", [1.0, 1.0], np.full((2, 2), 1e300)),
    ],
)
def test_wrong_figures(rule: str, screening: str, weights: list[float], gram: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match=r"unknown|weights|Gram"):
        make_plan(rule, screening, weights, [1.0, 1.0], gram)


# Screening.


def left_out(screening: str, norms: list[float], gram: np.ndarray | None = None) -> list[int]:
    plan = make_plan("mean", screening, [1.0] * len(norms), norms, gram)
    assert [weight == 0 for weight in plan.weights] == [bool(reason) for reason in plan.reasons]
    assert all(len(reason) <= 200 for reason in plan.reasons)
    return [index for index, reason in enumerate(plan.reasons) if reason]


def test_screening_by_norm() -> None:
    assert left_out("norm", [1.0, 1.0, 2.9, 3.1, 1.0]) == [3]
    assert left_out("norm", [1.0, 1.2, 0.9, 100.0, 1.1, 100.0, 1.0, 0.8]) == [3, 5]
    assert left_out("norm", [0.0, 0.0, 0.0, 1.0, 1.2]) == []  # the median is of those who did something
    assert left_out("norm", [1.0, 100.0]) == []  # of two, nobody knows which is wrong
    assert left_out("norm", [1.0, 1.0, 100.0, 50.0]) == [2]  # never half: the longest
    assert left_out("none", [1.0, 1.0, 100.0]) == []


def cosine_gram(num_peers: int, cosines: dict[tuple[int, int], float], rest: float = 0.02) -> np.ndarray:
    gram = np.full((num_peers, num_peers), rest)
    for (i, j), cosine in cosines.items():
        gram[i, j] = gram[j, i] = cosine
    np.fill_diagonal(gram, 1.0)
    return gram


def flipped(gram: np.ndarray, *indices: int) -> np.ndarray:
    signs = np.ones(len(gram))
    signs[list(indices)] = -1.0
    return gram * np.outer(signs, signs)


def scaled(gram: np.ndarray, index: int, factor: float) -> np.ndarray:
    lengths = np.ones(len(gram))
    lengths[index] = factor
    return gram * np.outer(lengths, lengths)


def varied(num_peers: int, seed: int, lowest: float = 0.01, highest: float = 0.03) -> np.ndarray:
    """Honest deltas of different tasks as measured: cosines of 0.01 to 0.03."""
    random = np.random.default_rng(seed)
    upper = {pair: random.uniform(lowest, highest) for pair in itertools.combinations(range(num_peers), 2)}
    return cosine_gram(num_peers, upper)


@pytest.mark.parametrize("num_peers", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("seed", range(5))
def test_the_honest_stay(num_peers: int, seed: int) -> None:
    alike, orthogonal = cosine_gram(num_peers, {}, rest=0.9), varied(num_peers, seed, -0.01, 0.01)
    for gram in (cosine_gram(num_peers, {}), varied(num_peers, seed), alike, orthogonal):
        assert left_out("cosine", [1.0] * num_peers, gram) == []


@pytest.mark.parametrize("seed", range(10))
def test_two_of_eight_sign_flipped(seed: int) -> None:
    related = varied(8, seed, 0.1, 0.3)
    assert left_out("cosine", [1.0] * 8, flipped(related, 2, 5)) == [2, 5]
    assert left_out("cosine", [1.0] * 7 + [100.0], scaled(flipped(related, 2, 7), 7, 100.0)) == [2, 7]


def test_one_of_three_and_two_of_five_sign_flipped() -> None:
    assert left_out("cosine", [1.0] * 3, flipped(cosine_gram(3, {}, rest=0.2), 1)) == [1]
    assert left_out("cosine", [1.0] * 5, flipped(varied(5, 0, 0.1, 0.3), 0, 4)) == [0, 4]


def test_a_direction_is_against_the_others_only_below_an_absolute_bound() -> None:
    """Of four, the last has the same cosine c to all others, who have 0.02 with each other.

    Medians to the others: 0.02, 0.02, 0.02 and c; the swarm's is 0.02, its spread 0. So c decides: the bound
    is the lower one of -0.05 and 0.02 - 2 x 0.
    """
    for cosine, expected in ((0.0, []), (-0.005, []), (-0.03, []), (-0.05, []), (-0.051, [3]), (-0.4, [3])):
        assert (
            left_out("cosine", [1.0] * 4, cosine_gram(4, dict.fromkeys([(0, 3), (1, 3), (2, 3)], cosine)))
            == expected
        )


def test_opposed_honest_ones_stay() -> None:
    """Medians to the others: 0.1, 0.1, -0.1, -0.1; the lower middle one is -0.1, and nobody is below it."""
    cosines = {(0, 1): 0.1, (0, 2): 0.1, (0, 3): -0.1, (1, 2): -0.1, (1, 3): 0.1, (2, 3): -0.1}
    assert left_out("cosine", [1.0] * 4, cosine_gram(4, cosines)) == []


def test_who_undoes_the_mean_of_orthogonal_deltas_is_left_out() -> None:
    """Six of length 1 with cosines 0; minus their mean has -1/6 / (1 / sqrt(6)) = -0.41 to each of them."""
    against = {(index, 6): -1 / math.sqrt(6) for index in range(6)}
    assert left_out("cosine", [1.0] * 7, cosine_gram(7, against, rest=0.0)) == [6]


def with_noise(gram: np.ndarray, seed: int, *indices: int) -> np.ndarray:
    """Of 22.7M values, noise has cosines of about 1 / sqrt(22.7M) = 0.0002 to anything."""
    random = np.random.default_rng(seed)
    for index in indices:
        gram[index, :] = gram[:, index] = random.normal(0.0, 2e-4, len(gram))
        gram[index, index] = 1.0
    return gram


@pytest.mark.parametrize("seed", range(10))
def test_noise_points_nowhere_and_costs_no_honest_peer_its_place(seed: int) -> None:
    """It is not told from the honest of a swarm that is nearly orthogonal; the rules bound its length."""
    assert left_out("cosine", [1.0] * 8, with_noise(varied(8, seed), seed, 1, 6)) == []
    assert left_out("cosine", [1.0] * 8, with_noise(varied(8, seed, -0.01, 0.01), seed, 1, 6)) == []


def test_colluders_who_send_the_same() -> None:
    """ "A little is enough": along with the honest, at their length, but twice the same."""
    for cosine in (0.02, 0.1, 0.3):
        colluders = {(3, 4): 1.0, **{(i, j): cosine for i in (0, 1, 2, 5, 6, 7) for j in (3, 4)}}
        gram = cosine_gram(8, colluders)
        assert left_out("cosine", [1.0] * 8, gram) == [3, 4]
        assert left_out("norm", [1.0] * 8) == []
    assert "cosine 1.000" in make_plan("mean", "cosine", [1.0] * 8, [1.0] * 8, gram).reasons[3]


def test_alike_ones_stay_where_all_are_alike_or_where_they_are_many() -> None:
    assert left_out("cosine", [1.0] * 8, cosine_gram(8, {(3, 4): 0.85}, rest=0.75)) == []
    four = dict.fromkeys(itertools.combinations(range(4), 2), 0.95)
    assert left_out("cosine", [1.0] * 8, cosine_gram(8, four)) == []
    assert left_out("cosine", [1.0] * 9, cosine_gram(9, four)) == [0, 1, 2, 3]
    assert left_out("cosine", [1.0] * 8, cosine_gram(8, {(3, 4): 0.5})) == []  # two with the same task


def test_both_screenings_and_never_half() -> None:
    gram = scaled(flipped(varied(8, 0, 0.1, 0.3), 1, 5), 7, 50.0)
    norms = [1.0] * 7 + [50.0]
    assert left_out("norm_cosine", norms, gram) == [1, 5, 7]
    assert left_out("norm", norms) == [7]
    assert len(left_out("norm_cosine", norms, flipped(gram, 0, 2))) <= 3


def test_a_delta_of_zero_is_not_suspicious() -> None:
    gram = scaled(varied(8, 1), 3, 0.0)
    norms = [1.0] * 8
    norms[3] = 0.0
    assert left_out("norm_cosine", norms, gram) == []
    assert left_out("norm_cosine", [0.0] * 3, np.zeros((3, 3))) == []


@given(st.integers(1, 6), st.data())
def test_plans_of_any_figures_are_in_bounds_and_repeatable(num_peers: int, data: st.DataObject) -> None:
    """Also of matrices that are no Gram matrices: a reducer may lie about its own."""
    figure = st.floats(-1e36, 1e36)
    gram = np.array(data.draw(st.lists(figure, min_size=num_peers**2, max_size=num_peers**2)))
    norms = data.draw(st.lists(st.floats(0.0, 1e18), min_size=num_peers, max_size=num_peers))
    rule, screening = data.draw(st.sampled_from(ALL_RULES)), data.draw(st.sampled_from(SCREENINGS))
    square = gram.reshape(num_peers, num_peers)
    plan = make_plan(rule, screening, [1.0] * num_peers, norms, square)
    assert plan == make_plan(rule, screening, [1.0] * num_peers, norms, square.T.copy().T)
    assert all(0.0 <= factor <= 1.0 for factor in plan.factors)
    assert all(0.0 <= weight <= 1.0 for weight in plan.weights)
    assert sum(bool(reason) for reason in plan.reasons) <= (num_peers - 1) // 2
