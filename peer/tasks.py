"""What a task is, and how well predictions do on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

TaskKind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Task:
    """One peer's private task. Nothing of it leaves the peer, least of all the label names."""

    kind: TaskKind
    is_pair: bool  # two texts per example
    label_names: tuple[str, ...]  # in the order of the label ids; () for regression

    @property
    def num_labels(self) -> int:
        """Width of the head: one value for regression."""
        return 1 if self.kind == "regression" else len(self.label_names)

    @property
    def digest(self) -> str:
        """Hex; the same for the same kind of task and the same labels. For what stays on this machine."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def metric_name(self) -> str:
        return "pearson" if self.kind == "regression" else "accuracy"


def held_out_digest(task: Task, rows: Mapping[str, Sequence[Any]]) -> str:
    """Hex: a score on these rows, by column, says nothing on others. For what stays on this machine."""
    digest = hashlib.sha256(task.digest.encode())
    for name in sorted(rows):
        digest.update(json.dumps([name, list(rows[name])]).encode())
    return digest.hexdigest()


def score(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy in 0..1, or Pearson's r in -1..1; more is better for both.

    `predictions` is (n, num_labels): logits, or the predicted values of a regression (a constant
    or non-finite prediction scores 0.0, so a diverged model is never taken for a good one).
    `labels` is (n,): label ids, or values. Raises ValueError when the shapes do not fit or n is 0.
    """
    if labels.ndim != 1 or len(labels) == 0 or predictions.shape != (len(labels), task.num_labels):
        raise ValueError(
            f"{predictions.shape} predictions of {task.num_labels} labels for {labels.shape} labels"
        )
    if task.kind == "regression":
        return _pearson(predictions[:, 0], labels)
    is_finite = np.isfinite(predictions).all(axis=1)
    return float(np.mean(is_finite & (predictions.argmax(axis=1) == labels)))


def errors(task: Task, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) float64, row by row: 1 for a wrong label and 0 for a right one; squared errors of a regression."""
    if task.kind == "regression":
        squared: np.ndarray = (predictions[:, 0].astype(np.float64) - labels.astype(np.float64)) ** 2
        return squared
    is_finite = np.isfinite(predictions).all(axis=1)
    wrong: np.ndarray = 1.0 - (is_finite & (predictions.argmax(axis=1) == labels))
    return wrong


def majority_baseline(task: Task, labels: np.ndarray) -> float:
    """The score of always predicting the most common label of `labels` (n,); of a constant for regression."""
    if len(labels) == 0:
        raise ValueError("no labels")
    if task.kind == "regression":
        return 0.0
    return float(np.bincount(labels.astype(np.int64)).max() / len(labels))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    # Centred and scaled before the product: squares of 1e200 would overflow.
    a, b = (centred / np.abs(centred).max() for centred in (a - a.mean(), b - b.mean()))
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))
