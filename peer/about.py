"""What does a peer say of itself in its heartbeats, for people who watch? Nothing that it was not told to.

Told from the main thread and the network's thread, read by the network's when a heartbeat is due: progress
by itself sends nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch

from coordinator.about import MAX_METRIC_CHARS, MAX_NAME_CHARS, AboutPeer, Scores
from coordinator.outgoing import Recorder, Sent
from peer.display import Accuracy
from peer.gpu_use import uses_gpu


class About:
    """The figures of one process. Thread-safe."""

    def __init__(self, name: str, device: str, shares_metrics: bool) -> None:
        """`shares_metrics`: whether scores may leave."""
        self._lock = threading.Lock()
        self._record = AboutPeer(name=tidy_name(name), device=tidy_name(device))
        self._shares_metrics = shares_metrics
        self._num_bytes_sent = self._num_bytes_received = 0

    def record(self) -> AboutPeer:
        with self._lock:
            counts = {"bytes_sent": self._num_bytes_sent, "bytes_received": self._num_bytes_received}
            return self._record.model_copy(update=counts)

    def following(self, on_progress: Callable[[float], None]) -> Callable[[float], None]:
        """`on_progress`, and what it gets is the progress of the phase; 1 ends it."""

        def progress(fraction: float) -> None:
            self._set(progress=round(min(1.0, max(0.0, fraction)), 3) if fraction < 1.0 else None)
            on_progress(fraction)

        return progress

    def finetuned(self, num_examples: int, seconds: float) -> None:
        speed = round(num_examples / seconds, 2) if num_examples > 0 and seconds > 0 else None
        self._set(progress=None, examples_per_second=speed)

    def scored(self, round_: int, metric: str, accuracy: Accuracy) -> None:
        """Kept back unless the person agreed."""
        if self._shares_metrics:
            base, own, fused = map(_score, (accuracy.base, accuracy.own, accuracy.fused))
            scores = Scores(round=round_, metric=metric[:MAX_METRIC_CHARS], base=base, own=own, fused=fused)
            self._set(scores=scores)

    def counting(self, record: Recorder) -> Recorder:
        """`record`, and the bytes of what it is told count as sent."""

        def count(sent: Sent) -> None:
            with self._lock:
                self._num_bytes_sent += sent.num_bytes
            record(sent)

        return count

    def received(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes_received += num_bytes

    def _set(self, **values: object) -> None:
        with self._lock:
            self._record = self._record.model_copy(update=values)


def tidy_name(text: str) -> str:
    """At most 40 characters that can be printed, with single blanks between words."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return " ".join(words)[:MAX_NAME_CHARS].strip()


def device_name(use_cpu: bool) -> str:
    """What this peer trains on."""
    if uses_gpu(use_cpu):
        return torch.cuda.get_device_name()
    return "cpu"


def _score(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(min(1.0, max(-1.0, value)), 4)
