"""Is a run shown as it is, in JSON and in a terminal, and can a peer's text do nothing there?"""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from coordinator.about import AboutPeer, Scores
from coordinator.chain import Chain
from coordinator.dropped import dropped_in
from coordinator.overview import (
    MAX_DROPPED_SHOWN,
    MAX_PEERS_SHOWN,
    MAX_ROUNDS_SHOWN,
    Overview,
    ScoreHistory,
    agreement_of,
    clean_text,
    make_overview,
    model_name,
    status_of,
)
from coordinator.records import PeerRecord, Record, RecordError, open_signed, sign
from coordinator.terminal import age, columns_that_fit, render, score_text, size_text
from tests.fakes import NOW, extend, hash_of, identity, make_heartbeat, make_spec, peer, signed_by

CHAIN = Chain(make_spec())
HOSTILE = {
    "html": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "escape": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "direction": "abc\u202eexe.fdp\u2066\u200f",
    "lines": "one\r\ntwo\u2028three\x00",
    "markup": "[bold red]not bold[/]",
    "zalgo": "Z" + "\u0301" * 30,
    "long": "x" * 10_000,
}


def about(**values: Any) -> AboutPeer:
    """Not validated: what passes the records' bounds is less than what is tried here."""
    return AboutPeer.model_construct(**{**AboutPeer().model_dump(), **values})


def heartbeat(chain: Chain = CHAIN, said: AboutPeer | None = None, **changes: Any) -> PeerRecord:
    return make_heartbeat(chain, **changes).model_copy(update={"about": said})


def overview(chain: Chain = CHAIN, heard: dict[str, PeerRecord] | None = None, **changes: Any) -> Overview:
    return make_overview(chain, heard or {}, ScoreHistory(), **{"now": NOW, **changes})


class Raw(Record):
    """What a liar signs: any text."""

    text: str

    def canonical(self) -> bytes:
        return self.text.encode()


def terminal_text(shown: Overview, width: int = 160) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, highlight=False, emoji=False, markup=False)
    console.print(render(shown, width))
    return file.getvalue()


# --- texts of peers


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_text_of_a_peer_is_one_short_printable_line(text: str) -> None:
    cleaned = clean_text(text, 40)
    assert len(cleaned) <= 40
    assert cleaned.isprintable()
    assert cleaned == clean_text(cleaned, 40)


def test_a_clean_text_stays_what_a_person_wrote() -> None:
    for text in ("Ada's laptop", "物理研究室", "مختبر", "é", "e\u0301", "<b>"):
        assert clean_text(text, 40) == text
    assert clean_text("one\r\ntwo", 40) == "one two"
    assert clean_text("abcdef", 4) == "abc…"
    assert clean_text(HOSTILE["zalgo"], 40) == "Z\u0301\u0301"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_neither_json_nor_terminal_gets_what_acts(text: str) -> None:
    said = about(name=text, device=text, scores=Scores.model_construct(round=0, metric=text, base=0.5))
    shown = overview(heard={peer("a"): heartbeat(said=said)}, problem=text)
    line = json.dumps(shown, allow_nan=False)
    assert all(character.isprintable() for character in line)
    assert len(line) < 4000
    told = terminal_text(shown)
    plain = terminal_text(overview(heard={peer("a"): heartbeat(said=about(name="N"))}, problem="N"))
    escapes = {part[:4] for part in told.split("\x1b")[1:]}
    assert escapes <= {part[:4] for part in plain.split("\x1b")[1:]}, "a peer wrote an escape sequence"
    assert "\u202e" not in told


def test_rich_reads_no_markup_in_a_name() -> None:
    shown = overview(heard={peer("a"): heartbeat(said=about(name=HOSTILE["markup"]))})
    assert HOSTILE["markup"] in terminal_text(shown)


@pytest.mark.parametrize(
    "said",
    [
        {"name": "x" * 41},
        {"name": "\ud800"},
        {"device": "x" * 41},
        {"progress": 1.5},
        {"progress": float("nan")},
        {"examples_per_second": -1.0},
        {"bytes_sent": -1},
        {"bytes_sent": 2**60},
        {"scores": {"round": 1, "metric": "m" * 25}},
        {"scores": {"round": 1, "metric": "accuracy", "own": 7.0}},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_heartbeat_that_says_too_much_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AboutPeer.model_validate(said)
    values = {**make_heartbeat(CHAIN).model_dump(mode="json"), "about": {**AboutPeer().model_dump(), **said}}
    with pytest.raises(RecordError, match="malformed PeerRecord: about"):
        open_signed(sign(Raw(text=json.dumps(values)), identity("a")).to_bytes(), PeerRecord)


def test_what_a_peer_says_of_itself_comes_through_the_wire() -> None:
    scores = Scores(round=1, metric="accuracy", base=0.5, own=0.75, fused=None)
    said = AboutPeer(name="Ada", device="cpu", examples_per_second=12.5, progress=0.25, scores=scores)
    sent = sign(make_heartbeat(CHAIN, about=said), identity("a")).to_bytes()
    author, record = open_signed(sent, PeerRecord)
    assert (author, record.about) == (peer("a"), said)
    assert len(sent) < 1500  # 256 of them fit into a proposal


# --- who is there


def test_live_stale_and_left() -> None:
    assert status_of(heartbeat(), NOW) == "live"
    assert status_of(heartbeat(), NOW + 29.0) == "stale"  # issued a second ago, lease 30 s
    assert status_of(heartbeat(phase="leaving"), NOW) == "left"


def test_live_peers_come_first_by_name_and_a_stale_one_has_no_progress() -> None:
    said = {name: about(name=name, progress=0.5) for name in ("Zoe", "Ada", "Max")}
    heard = {
        peer("a"): heartbeat(said=said["Zoe"]),
        peer("b"): heartbeat(said=said["Ada"], issued_at=NOW - 50.0, expires_at=NOW - 20.0),
        peer("c"): heartbeat(said=said["Max"]),
        peer("d"): heartbeat(phase="serving"),
    }
    peers = overview(heard=heard)["peers"]
    assert [p["name"] for p in peers] == ["Max", "Zoe", "", "Ada"]
    assert [p["status"] for p in peers] == ["live", "live", "live", "stale"]
    assert [p["progress"] for p in peers] == [0.5, 0.5, None, None]
    assert peers[3]["last_seen"] == NOW - 50.0
    assert peers[0]["short_id"] == peer("c")[-8:]


def test_a_clock_that_is_ahead_is_not_seen_in_the_future() -> None:
    ahead = heartbeat(issued_at=NOW + 5.0, expires_at=NOW + 35.0)
    assert overview(heard={peer("a"): ahead})["peers"][0]["last_seen"] == NOW


def test_who_holds_the_state_of_the_chain() -> None:
    one = extend(CHAIN, "ab")
    two = extend(one, "ab")
    assert agreement_of(make_heartbeat(two), two) == "agrees"
    assert agreement_of(make_heartbeat(one), two) == "behind"
    assert agreement_of(make_heartbeat(CHAIN), two) == "behind"
    assert agreement_of(make_heartbeat(two, state_hash=hash_of("other")), two) == "differs"
    fork = extend(one, "ab", state_hash=hash_of("fork"))
    assert agreement_of(make_heartbeat(fork), two) == "differs"
    assert agreement_of(make_heartbeat(two), one) == "differs"  # ahead of what was verified here
    assert agreement_of(make_heartbeat(two, phase="serving"), two) == "serves"
    heard = {
        peer("a"): make_heartbeat(two),
        peer("b"): make_heartbeat(one),
        peer("c"): make_heartbeat(fork),
        peer("d"): make_heartbeat(two, phase="serving"),
        peer("e"): make_heartbeat(two, issued_at=NOW - 50.0, expires_at=NOW - 20.0),
    }
    state = overview(two, heard)["state"]
    assert state["round"] == 2
    assert state["state_hash"] == two.state_hash
    counted = [state[f"num_{what}"] for what in ("live", "agreeing", "behind", "differing")]
    assert counted == [3, 1, 1, 1]


def test_sums_and_the_cut_of_a_crowd() -> None:
    heard = {peer(f"p{i}"): heartbeat(said=about(bytes_sent=2, bytes_received=3)) for i in range(300)}
    shown = overview(heard=heard)
    assert (len(shown["peers"]), shown["num_peers_left_out"]) == (MAX_PEERS_SHOWN, 300 - MAX_PEERS_SHOWN)
    assert shown["traffic"] == {"bytes_sent": 600, "bytes_received": 900}
    assert "and 276 more" in terminal_text(shown)  # 24 are shown


# --- rounds


def test_rounds_with_their_duration_and_who_was_dropped() -> None:
    excluded = [{"peer": peer("x"), "reason": "sent <b>\x1b[0m garbage"}]
    electorate = [peer("a"), peer("b")]
    examples = {"c": 50}
    chain = extend(
        extend(CHAIN, "ab"), "abc", excluded=excluded, num_examples=examples, electorate=electorate
    )
    shown = overview(chain, {peer("x"): heartbeat(said=about(name="Eve"))})
    assert [(r["round"], r["seconds"], r["num_peers"], r["num_examples"]) for r in shown["rounds"]] == [
        (1, 60.0, 2, 200),
        (2, 60.0, 3, 250),
    ]
    assert [r["num_dropped"] for r in shown["rounds"]] == [0, 1]
    (line,) = shown["dropped"]
    assert (line["round"], line["name"], line["what"]) == (2, "Eve", "excluded")
    assert line["reason"] == "sent <b> [0m garbage"
    assert [c["num_examples"] for c in shown["contributors"]] == [100, 100, 50]


def test_what_a_rule_left_out_and_what_came_in_part_are_told_apart() -> None:
    commit = extend(CHAIN, "abc").commits[0].commit
    screened = commit.contributors[0].model_copy(update={"factor": 0.0})
    partial = commit.contributors[1].model_copy(update={"missing": ((0, 2), (5, 6)), "reason": ""})
    commit = commit.model_copy(update={"contributors": [screened, partial, commit.contributors[2]]})
    chain = CHAIN.extended(signed_by(commit, "abc"))
    dropped = overview(chain)["dropped"]
    assert [(d["peer_id"], d["what"]) for d in dropped] == [
        (peer("a"), "screened out"),
        (peer("b"), "in part"),
    ]
    assert dropped[1]["reason"] == "3 parts missing: it stopped sending"
    assert dropped[0]["reason"] == "the spec's rule gave its contribution no weight"
    told = screened.model_copy(update={"reason": "it came with another group"})
    commit = commit.model_copy(update={"contributors": [told, *commit.contributors[1:]]})
    assert [drop.reason for drop in dropped_in(commit)] == [told.reason, dropped[1]["reason"]]


def test_who_is_absent_or_sits_out_is_shown_in_json_and_terminal() -> None:
    why = {"kind": "rollback", "state_hash": CHAIN.state_hash, "reason": "2 of 3 reject it"}
    named = [{"peer": peer("c"), "reason": "median cosine\x1b[2J -0.5"}]
    back = extend(extend(CHAIN, "abc"), "", "abc", electorate=[peer(n) for n in "abc"], excluded=named, **why)
    chain = extend(back, "ad", electorate=[peer("a")])
    heard = {peer("b"): heartbeat(said=about(name="Bob"), phase="leaving")}
    shown = overview(chain, heard, now=chain.committed_at + 5.0)
    assert [
        (d["round"], d["name"], d["what"], d["reason"], d["num_rounds_left"]) for d in shown["dropped"]
    ] == [
        (3, "Bob", "absent", "left", None),
        (2, "", "sits out", "for 2 more rounds: median cosine [2J -0.5", 2),
    ]
    assert [r["num_dropped"] for r in shown["rounds"]] == [0, 1, 1]
    told = terminal_text(shown)
    assert f"{peer('b')[-8:]} Bob" in told
    for text in ("absent", "left", "sits out", "for 2 more rounds"):
        assert text in told


def test_a_roll_back_is_shown_with_its_reason() -> None:
    one = extend(CHAIN, "ab")
    why = {"kind": "rollback", "state_hash": CHAIN.state_hash, "reason": "a reducer lied"}
    back = extend(one, "", "ab", electorate=[peer("a"), peer("b")], **why)
    shown = overview(back)
    assert [(r["kind"], r["reason"]) for r in shown["rounds"]] == [
        ("fuse", ""),
        ("rollback", "a reducer lied"),
    ]
    assert len(shown["contributors"]) == 2  # of the last fusion
    assert "rolled back" in terminal_text(shown)


def test_a_long_run_is_cut_to_its_end() -> None:
    chain = Chain(make_spec(num_rounds=1000))
    for _ in range(MAX_ROUNDS_SHOWN + 5):
        excluded = [{"peer": peer("x"), "reason": "late"}]
        chain = extend(chain, "ab", excluded=excluded)
    shown = overview(chain)
    assert len(shown["rounds"]) == MAX_ROUNDS_SHOWN
    assert (shown["rounds"][0]["round"], shown["rounds"][0]["seconds"]) == (6, 60.0)
    assert (len(shown["dropped"]), shown["dropped"][0]["round"]) == (MAX_DROPPED_SHOWN, 205)


def test_before_the_first_round_it_says_what_it_waits_for() -> None:
    shown = overview()
    assert (shown["rounds"], shown["peers"], shown["state"]["committed_at"]) == ([], [], None)
    told = terminal_text(shown)
    assert "no peer has been heard of yet" in told
    assert "waiting for the first round" in told


def test_a_local_path_of_the_model_stays_private() -> None:
    assert model_name("/home/ada/models/minilm/") == "minilm"
    assert model_name("./minilm") == "minilm"
    assert model_name("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    assert "ada" not in json.dumps(overview(Chain(make_spec(model="/home/ada/x"))))


# --- scores


def scored(round_: int, **scores: float) -> PeerRecord:
    return heartbeat(said=about(scores=Scores(round=round_, metric="accuracy", **scores)))


def test_scores_are_kept_by_round_and_peer_and_of_no_round_to_come() -> None:
    history = ScoreHistory()
    for round_, own in ((1, 0.5), (2, 0.6), (2, 0.7), (9, 0.9)):
        history.add(peer("a"), scored(round_, own=own), last_round=3)
    history.add(peer("b"), heartbeat(), last_round=3)
    assert [(round_, who, s.own) for round_, who, s in history] == [
        (1, peer("a"), 0.5),
        (2, peer("a"), 0.7),
    ]
    lines = make_overview(CHAIN, {peer("a"): heartbeat(said=about(name="Ada"))}, history, now=NOW)["metrics"]
    assert [(line["round"], line["name"], line["own"]) for line in lines] == [
        (1, "Ada", 0.5),
        (2, "Ada", 0.7),
    ]


def test_the_oldest_scores_go_first() -> None:
    history = ScoreHistory(max_kept=3)
    for round_ in range(1, 6):
        history.add(peer("a"), scored(round_, own=0.5), last_round=10)
    assert [round_ for round_, _, _ in history] == [3, 4, 5]


# --- figures


def test_figures_for_people() -> None:
    assert [age(s) for s in (0.5, 12.0, 130.0, 7300.0, 200_000.0)] == ["now", "12 s", "2 min", "2 h", "2 d"]
    assert [size_text(n) for n in (0, 999, 1000, 90_800_000, 10**13)] == [
        *("0 B", "999 B", "1.0 kB", "90.8 MB", "10.0 TB")
    ]
    assert score_text("accuracy", 0.7132) == "71.3"
    assert score_text("pearson", 0.7132) == "0.713"
    assert score_text("accuracy", None) == "-"


def test_a_narrow_terminal_loses_columns_and_no_name() -> None:
    assert len(columns_that_fit(140)) == 10
    assert columns_that_fit(80) == ["peer", "phase", "round", "progress", "seen"]
    assert columns_that_fit(20) == ["peer", "phase", "seen"]
    shown = overview(heard={peer("a"): heartbeat(said=about(name="Ada's laptop", progress=0.5))})
    for width in (140, 80):
        told = terminal_text(shown, width)
        assert f"{peer('a')[-8:]} Ada's laptop" in told
        assert "50%" in told
        assert "…" not in told
