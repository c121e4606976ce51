"""Is one part reduced as the rules say, to the bit, and is every part refused that was not promised?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from peer.compression import CODECS
from peer.manifest import Outgoing, part_hash, prepare
from peer.parts import PartGrid
from peer.reduction import (
    BadPartError,
    checked_part,
    decoded,
    encode_result,
    figures_problem,
    gram_matrix,
    is_usable,
    plan_of,
    reduce_values,
    residual_hash,
    residual_hashes,
    squared_bound,
)
from tests.exchanges import forged
from tests.fakes import hash_of, identity

SIZE = 1500  # parts of 1024 and 476 values
GRID = PartGrid(SIZE)


def make_outgoing(codec: str = "fp32") -> Outgoing:
    delta = torch.linspace(-1.0, 1.0, SIZE)
    return prepare(
        delta, CODECS[codec], identity("a"), run=hash_of("run"), round=1, previous=hash_of("previous")
    )


def checked(outgoing: Outgoing, part: int, data: bytes) -> torch.Tensor:
    manifest = outgoing.manifest
    return checked_part(outgoing.codec, GRID, manifest, manifest.part_hashes()[part], part, data)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_as_promised(codec: str, part: int) -> None:
    outgoing = make_outgoing(codec)
    values = checked(outgoing, part, bytes(outgoing.parts[part]))
    assert values.tolist() == outgoing.decoded(part).tolist()


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_part_that_was_not_promised(codec: str) -> None:
    outgoing = make_outgoing(codec)
    data = bytes(outgoing.parts[0])
    with pytest.raises(BadPartError, match=r"part 1 has .* a wrong shape"):
        checked(outgoing, 1, data)
    with pytest.raises(BadPartError, match="a wrong shape"):
        checked(outgoing, 0, data + b"\0")
    for position in (0, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(BadPartError, match="not the one that its manifest names"):
            checked(outgoing, 0, bytes(changed))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_values_that_are_not_finite_or_too_large_whatever_the_manifest_says(value: float) -> None:
    """The square of 3e38 is beyond float32."""
    values = np.zeros(1024, "<f4")
    values[17] = value
    outgoing = forged(make_outgoing(), identity("a"), parts={0: values.tobytes()})
    with pytest.raises(BadPartError, match="not finite"):
        checked(outgoing, 0, values.tobytes())


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4", "topk"])
def test_a_part_that_cannot_be_decoded(codec: str) -> None:
    data = b"\xff" * len(make_outgoing(codec).parts[0])
    outgoing = forged(make_outgoing(codec), identity("a"), parts={0: data})
    with pytest.raises(BadPartError, match="part 0 cannot be decoded"):
        checked(outgoing, 0, data)


@pytest.mark.parametrize("factor", [0.0, 0.99, 1.01, 4.0])
def test_a_norm_that_is_not_what_the_manifest_says(factor: float) -> None:
    honest = make_outgoing()
    declared = honest.manifest.squared_norms[0] * factor
    outgoing = forged(honest, identity("a"), squared_norms={0: declared})
    with pytest.raises(BadPartError, match=r"has norm .* its manifest says"):
        checked(outgoing, 0, bytes(honest.parts[0]))
    assert checked(outgoing, 1, bytes(honest.parts[1])).numel() == 476


def test_what_arrives_in_a_buffer_is_not_copied() -> None:
    frame = bytearray(np.array([1.0, 2.0], "<f4").tobytes())
    values = decoded(CODECS["fp32"], frame, 2)
    frame[:4] = np.array([5.0], "<f4").tobytes()
    assert values.tolist() == [5.0, 2.0]


# Plans.


def test_a_plan_of_those_who_are_in() -> None:
    """The second gave no manifest: the median norm of 1 and 3 is the lower, so 3 is cut to a third."""
    plan = plan_of("clipped_mean", "none", [1.0, 5.0, 1.0], [1.0, None, 3.0], [])
    assert plan.weights == (0.5, 0.0, 1 / 3 / 2)
    assert plan.factors == (1.0, 0.0, 1 / 3)
    assert plan.reasons == ("", "", "")


def test_a_plan_from_the_figures_of_two_reducers() -> None:
    """Of contributions (3, 0), (3, 0) and (30, 0): centered clipping leaves a tenth of the third at first."""
    whole = np.outer([3.0, 3.0, 30.0], [3.0, 3.0, 30.0])
    norms = [3.0, 3.0, 30.0]
    plan = plan_of("centered_clipping", "none", [1.0] * 3, norms, [whole / 2, whole / 2])
    assert plan == plan_of("centered_clipping", "none", [1.0] * 3, norms, [whole])
    assert plan.factors[:2] == (1.0, 1.0)
    assert plan.factors[2] < 0.1
    fused = sum(weight * norm for weight, norm in zip(plan.weights, norms, strict=True))
    assert fused == pytest.approx(3.0, abs=0.3)


def test_who_is_incomplete_at_one_reducer_is_left_out() -> None:
    whole, partly = np.eye(3), np.eye(3)
    partly[1, :] = partly[:, 1] = math.nan
    plan = plan_of("centered_clipping", "none", [1.0] * 3, [1.0] * 3, [whole, partly])
    assert plan.weights[1] == plan.factors[1] == 0.0
    assert plan.weights[0] == plan.weights[2] > 0


@pytest.mark.parametrize(
    ("rule", "screening", "figures"),
    [
        ("nonsense", "none", []),
        ("mean", "nonsense", []),
        ("centered_clipping", "none", [np.eye(2) * 1e40]),
        ("centered_clipping", "none", [np.array([[1.0, 0.0], [math.nan, 1.0]])]),
        ("centered_clipping", "none", [np.eye(3)]),
    ],
)
def test_no_plan_follows_from_nonsense(rule: str, screening: str, figures: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"rule|screening|Gram|shape|broadcast"):
        plan_of(rule, screening, [1.0, 1.0], [1.0, 1.0], figures)


@pytest.mark.parametrize("size", [3, 16 * 1024, 40_000])
def test_gram_matrices(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = [torch.randn(size, generator=generator) for _ in range(4)]
    rows = torch.stack(values).double().numpy()
    gram = gram_matrix(values)
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-12, atol=1e-9)
    assert np.array_equal(gram, gram.T)
    assert figures_problem(gram, np.diagonal(gram).tolist()) == ""
    assert gram_matrix([]).shape == (0, 0)


def test_a_gram_matrix_by_hand() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    assert gram_matrix(values).tolist() == [[5.0, 1.0], [1.0, 10.0]]


def test_figures_that_cannot_be() -> None:
    figures = np.array([[4.0, 6.0, math.nan], [6.0, 9.0, math.nan], [math.nan] * 3])  # lengths 2 and 3
    assert figures_problem(figures, [4.0, 9.0, 1.0]) == ""
    assert figures_problem(figures, [None, 9.003, None]) == ""
    assert "contribution 1 has not the norm" in figures_problem(figures, [4.0, 9.1, 1.0])
    for row, column, value in ((0, 1, 6.1), (1, 0, -6.1), (0, 1, math.nan), (1, 0, math.inf)):
        changed = figures.copy()
        changed[row, column] = value
        assert "larger than the lengths" in figures_problem(changed, [4.0, 9.0, 1.0])
    figures[0, 0] = -4.0
    assert "negative" in figures_problem(figures, [None] * 3)
    assert figures_problem(np.zeros((2, 2)), [0.0, 0.0]) == ""


# Results.


def test_a_part_that_nobody_gave_is_zero() -> None:
    assert reduce_values("mean", [], [], 3).tolist() == [0.0, 0.0, 0.0]
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    assert reduce_values("mean", values, [1.0, 3.0], 2).tolist() == [2.5, 5.0]


def test_a_lossless_result_leaves_nothing() -> None:
    data, residual = encode_result(CODECS["fp32"], torch.tensor([1.0, 2.0]), torch.tensor([9.0, 9.0]))
    assert (bytes(data), residual) == (np.array([1.0, 2.0], "<f4").tobytes(), None)


def test_a_residual_by_hand() -> None:
    """int8 of (127, 0.25): the step is 1, so 0.25 is lost; with three times as much before, 1 is sent."""
    codec = CODECS["int8"]
    data, residual = encode_result(codec, torch.tensor([127.0, 0.25]), None)
    assert residual is not None
    assert codec.decode(data, 2).tolist() == [127.0, 0.0]
    assert residual.tolist() == [0.0, 0.25]
    before = torch.tensor([0.0, 0.75])
    data, residual = encode_result(codec, torch.tensor([127.0, 0.25]), before)
    assert residual is not None
    assert codec.decode(data, 2).tolist() == [127.0, 1.0]
    assert residual.tolist() == [0.0, 0.0]
    assert before.tolist() == [0.0, 0.75]  # the attempt may come to nothing


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4", "topk"])
def test_error_feedback_over_30_rounds_loses_nothing(codec: str) -> None:
    """What came out and what is left is what went in; and what is left does not grow."""
    generator = torch.Generator().manual_seed(5)
    put_in, came_out = torch.zeros(1024, dtype=torch.float64), torch.zeros(1024, dtype=torch.float64)
    residual, lengths = None, []
    for _ in range(30):
        values = torch.randn(1024, generator=generator)
        put_in += values.double()
        data, residual = encode_result(CODECS[codec], values, residual)
        assert residual is not None
        came_out += CODECS[codec].decode(data, 1024).double()
        lengths.append(float(residual.norm()))
    assert residual is not None
    torch.testing.assert_close(came_out + residual.double(), put_in, rtol=0, atol=1e-4)
    assert max(lengths[15:]) < 1.5 * max(lengths[:15])


def test_residual_hashes() -> None:
    one = torch.tensor([1.0])
    assert residual_hash(None) == bytes(32)
    assert residual_hash(one) == part_hash(np.array([1.0], "<f4").tobytes())
    assert residual_hashes({}, range(3)) == residual_hashes({7: one}, range(3)) == ""
    assert len(residual_hashes({1: one}, range(3))) == 128  # 3 hashes of 32 bytes, as base64


# Bounds.


@pytest.mark.parametrize(
    ("rule", "weights", "bound"),
    [
        ("mean", [1.0] * 5, 31.0),
        ("disjoint_mean", [1.0] * 5, 31.0),
        ("mean", [1.0, 0.0, 0.0, 0.0, 0.0], 31.0),
        ("median", [1.0] * 5, 7.0),  # the three smallest of five
        ("median", [1.0, 0.0, 1.0, 1.0, 1.0], 13.0),  # of four as well
        ("trimmed_mean", [1.0] * 5, 15.0),  # one is cut at each end
        ("clipped_mean", [0.2, 0.2, 0.2, 0.2, 0.02], 15.16),  # the longest has a tenth of its length
        ("median", [0.0, 0.0, 0.0, 1.0, 1.0], 7.0),  # two of five prove nothing: the three smallest of all
        ("clipped_mean", [0.0, 0.0, 0.0, 0.0, 1.0], 7.0),
        ("centered_clipping", [0.0] * 5, 7.0),
    ],
)
def test_a_bound_by_hand(rule: str, weights: list[float], bound: float) -> None:
    assert squared_bound(rule, [1.0, 2.0, 4.0, 8.0, 16.0], weights) == pytest.approx(bound)


def _rows(num_rows: int) -> Iterator[np.ndarray]:
    """(num_rows, 6) each: random ones; ones of many lengths; and those that get nearest to the bounds."""
    generator = np.random.default_rng(num_rows)
    for _ in range(40):
        rows = generator.normal(size=(num_rows, 6))
        yield rows
        yield rows * 10.0 ** generator.integers(-3, 7, size=(num_rows, 1))
        yield np.where(generator.random((num_rows, 6)) < 0.5, 0.0, rows)
        yield np.abs(rows) * 10.0 ** generator.integers(-3, 4, size=(num_rows, 6))
    for num_long in range(num_rows):  # some huge and alike, the others short, of one sign or of both
        for short in (0.0, 1.0, -1.0):
            rows = np.full((num_rows, 6), short)
            rows[:num_long] = 1e6
            yield rows
            for first in range(6):  # each coordinate is carried by others of the short ones
                rows = rows.copy()
                rows[num_long:, first] = np.roll(np.arange(num_rows - num_long) == 0, first)
            yield rows


@pytest.mark.parametrize("rule", ["mean", "disjoint_mean", "median", "trimmed_mean"])
@pytest.mark.parametrize("num_rows", range(1, 10))
def test_no_result_is_beyond_its_bound(rule: str, num_rows: int) -> None:
    """Nor is it beyond the sum of any so many rows: the smallest are the worst choice."""
    weights = [1.0] * num_rows
    for rows in _rows(num_rows):
        values = torch.from_numpy(rows.astype(np.float32))
        squares = (values.double() ** 2).sum(dim=1).tolist()
        result = reduce_values(rule, list(values), weights, 6)
        assert float((result.double() ** 2).sum()) <= squared_bound(rule, squares, weights) * (1 + 1e-6)


@pytest.mark.parametrize("num_rows", range(2, 9))
@pytest.mark.parametrize("rule", ["clipped_mean", "centered_clipping"])
def test_no_clipped_result_is_beyond_its_bound(rule: str, num_rows: int) -> None:
    declared = [0.5 + index for index in range(num_rows)]
    for rows in itertools.islice(_rows(num_rows), 60):
        values = torch.from_numpy(rows.astype(np.float32))
        squares = (values.double() ** 2).sum(dim=1).tolist()
        gram = gram_matrix(list(values))
        plan = plan_of(rule, "none", declared, [math.sqrt(square) for square in squares], [gram])
        present = [index for index, weight in enumerate(plan.weights) if weight != 0]
        result = reduce_values(rule, [values[i] for i in present], [plan.weights[i] for i in present], 6)
        assert float((result.double() ** 2).sum()) <= squared_bound(rule, squares, plan.weights) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("rule", "num_members"),
    [
        *itertools.product(("median", "clipped_mean"), (3, 4, 5, 8)),
        *itertools.product(("trimmed_mean",), (4, 5, 8, 9)),  # of three none is cut
    ],
)
def test_a_length_that_one_member_declares_does_not_raise_the_bound(rule: str, num_members: int) -> None:
    """Also where it says that others stopped; of two members each has half, so there it does."""
    norms = [1.0] * (num_members - 1) + [1e9]
    for num_present in range(1, num_members + 1):
        planned = [norm if i >= num_members - num_present else None for i, norm in enumerate(norms)]
        plan = plan_of(rule, "none", [1.0] * num_members, planned, [])
        assert squared_bound(rule, [norm**2 for norm in norms], plan.weights) <= num_members


def test_feedback_is_usable_up_to_the_bound() -> None:
    result, residual = torch.tensor([1.0, 0.0]), torch.tensor([1.1, 0.0])
    assert is_usable(residual, result, 1.0)
    assert not is_usable(residual, result, 0.9)
    assert not is_usable(residual[:1], result, 1.0)  # which would be added to both
