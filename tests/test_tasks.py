"""Do the metrics give hand-worked values, and never reward a model that diverged?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peer.tasks import Task, held_out_digest, majority_baseline, score

CLASSIFY = Task("classification", is_pair=False, label_names=("bad", "fair", "good"))
REGRESS = Task("regression", is_pair=True, label_names=())


def test_a_task_knows_the_width_of_its_head_and_its_metric() -> None:
    assert (CLASSIFY.num_labels, CLASSIFY.metric_name) == (3, "accuracy")
    assert (REGRESS.num_labels, REGRESS.metric_name) == (1, "pearson")


def test_accuracy_counts_the_largest_logit() -> None:
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [-1.0, -2.0, -3.0]])
    assert score(CLASSIFY, logits, np.array([0, 2, 2, 0])) == 0.75


def test_logits_that_are_not_finite_are_wrong() -> None:
    # argmax of a row with NaN is the place of the NaN: it must not count as a hit.
    logits = np.array([[np.nan, 0.0, 0.0], [0.0, np.inf, 0.0], [0.0, 0.0, 1.0]])
    assert score(CLASSIFY, logits, np.array([0, 1, 2])) == pytest.approx(1 / 3)


def test_pearson_by_hand() -> None:
    # Centred: (-1, 0, 1) and (-2, 1, 1); 3 / sqrt(2 * 6) = 0.8660.
    assert score(REGRESS, np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 4.0, 4.0])) == pytest.approx(
        0.8660254
    )


@pytest.mark.parametrize(("scale", "expected"), [(2.0, 1.0), (-0.5, -1.0), (1e200, 1.0), (1e-200, 1.0)])
def test_pearson_ignores_the_scale(scale: float, expected: float) -> None:
    labels = np.array([0.0, 1.0, 5.0, 2.5])
    assert score(REGRESS, (labels * scale)[:, None], labels) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[3.0, 3.0, 3.0], [np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0]])
def test_pearson_of_a_constant_or_diverged_prediction_is_zero(values: list[float]) -> None:
    assert score(REGRESS, np.array(values)[:, None], np.array([1.0, 2.0, 3.0])) == 0.0
    assert score(REGRESS, np.array([[1.0], [2.0], [3.0]]), np.array(values)) == 0.0


@pytest.mark.parametrize(
    ("task", "shape", "num_labels"),
    [(CLASSIFY, (2, 2), 2), (CLASSIFY, (3, 3), 2), (REGRESS, (2,), 2), (REGRESS, (0, 1), 0)],
)
def test_shapes_that_do_not_fit_are_refused(task: Task, shape: tuple[int, ...], num_labels: int) -> None:
    with pytest.raises(ValueError, match="predictions"):
        score(task, np.zeros(shape), np.zeros(num_labels))


def test_majority_baseline() -> None:
    assert majority_baseline(CLASSIFY, np.array([0, 2, 2, 1, 2])) == 0.6
    assert majority_baseline(REGRESS, np.array([0.5, 1.5])) == 0.0
    with pytest.raises(ValueError, match="no labels"):
        majority_baseline(CLASSIFY, np.array([], dtype=np.int64))


def test_scores_are_comparable_on_the_same_rows_with_the_same_labels_only() -> None:
    task = Task(kind="classification", is_pair=False, label_names=("grim", "happy"))
    rows: dict[str, list[Any]] = {"text": ["a", "b"], "label": [0, 1]}
    same = held_out_digest(task, rows)
    assert held_out_digest(Task("classification", False, ("grim", "happy")), dict(rows)) == same
    turned = Task(kind="classification", is_pair=False, label_names=("happy", "grim"))
    assert turned.digest != task.digest
    assert held_out_digest(turned, rows) != same
    assert held_out_digest(task, {**rows, "text": ["a", "c"]}) != same
    assert held_out_digest(task, {**rows, "label": [1, 0]}) != same
