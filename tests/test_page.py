"""Does the page show what the monitor says, in a real browser, whatever the screen and the peers' names?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.about import AboutPeer, Scores
from coordinator.chain import Chain
from coordinator.overview import Overview, ScoreHistory, make_overview
from coordinator.records import PeerRecord
from coordinator.web import Latest, WebServer
from tests.fakes import extend, make_heartbeat, make_spec, peer
from tests.pages import (
    DESKTOP,
    PHONE,
    SCRIPT,
    brightness,
    browser_or_skip,
    cells,
    check_that_texts_stayed_texts,
    classes,
    downloaded_card,
    dropped,
    opened,
    overflow_pixels,
    spec_shown,
    wait_for,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE = "W" * 40  # no place to break
NONE = "\N{EN DASH}"
CARD = "# A model\n"


def make_chain() -> Chain:
    """Three rounds: c's was undone, so it sits out; b is gone from the last one; x was convicted."""
    one = extend(Chain(make_spec(num_rounds=7, created_at=1_700_000_000.0)), "abc")
    back = extend(
        one,
        "",
        "abc",
        kind="rollback",
        state_hash=one.spec.backbone_hash,
        electorate=[peer(name) for name in "abc"],
        excluded=[{"peer": peer("c"), "reason": "median cosine -0.5"}],
        reason="2 of 3 reject it",
    )
    convicted = [{"peer": peer("x"), "reason": SCRIPT}]
    return extend(back, "ad", electorate=[peer("a")], excluded=convicted, num_examples={"a": 1_234_567})


CHAIN = make_chain()
NOW = CHAIN.committed_at + 40.0


def heartbeat(said: AboutPeer, *, seconds_ago: float, **changes: Any) -> PeerRecord:
    issued_at = NOW - seconds_ago
    return make_heartbeat(CHAIN, about=said, issued_at=issued_at, expires_at=issued_at + 30.0, **changes)


def make_shown(**changes: Any) -> Overview:
    scores = Scores(round=1, metric="accuracy", base=0.5, own=0.75, fused=0.625)
    ada = AboutPeer(
        name="Ada's laptop",
        device="cuda:0",
        examples_per_second=12.34,
        progress=0.25,
        bytes_sent=90_800_000,
        bytes_received=1_500,
        scores=scores,
    )
    heard = {
        peer("a"): heartbeat(ada, seconds_ago=12.0),
        peer("b"): heartbeat(AboutPeer(name=SCRIPT, bytes_sent=200_000), seconds_ago=65.0),
        peer("d"): heartbeat(AboutPeer(name=WIDE, device=WIDE), seconds_ago=1.0, commit="1" * 64),
    }
    history = ScoreHistory()
    history.add(peer("a"), heard[peer("a")], last_round=CHAIN.round)
    return {**make_overview(CHAIN, heard, history, now=NOW), **changes}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browser_or_skip() as found:
        yield found


@contextmanager
def page_of(
    browser: Browser, shown: Overview, *, viewport: dict[str, int] = DESKTOP, **options: Any
) -> Iterator[tuple[Page, list[str]]]:
    """The page once it has asked for the first time; what went wrong in it."""
    with WebServer("127.0.0.1", 0, Latest(shown, lambda: CARD)) as server:
        server.start()
        with opened(browser, server.url, viewport=viewport, **options) as (page, asked, wrong):
            wait_for(page, "() => document.getElementById('link-state').textContent !== 'connecting'")
            yield page, wrong
        assert {address[: len(server.url)] for address in asked} == {server.url}


def test_each_figure_stands_in_its_place(browser: Browser) -> None:
    with page_of(browser, make_shown()) as (page, wrong):
        assert cells(page, peer("a")) == {
            "Peer": f"Ada's laptop\n{peer('a')[-8:]}",
            "Phase": "finetuning",
            "Round": "3",
            "Device": "cuda:0",
            "Examples/s": "12.3",
            "Sent": "90.8 MB",
            "Received": "1.5 kB",
            "State": "agrees",
            "Last seen": "12 s ago",
            "progress": "0.25",
        }
        stale = cells(page, peer("b"))
        told = {key: stale[key] for key in ("Phase", "progress", "Examples/s", "Last seen")}
        assert told == {"Phase": "stale", "progress": "", "Examples/s": NONE, "Last seen": "65 s ago"}
        assert classes(page) == {"Ada's laptop": "", WIDE: "", SCRIPT: "stale"}
        assert cells(page, peer("d"))["State"] == "differs"
        assert page.inner_text("#agreement") == "1 of 2"
        assert page.inner_text("#signed-by") == "1 with another state, signed by 2, electorate 1"
        assert page.inner_text("#state-hash") == CHAIN.state_hash
        assert (page.inner_text("#bytes-sent"), page.inner_text("#round")) == ("91.0 MB", "3")
        assert page.inner_text("#bytes-received") == "1.5 kB received, by all peers since they started"
        assert page.inner_text("#phases") == "2 finetuning, 1 stale"
        page.click("summary")
        spec = spec_shown(page)
        assert spec["created at"] == "2023-11-14T22:13:20.000Z"
        assert (spec["num rounds"], spec["min peers"], spec["aggregation"]) == ("7", "2", "mean")
        assert page.inner_text("#digest") == CHAIN.spec.digest
        assert page.locator("#scores-chart circle").count() == 3
        rounds = page.evaluate(  # in one step: a row that is drawn anew meanwhile has no spaces in its text
            "() => [...document.querySelectorAll('#rounds tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.innerText.trim()).join(' '))"
        )
        assert rounds[0] == f"3 2 1,234,667 60 s 2 / 1 {CHAIN.state_hash[:8]}"
        assert rounds[1].startswith("2 undone")
        assert not page.is_visible("#notice")
        assert wrong == []


def test_who_was_dropped_and_why(browser: Browser) -> None:
    with page_of(browser, make_shown()) as (page, _):
        x, b, c = (peer(name)[-8:] for name in "xbc")
        assert dropped(page) == [
            f"round 3 {x} excluded {SCRIPT}",
            f"round 3 {SCRIPT} {b} absent silent: its heartbeats ended before this round",
            f"round 2 {c} sits out for 2 more rounds: median cosine -0.5",
            "round 2 rolled back 2 of 3 reject it",
        ]
        marks = page.locator("#dropped .mark").evaluate_all(
            "(all) => all.map((mark) => mark.className.trim())"
        )
        assert marks == ["mark bad", "mark", "mark warn", "mark bad"]  # only a conviction is red
        assert not page.is_visible("#dropped-empty")
        check_that_texts_stayed_texts(page)


@pytest.mark.parametrize("width", [390, 320, 800])
def test_nothing_is_wider_than_the_screen(browser: Browser, width: int) -> None:
    with page_of(browser, make_shown(), viewport={**PHONE, "width": width}) as (page, wrong):
        page.click("summary")
        assert overflow_pixels(page) <= 0
        assert cells(page, peer("a"))["Examples/s"] == "12.3"
        assert wrong == []


def test_dark_is_dark_and_light_is_light(browser: Browser) -> None:
    with page_of(browser, make_shown(), color_scheme="dark") as (page, _):
        for selector in ("body", ".card", "main > section:not(.cards)"):
            assert brightness(page, selector) < 60
            assert brightness(page, selector, "color") > 180
        page.emulate_media(color_scheme="light")
        assert brightness(page, "body") > 200
        assert brightness(page, "body", "color") < 80


def test_the_link_to_the_model_card_downloads_it(browser: Browser) -> None:
    with page_of(browser, make_shown()) as (page, _):
        assert downloaded_card(page) == ("test-round-3.md", CARD)


def without_a_date(shown: Overview) -> None:
    shown["run"]["spec"]["created_at"] = 1e300


def without_peers(shown: Overview) -> None:
    shown["peers"] = [{}]


def without_rounds(shown: Overview) -> None:
    shown["rounds"] = None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_a_date, "spec"),
        (without_peers, "peers"),
        (without_rounds, "rounds over time, latest rounds, dropped"),
    ],
)
def test_a_section_that_cannot_be_drawn_hides_no_other(
    browser: Browser, damage: Callable[[Overview], None], named: str
) -> None:
    shown: Overview = json.loads(json.dumps(make_shown()))
    damage(shown)
    with page_of(browser, shown) as (page, _):
        assert page.inner_text("#link-state") == "live"
        assert page.inner_text("#notice") == f"This page cannot show what it was told of: {named}."
        assert page.inner_text("#round") == "3"
        if named != "peers":
            assert cells(page, peer("a"))["Device"] == "cuda:0"
        if named != "spec":
            assert spec_shown(page)["num rounds"] == "7"
        assert page.locator("#scores-chart circle").count() == 3
