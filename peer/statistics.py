"""Is one model better than another over many data sets: metrics, summaries, and a paired bootstrap interval.

Pure: numpy only, and every draw takes its seed. scikit-learn has the metrics as well, at about a millisecond
for each call; the bootstrap needs a hundred thousand of them, so here they are computed for all resamples
at once, from confusion matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Metric = Literal["accuracy", "macro_f1", "matthews"]

NUM_LARGEST_GAINS = 3  # without them: is the mean carried by a few data sets?
DEFAULT_NUM_RESAMPLES = 2000
_TIE = 1e-9  # differences below it are rounding


@dataclass(frozen=True)
class Answers:
    """What one model says about the test rows of one data set."""

    labels: Array  # (n,) the right label ids
    predictions: Array  # (num_draws, n) label ids; one draw per finetuning on other training rows
    metric: Metric

    @classmethod
    def of_correct(cls, correct: Array) -> Answers:
        """For accuracy it is enough to know which rows are right: (n,) or (num_draws, n) bool."""
        given = np.atleast_2d(correct).astype(np.int64)
        return cls(labels=np.ones(given.shape[1], dtype=np.int64), predictions=given, metric="accuracy")

    @property
    def value(self) -> float:
        """Mean of the draws."""
        return float(np.mean([metric_value(self.metric, self.labels, draw) for draw in self.predictions]))


@dataclass(frozen=True)
class Interval:
    low: float  # same unit as the metric, 0 to 1
    high: float
    confidence: float  # such as 0.95
    num_resamples: int


@dataclass(frozen=True)
class Comparison:
    """One model against another over data sets; differences in the unit of the metric (0 to 1)."""

    num_datasets: int
    mean: float
    median: float
    wins: int
    losses: int
    ties: int
    mean_without_largest: float | None  # without the three largest gains; None for three data sets or fewer
    interval: Interval  # of the mean


def compare(
    ours: Sequence[Answers],
    theirs: Sequence[Answers],
    *,
    seed: int,
    num_resamples: int = DEFAULT_NUM_RESAMPLES,
) -> Comparison:
    """`ours` against `theirs`, on the same rows. Raises ValueError where these differ."""
    gains = differences(ours, theirs)
    wins, losses, ties = count_wins(gains)
    return Comparison(
        num_datasets=len(gains),
        mean=float(np.mean(gains)),
        median=float(np.median(gains)),
        wins=wins,
        losses=losses,
        ties=ties,
        mean_without_largest=mean_without_largest(gains),
        interval=bootstrap_interval(ours, theirs, seed=seed, num_resamples=num_resamples),
    )


def differences(ours: Sequence[Answers], theirs: Sequence[Answers]) -> list[float]:
    """Per data set, by how much our metric is above theirs. Raises ValueError when the rows differ."""
    _check_paired(ours, theirs)
    return [one.value - other.value for one, other in zip(ours, theirs, strict=True)]


def count_wins(gains: Sequence[float]) -> tuple[int, int, int]:
    """(wins, losses, ties)."""
    wins = sum(gain > _TIE for gain in gains)
    losses = sum(gain < -_TIE for gain in gains)
    return wins, losses, len(gains) - wins - losses


def mean_without_largest(gains: Sequence[float], num_left_out: int = NUM_LARGEST_GAINS) -> float | None:
    """The mean without the largest gains; None when nothing is left."""
    kept = sorted(gains)[: max(0, len(gains) - num_left_out)]
    return float(np.mean(kept)) if kept else None


def bootstrap_interval(
    ours: Sequence[Answers],
    theirs: Sequence[Answers],
    *,
    seed: int,
    num_resamples: int = DEFAULT_NUM_RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the mean difference; paired and of two levels.

    Each resample draws as many data sets as there are, with replacement, and for each of them as many test
    rows as it has, with replacement; both models answer the same rows, and all draws of few-shot training
    do. So it answers: other data sets of this kind and other test rows, the same finetunings. With one data
    set only its rows vary. Row resamples are made once per data set, and each data set drawn takes one of
    them by lot. The noise of rows is also in the gains that data sets differ by, so the interval is rather
    too wide than too narrow. Raises ValueError when the rows differ.
    """
    _check_paired(ours, theirs)
    rng = np.random.default_rng(seed)
    gains = np.stack(  # (num_datasets, num_resamples)
        [_resampled_gain(a, b, num_resamples, rng) for a, b in zip(ours, theirs, strict=True)]
    )
    size = (num_resamples, len(gains))
    means = gains[rng.integers(len(gains), size=size), rng.integers(num_resamples, size=size)].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence, num_resamples)


def metric_value(metric: Metric, labels: Array, predictions: Array) -> float:
    """Of (n,) label ids. A prediction may be an id that no row has (-1: the model gave no number).

    Macro-F1 is the mean over the labels that the rows have; Matthews is 0 where it is not defined.
    """
    once = np.ones((1, len(labels)))
    return float(metric_of_resamples(metric, labels, predictions, once)[0])


def metric_of_resamples(metric: Metric, labels: Array, predictions: Array, counts: Array) -> Array:
    """(num_resamples,) values; `counts` (num_resamples, n) says how often each row is drawn."""
    if metric == "accuracy":
        right: Array = counts @ (labels == predictions).astype(np.float64) / counts.sum(axis=1)
        return right
    confusion = _confusion(labels, predictions, counts)
    return _macro_f1(confusion) if metric == "macro_f1" else _matthews(confusion)


# ---- helpers ------------------------------------------------------------------------------


def _check_paired(ours: Sequence[Answers], theirs: Sequence[Answers]) -> None:
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} data sets against {len(theirs)}: at least one, and as many")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.metric != other.metric or not np.array_equal(one.labels, other.labels):
            raise ValueError(f"data set {number}: the two models were not tested on the same rows")


def _resampled_gain(ours: Answers, theirs: Answers, num_resamples: int, rng: np.random.Generator) -> Array:
    """(num_resamples,) differences of one data set, on rows drawn with replacement."""
    num_rows = len(ours.labels)
    counts = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num_resamples).astype(np.float64)
    one, other = (
        np.mean([metric_of_resamples(a.metric, a.labels, draw, counts) for draw in a.predictions], axis=0)
        for a in (ours, theirs)
    )
    gain: Array = one - other
    return gain


def _confusion(labels: Array, predictions: Array, counts: Array) -> Array:
    """(num_resamples, k, k): how often label i (row) was taken for j (column)."""
    values, ids = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    k, n = len(values), len(labels)
    cells, cell_of_row = np.unique(ids[:n] * k + ids[n:], return_inverse=True)
    confusion = np.zeros((len(counts), k * k))
    confusion[:, cells] = counts @ (cell_of_row[:, None] == np.arange(len(cells))).astype(np.float64)
    return confusion.reshape(-1, k, k)


def _macro_f1(confusion: Array) -> Array:
    right, actual, predicted = _margins(confusion)
    f1 = 2 * right / np.maximum(actual + predicted, 1)  # a label in neither has right = 0
    is_there = actual > 0
    mean: Array = (f1 * is_there).sum(axis=1) / is_there.sum(axis=1)
    return mean


def _matthews(confusion: Array) -> Array:
    """Of any number of labels: Gorodkin 2004, R_K."""
    right, actual, predicted = _margins(confusion)
    num_rows = confusion.sum(axis=(1, 2))
    covariance = right.sum(axis=1) * num_rows - (actual * predicted).sum(axis=1)
    spread = (num_rows**2 - (actual**2).sum(axis=1)) * (num_rows**2 - (predicted**2).sum(axis=1))
    value: Array = np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0)
    return value


def _margins(confusion: Array) -> tuple[Array, Array, Array]:
    """(num_resamples, k) each: rows that are right, that have the label, that were given it."""
    return np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1)
