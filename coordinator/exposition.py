"""What does Prometheus get of an overview? Gauges in its text format; prometheus_client escapes labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from coordinator.overview import Overview
from coordinator.records import Phase

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "cold_swarm"
_STATUSES = ("live", "stale", "left")


def exposition(overview: Overview) -> bytes:
    """The text format, version 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(overview))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, overview: Overview) -> None:
        self._overview = overview

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        yield from _of_the_run(self._overview)
        yield from _of_peers(self._overview["peers"])
        yield _scores(self._overview["peers"])


def _of_the_run(overview: Overview) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
    run, state, peers = overview["run"], overview["state"], overview["peers"]
    info = {"run": run["name"], "digest": run["digest"], "state_hash": state["state_hash"]}
    yield InfoMetricFamily(_PREFIX, "The run that is watched, and its state", value=info)
    yield _gauge("round", "Committed rounds", state["round"])
    yield _gauge("rounds_planned", "Rounds of the run", run["num_rounds"])
    yield _gauge("run_over", "1 when the last round is committed", overview["is_over"])
    yield _gauge(
        "last_commit_timestamp_seconds", "Instant of the last commit, 0 for none", state["committed_at"]
    )
    yield _gauge("observed_timestamp_seconds", "Instant of this look", overview["now"])
    yield _gauge(
        "look_failed", "1 when the network did not answer, or nobody is left", bool(overview["problem"])
    )
    yield _gauge("peers_agreeing", "Live peers that hold the committed state", state["num_agreeing"])
    yield _gauge("peers_behind", "Live peers at an earlier round", state["num_behind"])
    yield _gauge("peers_differing", "Live peers with another state or chain", state["num_differing"])
    status = GaugeMetricFamily(f"{_PREFIX}_peers", "Peers by status", labels=["status"])
    counted = Counter(peer["status"] for peer in peers)
    for name in _STATUSES:
        status.add_metric([name], counted[name])
    yield status
    phases = GaugeMetricFamily(f"{_PREFIX}_live_peers", "Live peers by phase", labels=["phase"])
    live = Counter(peer["phase"] for peer in peers if peer["status"] == "live")
    for phase in get_args(Phase):
        phases.add_metric([phase], live[phase])
    yield phases
    dropped = GaugeMetricFamily(f"{_PREFIX}_dropped", "Left out of rounds, of the last ones", labels=["what"])
    for what, number in sorted(Counter(entry["what"] for entry in overview["dropped"]).items()):
        dropped.add_metric([what], number)
    yield dropped


def _of_peers(peers: list[Mapping[str, Any]]) -> Iterator[GaugeMetricFamily]:
    figures = {
        "round": ("peer_round", "Committed round that the peer is at"),
        "progress": ("peer_progress_ratio", "Progress of its phase"),
        "examples_per_second": ("peer_examples_per_second", "Examples per second of its last finetuning"),
        "last_seen": ("peer_last_seen_timestamp_seconds", "Instant of its last heartbeat"),
        "bytes_sent": ("peer_sent_bytes", "Sent since its process started, as it says"),
        "bytes_received": ("peer_received_bytes", "Received since its process started, as it says"),
    }
    for key, (name, text) in figures.items():
        family = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=["peer", "name"])
        for peer in peers:
            if peer[key] is not None:
                family.add_metric([peer["peer_id"], peer["name"]], peer[key])
        yield family


def _scores(peers: list[Mapping[str, Any]]) -> GaugeMetricFamily:
    labels = ["peer", "name", "metric", "backbone"]
    family = GaugeMetricFamily(
        f"{_PREFIX}_peer_score", "Shared score on the peer's held-out data", labels=labels
    )
    for peer in peers:
        scores = peer["scores"] or {}
        for backbone in ("base", "own", "fused"):
            if scores.get(backbone) is not None:
                values = [peer["peer_id"], peer["name"], scores["metric"], backbone]
                family.add_metric(values, scores[backbone])
    return family


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(value or 0))
