"""Are metrics, summaries and the bootstrap interval right, on numbers worked by hand?"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from peer.statistics import (
    Answers,
    Metric,
    bootstrap_interval,
    compare,
    count_wins,
    differences,
    mean_without_largest,
    metric_of_resamples,
    metric_value,
)


def right(*rows: int) -> Answers:
    return Answers.of_correct(np.array(rows, dtype=bool))


def test_metrics_by_hand() -> None:
    """Two labels: 3 + 1 rows of label 0 (3 right), 2 rows of label 1 (1 right)."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    predictions = np.array([0, 0, 0, 1, 1, 0])
    assert metric_value("accuracy", labels, predictions) == pytest.approx(4 / 6)
    # F1 of label 0: 2*3 / (4+4); of label 1: 2*1 / (2+2).
    assert metric_value("macro_f1", labels, predictions) == pytest.approx((6 / 8 + 2 / 4) / 2)
    # (TP*TN - FP*FN) / sqrt(2*2*4*4) = (1*3 - 1*1) / 8
    assert metric_value("matthews", labels, predictions) == pytest.approx(2 / 8)


@pytest.mark.parametrize("num_labels", [2, 5])
def test_metrics_are_those_of_scikit_learn(num_labels: int) -> None:
    rng = np.random.default_rng(num_labels)
    for _ in range(20):
        labels = rng.integers(num_labels, size=40)
        predictions = np.where(rng.random(40) < 0.5, labels, rng.integers(-1, num_labels, size=40))
        there = np.unique(labels)
        assert metric_value("accuracy", labels, predictions) == pytest.approx(
            accuracy_score(labels, predictions)
        )
        assert metric_value("macro_f1", labels, predictions) == pytest.approx(
            f1_score(labels, predictions, labels=there, average="macro", zero_division=0)
        )
        assert metric_value("matthews", labels, predictions) == pytest.approx(
            matthews_corrcoef(labels, predictions)
        )


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "matthews"])
def test_a_row_counted_twice_is_a_row_written_twice(metric: Metric) -> None:
    labels, predictions = np.array([0, 1, 2, 1, 0]), np.array([0, 2, 2, 1, 1])
    counts = np.array([[2.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    rows = np.array([0, 0, 2, 3, 4])
    assert metric_of_resamples(metric, labels, predictions, counts) == pytest.approx(
        [metric_value(metric, labels[rows], predictions[rows]), metric_value(metric, labels, predictions)]
    )


def test_one_answer_for_all_rows_has_no_matthews() -> None:
    assert metric_value("matthews", np.array([0, 1, 1]), np.array([1, 1, 1])) == 0.0


def test_the_value_of_several_draws_is_their_mean() -> None:
    both = Answers(np.array([0, 1]), np.array([[0, 1], [1, 1]]), "accuracy")
    assert both.value == pytest.approx((1.0 + 0.5) / 2)


def test_summaries_by_hand() -> None:
    """Gains of 1/2, 1/4, 0, -1/4, 1/4 and 1/2 on data sets of four rows."""
    gains = [0.5, 0.25, 0.0, -0.25, 0.25, 0.5]
    ours = [right(*[1] * (2 + round(4 * gain)), *[0] * (2 - round(4 * gain))) for gain in gains]
    theirs = [right(1, 1, 0, 0)] * 6
    assert differences(ours, theirs) == pytest.approx(gains)
    compared = compare(ours, theirs, seed=0, num_resamples=50)
    assert (compared.wins, compared.losses, compared.ties) == (4, 1, 1)
    assert compared.num_datasets == 6
    assert compared.mean == pytest.approx(1.25 / 6)
    assert compared.median == pytest.approx(0.25)
    assert compared.mean_without_largest == pytest.approx((0.25 + 0.0 - 0.25) / 3)


def test_nothing_is_left_of_three_gains() -> None:
    assert mean_without_largest([0.1, 0.2, 0.3]) is None
    assert mean_without_largest([-0.4, 0.1, 0.2, 0.3]) == pytest.approx(-0.4)


def test_rounding_is_no_win() -> None:
    assert count_wins([0.1 + 0.2 - 0.3, 0.0]) == (0, 0, 2)


def test_models_that_answer_alike_differ_nowhere() -> None:
    """Paired: the rows drawn are the same, so not one resample has a difference."""
    rows = [right(1, 0, 1, 0, 1), right(0, 0, 1)]
    interval = bootstrap_interval(rows, rows, seed=3, num_resamples=200)
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_without_noise_of_rows_the_interval_is_that_of_data_sets() -> None:
    """All rows right against all wrong gives 1 in every resample, equal answers 0: what is left is which of
    the two data sets are drawn: both 0, one of each, both 1, with chances 1/4, 1/2, 1/4."""
    ours, theirs = [right(1, 1, 1), right(1, 1)], [right(0, 0, 0), right(1, 1)]
    full = bootstrap_interval(ours, theirs, seed=0)
    assert (full.low, full.high) == (0.0, 1.0)
    half = bootstrap_interval(ours, theirs, seed=0, confidence=0.4)  # from the 30th to the 70th percentile
    assert (half.low, half.high) == (0.5, 0.5)


def test_one_data_set_has_the_interval_of_its_rows() -> None:
    """100 rows, 60 against 40 right on other rows: standard error of the paired mean, and 1.96 of it."""
    one, other = np.arange(100) < 60, np.arange(100) >= 60
    gap = one.astype(float) - other.astype(float)
    interval = bootstrap_interval(
        [Answers.of_correct(one)], [Answers.of_correct(other)], seed=1, num_resamples=10_000
    )
    half_width = 1.96 * gap.std() / 10
    assert interval.low == pytest.approx(0.2 - half_width, abs=0.02)
    assert interval.high == pytest.approx(0.2 + half_width, abs=0.02)


def test_noise_of_data_sets_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    num_rows, num_datasets = 200, 8
    shares = np.linspace(0.4, 0.9, num_datasets)
    ours = [Answers.of_correct(rng.random(num_rows) < share) for share in shares]
    theirs = [Answers.of_correct(rng.random(num_rows) < 0.5) for _ in shares]
    interval = bootstrap_interval(ours, theirs, seed=0)
    of_rows_alone = 2 * 1.96 * np.sqrt(2 * 0.25 / num_rows / num_datasets)
    of_data_sets = 2 * 1.96 * np.std(differences(ours, theirs)) / np.sqrt(num_datasets)
    assert interval.high - interval.low > of_rows_alone
    assert interval.high - interval.low == pytest.approx(np.sqrt(of_rows_alone**2 + of_data_sets**2), rel=0.2)


def test_the_seed_decides() -> None:
    ours, theirs = [right(1, 1, 0, 1, 1, 0, 0, 1)], [right(0, 1, 0, 1, 0, 1, 0, 1)]
    first, second, other = (bootstrap_interval(ours, theirs, seed=s, num_resamples=333) for s in (5, 5, 6))
    assert first == second
    assert first.low <= differences(ours, theirs)[0] <= first.high
    assert other.num_resamples == 333


def test_other_rows_are_refused() -> None:
    other = Answers(np.array([0, 1]), np.array([[0, 1]]), "accuracy")
    with pytest.raises(ValueError, match="data set 1: the two models were not tested"):
        differences([right(1, 0), right(1, 0)], [right(1, 1), other])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], [], seed=0)
    with pytest.raises(ValueError, match="1 data sets against 2"):
        differences([right(1)], [right(1), right(1)])
