"""Does Prometheus get figures that its own parser reads, with labels that nobody can break out of?"""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.about import AboutPeer, Scores
from coordinator.chain import Chain
from coordinator.exposition import exposition
from coordinator.overview import Overview, ScoreHistory, make_overview
from tests.fakes import NOW, extend, make_heartbeat, make_spec, peer

CHAIN = extend(Chain(make_spec()), "ab", excluded=[{"peer": peer("x"), "reason": "late"}])


def overview(**said: Any) -> Overview:
    about = AboutPeer.model_construct(**{**AboutPeer().model_dump(), **said})
    heard = {
        peer("a"): make_heartbeat(CHAIN).model_copy(update={"about": about}),
        peer("b"): make_heartbeat(CHAIN, issued_at=NOW - 50.0, expires_at=NOW - 20.0),
    }
    return make_overview(CHAIN, heard, ScoreHistory(), now=NOW)


def samples(shown: Overview) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(exposition(shown).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(shown: Overview, metric_name: str, /, **labels: str) -> float:
    return samples(shown)[f"cold_swarm_{metric_name}", frozenset(labels.items())]


def test_the_figures() -> None:
    scores = Scores(round=1, metric="accuracy", base=0.5, own=0.75)
    shown = overview(name="Ada", progress=0.25, examples_per_second=12.5, bytes_sent=7, scores=scores)
    ada = {"peer": peer("a"), "name": "Ada"}
    assert value(shown, "round") == 1
    assert value(shown, "rounds_planned") == 5
    assert value(shown, "run_over") == 0
    assert value(shown, "last_commit_timestamp_seconds") == CHAIN.committed_at
    assert value(shown, "peers", status="live") == value(shown, "peers", status="stale") == 1
    assert value(shown, "peers", status="left") == 0
    assert value(shown, "live_peers", phase="finetuning") == 1
    assert value(shown, "peers_agreeing") == 1
    assert value(shown, "dropped", what="excluded") == 1
    assert value(shown, "peer_progress_ratio", **ada) == 0.25
    assert value(shown, "peer_examples_per_second", **ada) == 12.5
    assert value(shown, "peer_sent_bytes", **ada) == 7
    assert value(shown, "peer_last_seen_timestamp_seconds", **ada) == NOW - 1.0
    assert value(shown, "peer_score", **ada, metric="accuracy", backbone="own") == 0.75
    names = [name for name, labels in samples(shown) if ("backbone", "fused") in labels]
    assert names == []  # what was not measured is no figure


@pytest.mark.parametrize(
    "name", ['a"} 1\ncold_swarm_round 99', "back\\slash\\", 'quo"te', "x" * 10_000, "<script>", "\x1b[2J"]
)
def test_a_name_is_a_label_and_nothing_else(name: str) -> None:
    shown = overview(name=name)
    (told,) = {
        dict(labels)["name"]
        for metric, labels in samples(shown)
        if metric == "cold_swarm_peer_round" and ("peer", peer("a")) in labels
    }
    assert told == shown["peers"][0]["name"]
    assert value(shown, "round") == 1
    assert len(samples(shown)) == len(samples(overview(name="Ada")))
