"""What is shown of a run to somebody who watches? Pure: chain, heartbeats and time in, one JSON value out.

All views (terminal, JSON, page, Prometheus) are made of this value. Texts of peers are made harmless here:
cut, and without anything that a terminal would act on or that changes the direction of a line. A view escapes
them once more in its own way. Nothing that a peer says of itself is checked by anybody; what the chain says
bears the signatures of a majority.

    {"event": "overview", "version": 1, "now": instant, "is_over": bool, "problem": str | null,
     "run": {"name", "digest", "model", "num_parameters", "num_rounds", "created_at", "spec": {key: value}},
     "state": {"round", "state_hash", "commit", "committed_at", "num_live", "num_agreeing", "num_behind",
               "num_differing", "num_signatures", "num_electorate"},
     "peers": [{"peer_id", "short_id", "name", "status": "live" | "stale" | "left", "phase", "round",
                "progress": 0..1 | null, "device", "examples_per_second" | null, "num_examples",
                "last_seen": instant, "bytes_sent", "bytes_received",
                "agreement": "agrees" | "behind" | "differs" | "serves",
                "scores": {"round", "metric", "base", "own", "fused"} | null}],
     "num_peers_left_out": int,      of the list above, which is cut
     "rounds": [{"round", "kind": "fuse" | "rollback", "committed_at", "seconds", "attempt", "num_peers",
                 "num_examples", "num_dropped", "num_signatures", "num_electorate", "state_hash", "reason"}],
     "contributors": [{"peer_id", "short_id", "name", "num_examples", "weight", "norm", "factor"}],
                                     of the last fusion
     "dropped": [{"round", "peer_id", "short_id", "name", "reason", "num_rounds_left": int | null,
                  "what": "excluded" | "sits out" | "screened out" | "in part" | "absent"}],
                                     newest first, of the last thousand rounds; see dropped.py. An excluded
                                     peer sent what it should not; one that sits out does so after a
                                     roll-back, for `num_rounds_left` more fusions; an absent one was in the
                                     fusion before, and its reason is what its last heartbeat tells
     "metrics": [{"round", "peer_id", "short_id", "name", "metric", "base", "own", "fused"}],
                                     as far back as this monitor has watched
     "traffic": {"bytes_sent", "bytes_received"}}

Instants are seconds since 1970, durations seconds, sizes bytes. Keys may be added; none is renamed or dropped
without a new `version`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coordinator.about import Scores
from coordinator.chain import Chain
from coordinator.dropped import Drop, find_dropped
from coordinator.records import MAX_REASON_CHARS, Contribution, PeerRecord, SignedCommit

VERSION = 1
SHORT_ID_CHARS = 8
MAX_NAME_SHOWN = 40
MAX_PEERS_SHOWN = 256
MAX_ROUNDS_SHOWN = 200
MAX_DROPPED_SHOWN = 100
MAX_ROUNDS_SEARCHED = 1000  # for who was dropped: each look goes through them
MAX_SCORES_KEPT = 2000  # lines of `metrics`
MAX_RUN_NAME_CHARS = 64
_HARMLESS_BLANK = " "

Overview = dict[str, Any]  # as above


class ScoreHistory:
    """The scores that peers shared, by round and peer; the oldest go first. A heartbeat has the last."""

    def __init__(self, max_kept: int = MAX_SCORES_KEPT) -> None:
        self._max_kept = max_kept
        self._scores: OrderedDict[tuple[int, str], Scores] = OrderedDict()

    def add(self, peer_id: str, record: PeerRecord, *, last_round: int) -> None:
        """`last_round`: of the chain; what a peer claims of later ones is not kept."""
        scores = record.about.scores if record.about else None
        if scores is None or scores.round > last_round:
            return
        self._scores[scores.round, peer_id] = scores
        while len(self._scores) > self._max_kept:
            del self._scores[min(self._scores)]

    def __iter__(self) -> Iterator[tuple[int, str, Scores]]:
        """In order of round, then of peer id."""
        return ((round_, peer, self._scores[round_, peer]) for round_, peer in sorted(self._scores))


def make_overview(
    chain: Chain,
    heard: Mapping[str, PeerRecord],
    scores: ScoreHistory,
    *,
    now: float,
    problem: str | None = None,
) -> Overview:
    """`heard`: the newest record of each peer, expired ones included; `problem`: why it may be outdated."""
    names = {peer: name_of(record) for peer, record in heard.items()}
    peers = [_peer(peer, record, chain, now) for peer, record in heard.items()]
    peers.sort(key=_order)
    drops = list(find_dropped(chain, heard, now=now, max_rounds=MAX_ROUNDS_SEARCHED))
    return {
        "event": "overview",
        "version": VERSION,
        "now": now,
        "is_over": chain.round >= chain.spec.num_rounds,
        "problem": None if problem is None else clean_text(problem, MAX_REASON_CHARS),
        "run": _run(chain),
        "state": _state(chain, peers),
        "peers": peers[:MAX_PEERS_SHOWN],
        "num_peers_left_out": max(0, len(peers) - MAX_PEERS_SHOWN),
        "rounds": _rounds(chain, drops),
        "contributors": _contributors(chain, names),
        "dropped": [_drop(drop, names) for drop in drops[:MAX_DROPPED_SHOWN]],
        "metrics": [_score_line(round_, peer, scored, names) for round_, peer, scored in scores],
        "traffic": {key: sum(p[key] for p in peers) for key in ("bytes_sent", "bytes_received")},
    }


def clean_text(text: str, max_chars: int) -> str:
    """One short line without anything that acts: no control characters, no marks of direction, few accents.

    Marks that combine are kept up to two on a letter: hundreds of them on one would cover the lines above.
    """
    kept: list[str] = []
    num_marks = 0
    for character in text[: 4 * max_chars]:  # no work for what is cut off
        is_mark = unicodedata.combining(character) != 0
        num_marks = num_marks + 1 if is_mark else 0
        if num_marks <= 2:
            kept.append(character if character.isprintable() else _HARMLESS_BLANK)
    line = " ".join("".join(kept).split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def short_id(peer_id: str) -> str:
    """The end of a peer id: all Ed25519 ids begin alike."""
    return peer_id[-SHORT_ID_CHARS:]


def name_of(record: PeerRecord) -> str:
    return clean_text(record.about.name, MAX_NAME_SHOWN) if record.about else ""


def status_of(record: PeerRecord, now: float) -> str:
    if record.phase == "leaving":
        return "left"
    return "live" if record.expires_at > now else "stale"


def _order(peer: dict[str, Any]) -> tuple[object, ...]:
    rank = ("live", "stale", "left").index(peer["status"])
    return rank, peer["phase"] == "serving", not peer["name"], peer["name"], peer["peer_id"]


def agreement_of(record: PeerRecord, chain: Chain) -> str:
    """Whether a peer holds what the chain says; `differs`: another state, or a commit that it has not."""
    if record.phase == "serving":
        return "serves"
    if record.commit == chain.tip:
        return "agrees" if record.state_hash == chain.state_hash else "differs"
    known = record.round < chain.round and (
        record.round == 0 or chain.commits[record.round - 1].commit.hash == record.commit
    )
    return "behind" if known else "differs"


def _peer(peer_id: str, record: PeerRecord, chain: Chain, now: float) -> dict[str, Any]:
    about, status = record.about, status_of(record, now)
    scores = about.scores if about else None
    return {
        "peer_id": peer_id,
        "short_id": short_id(peer_id),
        "name": name_of(record),
        "status": status,
        "phase": record.phase,
        "round": record.round,
        "progress": about.progress if about and status == "live" else None,
        "device": clean_text(about.device, MAX_NAME_SHOWN) if about else "",
        "examples_per_second": about.examples_per_second if about else None,
        "num_examples": record.num_examples,
        "last_seen": min(record.issued_at, now),
        "bytes_sent": about.bytes_sent if about else 0,
        "bytes_received": about.bytes_received if about else 0,
        "agreement": agreement_of(record, chain),
        "scores": None if scores is None else _scores(scores),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    return {**scores.model_dump(), "metric": clean_text(scores.metric, MAX_NAME_SHOWN)}


def _score_line(round_: int, peer: str, scores: Scores, names: Mapping[str, str]) -> dict[str, Any]:
    return {**_who(peer, names), **_scores(scores), "round": round_}


def _who(peer: str, names: Mapping[str, str]) -> dict[str, str]:
    return {"peer_id": peer, "short_id": short_id(peer), "name": names.get(peer, "")}


def _run(chain: Chain) -> dict[str, Any]:
    spec = chain.spec
    values = spec.model_dump(mode="json", exclude={"files", "model", "revision"})
    return {
        "name": spec.run_name,
        "digest": spec.digest,
        "model": model_name(spec.model),
        "num_parameters": spec.num_parameters,
        "num_rounds": spec.num_rounds,
        "created_at": spec.created_at,
        "spec": {key: value for key, value in values.items() if value is not None},
    }


def model_name(model: str) -> str:
    """A hub id as it is; of a path its end only: where somebody keeps models is nobody's business."""
    is_path = model.startswith(("/", ".", "~", "\\")) or model.count("/") > 1
    return clean_text(model.rstrip("/").rpartition("/")[2] if is_path else model, 96)


def _state(chain: Chain, peers: list[dict[str, Any]]) -> dict[str, Any]:
    tip = chain.commits[-1] if chain.commits else None
    live = [p for p in peers if p["status"] == "live"]
    held = [p["agreement"] for p in live]
    return {
        "round": chain.round,
        "state_hash": chain.state_hash,
        "commit": chain.tip,
        "committed_at": tip.commit.committed_at if tip else None,
        "num_live": len(held) - held.count("serves"),
        "num_agreeing": held.count("agrees"),
        "num_behind": held.count("behind"),
        "num_differing": held.count("differs"),
        "num_signatures": len(tip.signatures) if tip else 0,
        "num_electorate": len(tip.commit.electorate) if tip else 0,
    }


def _rounds(chain: Chain, drops: Sequence[Drop]) -> list[dict[str, Any]]:
    num_dropped = Counter(drop.round for drop in drops)
    first = max(0, chain.round - MAX_ROUNDS_SHOWN)
    before = chain.commits[first - 1].commit.committed_at if first else chain.spec.created_at
    rounds = []
    for signed in chain.commits[first:]:
        rounds.append(_round(signed, before, num_dropped[signed.commit.round]))
        before = signed.commit.committed_at
    return rounds


def _round(signed: SignedCommit, begun_at: float, num_dropped: int) -> dict[str, Any]:
    commit = signed.commit
    return {
        "round": commit.round,
        "kind": commit.kind,
        "committed_at": commit.committed_at,
        "seconds": round(max(0.0, commit.committed_at - begun_at), 3),
        "attempt": commit.attempt,
        "num_peers": len(commit.contributors),
        "num_examples": sum(c.num_examples for c in commit.contributors),
        "num_dropped": num_dropped,
        "num_signatures": len(signed.signatures),
        "num_electorate": len(commit.electorate),
        "state_hash": commit.state_hash,
        "reason": clean_text(commit.reason, MAX_REASON_CHARS),
    }


def _contributors(chain: Chain, names: Mapping[str, str]) -> list[dict[str, Any]]:
    fusions = (signed.commit for signed in reversed(chain.commits) if signed.commit.kind == "fuse")
    last = next(fusions, None)
    return [_contributor(c, names) for c in last.contributors[:MAX_PEERS_SHOWN]] if last else []


def _contributor(contribution: Contribution, names: Mapping[str, str]) -> dict[str, Any]:
    values = contribution.model_dump(include={"num_examples", "weight", "norm", "factor"})
    return {**_who(contribution.peer, names), **values}


def _drop(drop: Drop, names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "round": drop.round,
        **_who(drop.peer, names),
        "what": drop.what,
        "reason": clean_text(drop.reason, MAX_REASON_CHARS),
        "num_rounds_left": drop.num_rounds_left,
    }
