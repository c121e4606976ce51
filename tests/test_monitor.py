"""Does a monitor see a run as it is without being seen, and does its page show it in a real browser?"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from coordinator.about import AboutPeer, Scores
from coordinator.agreement import Agreement
from coordinator.board import BoardValidator
from coordinator.chain import Chain
from coordinator.identity import load_identity
from coordinator.monitor import main
from coordinator.network import Network
from coordinator.observer import Observer
from coordinator.web import Latest, WebServer
from scripts.swarm_processes import LocalSwarm
from tests.fakes import (
    CALL_SECONDS,
    addresses,
    extend,
    make_spec,
    network_config,
    peer,
    running_networks,
)
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
from tests.test_swarm import START_SECONDS, start_peer, start_run, write_task

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGE = "<img src=x onerror=alert(1)>"


# --- in one process: real networks, a chain made by hand


class Run:
    """One peer that trains, with two rounds behind it."""

    def __init__(self, network: Network, directory: Path) -> None:
        spec = make_spec(created_at=time.time() - 1000.0)
        excluded = [{"peer": peer("x"), "reason": "it sent garbage"}]
        self.chain = extend(extend(Chain(spec), "ab"), "ab", excluded=excluded)
        self.network, self.address = network, addresses(network)[0]
        scores = Scores(round=2, metric="accuracy", base=0.5, own=0.75, fused=0.625)
        self.about = AboutPeer(name=SCRIPT, device="cpu", progress=0.5, scores=scores)
        network.on_call("spec", self._on_spec)
        network.run(network.start_dht(BoardValidator(spec.digest)), timeout_seconds=CALL_SECONDS)
        identity = load_identity(directory / "0.key")
        self.agreement = Agreement(network, identity, self.chain, about=lambda: self.about)
        network.run(self.agreement.start(), timeout_seconds=CALL_SECONDS)

    async def _on_spec(self, _peer_id: str, _body: Any) -> bytes:
        return self.chain.spec.to_toml().encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("run")
    with running_networks(1, directory) as (network,):
        yield Run(network, directory)


@pytest.fixture
def own_stdout() -> Iterator[None]:
    """`--json` takes standard output for itself, for the life of its process."""
    stdout, copy = sys.stdout, os.dup(1)
    yield
    os.dup2(copy, 1)
    os.close(copy)
    sys.stdout = stdout


def test_once_with_json_is_one_line(run: Run, own_stdout: None, capfd: pytest.CaptureFixture[str]) -> None:
    digest = run.chain.spec.digest
    assert main(["--initial-peers", run.address, "--run", digest, "--once", "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    shown = json.loads(line)
    assert (shown["event"], shown["problem"], shown["run"]["digest"]) == ("overview", None, digest)
    state = shown["state"]
    assert (state["round"], state["state_hash"], state["num_signatures"]) == (2, run.chain.state_hash, 2)
    assert (state["num_live"], state["num_agreeing"]) == (1, 1)
    (told,) = shown["peers"]
    assert (told["peer_id"], told["name"], told["status"]) == (run.network.peer_id, SCRIPT, "live")
    assert (told["progress"], told["device"]) == (0.5, "cpu")
    assert [(d["peer_id"], d["reason"]) for d in shown["dropped"]] == [(peer("x"), "it sent garbage")]
    assert [(m["round"], m["base"], m["own"], m["fused"]) for m in shown["metrics"]] == [
        (2, 0.5, 0.75, 0.625)
    ]


def test_the_page_of_an_observer_that_nobody_sees(run: Run, tmp_path: Path) -> None:
    config = network_config(
        tmp_path / "monitor.key", initial_peers=(run.address,), listens=False, is_dht_client=True
    )
    with Network(config) as network:
        observer = Observer(network, run.chain.spec)
        observer.start()
        with WebServer("127.0.0.1", 0, Latest(observer.first_look(), lambda: "card")) as server:
            server.start()
            state = json.loads(fetch(f"{server.url}api/state"))
            assert (state["state"]["round"], state["peers"][0]["name"]) == (2, SCRIPT)
            assert "cold_swarm_round 2.0" in fetch(f"{server.url}metrics")
        assert observer.chain.commits == run.chain.commits
        watched = run.network.run(run_members(run), timeout_seconds=CALL_SECONDS)
        assert network.peer_id not in watched


async def run_members(run: Run) -> set[str]:
    """All whom the peer knows: from heartbeats, and as nodes of its DHT."""
    await run.agreement._presence.read_board()
    node = run.network._node
    assert node is not None
    nodes = {str(peer_id) for peer_id in node.protocol.routing_table.peer_id_to_uid}
    return nodes | set(run.agreement.membership.heard())


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=CALL_SECONDS) as reply:
        return str(reply.read().decode())


def test_a_tip_without_its_signatures_is_not_believed(run: Run, tmp_path: Path) -> None:
    """A peer that claims a round which nobody signed: the observer stays at what is proven."""
    with running_networks(2, tmp_path) as (liar, watcher):
        forged = run.chain.commits[1].model_copy(update={"signatures": {}})
        chain = Chain(run.chain.spec, (run.chain.commits[0], forged))
        for network in (liar, watcher):
            validator = BoardValidator(chain.spec.digest)
            network.run(network.start_dht(validator), timeout_seconds=CALL_SECONDS)
        agreement = Agreement(liar, load_identity(tmp_path / "0.key"), chain)
        liar.run(agreement.start(), timeout_seconds=CALL_SECONDS)
        observer = Observer(watcher, chain.spec)
        shown, deadline = observer.first_look(), time.monotonic() + CALL_SECONDS
        while not shown["peers"] and time.monotonic() < deadline:  # a busy machine takes longer
            shown = observer.look()
    assert [p["peer_id"] for p in shown["peers"]] == [liar.peer_id]
    assert (shown["state"]["round"], shown["peers"][0]["agreement"]) == (0, "differs")


# --- errors of the command


DEAD = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--web", "70000"], "--web 70000: a port is a number from 0 to 65535"),
        (["--web-host", "0.0.0.0"], "give --web, too"),
        (["--once", "--web", "0"], "leave out --web, or --once"),
        (["--each-round"], "give --json, too"),
        (["--run", "abc"], "--run abc: a digest has 64 hexadecimal digits"),
        (["--log-level", "loud"], "--log-level loud: not one of"),
    ],
)
def test_wrong_flags_end_with_2_and_say_what_to_do(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--initial-peers", DEAD, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_network_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WebServer("127.0.0.1", 0, Latest()) as server:
        port = server.url.rstrip("/").rpartition(":")[2]
        assert main(["--initial-peers", DEAD, "--web", port]) == 2
    assert "Address already in use; choose another --web PORT" in capsys.readouterr().err


def test_a_dead_entry_point_ends_with_5_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--initial-peers", DEAD, "--once"]) == 5
    told = capsys.readouterr().err
    assert "none of the entry points answers" in told
    assert DEAD in told


def test_an_address_that_is_none_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--initial-peers", "127.0.0.1:4001", "--once"]) == 2
    assert "is not a multiaddress such as" in capsys.readouterr().err


def test_another_run_than_the_wanted_one_ends_with_2(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--initial-peers", run.address, "--run", "0" * 64, "--once"]) == 2
    assert "not in the wanted one" in capsys.readouterr().err


# --- a real swarm and a real browser (each figure in its place: test_page.py)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_page_fills_updates_and_shows_who_is_gone(tmp_path: Path) -> None:
    names = [SCRIPT, IMAGE, "Ada's laptop"]
    tasks = [write_task(tmp_path / f"{i}.jsonl", seed=i) for i in range(3)]
    flags = ("--rounds", "500", "--round-seconds", "3", "--min-peers", "2", "--lease-seconds", "5")
    with LocalSwarm(tmp_path / "logs") as swarm, browser_or_skip() as browser:
        _, entry = start_run(swarm, tmp_path, *flags)
        monitor = swarm.start("monitor", "coordinator.monitor", [*entry, "--web", "0"])
        url = swarm.wait_for(monitor, "web", timeout_seconds=START_SECONDS)["url"]
        with opened(browser, url) as (page, asked, wrong):
            wait_for(page, "() => document.getElementById('run-name').textContent === 'test'")
            assert page.inner_text("#rounds-empty") == "Waiting for the first round."
            peers = [
                start_peer(swarm, f"{i}", tmp_path, task, [*entry, "--name", name, "--share-metrics"])
                for i, (name, task) in enumerate(zip(names, tasks, strict=True))
            ]
            for peer_process in peers:  # to start takes long on a busy machine, and is not the page
                swarm.wait_for(peer_process, "joined", timeout_seconds=2 * START_SECONDS)
            wait_for(page, "() => document.querySelectorAll('#peers tbody tr').length === 4")
            for peer_process in peers:
                swarm.wait_for(peer_process, "committed", timeout_seconds=START_SECONDS)
            wait_for(page, "() => Number(document.getElementById('round').textContent) >= 1")
            before = int(page.inner_text("#round"))
            wait_for(page, "(r) => Number(document.getElementById('round').textContent) > r", before)
            wait_for(page, "() => document.querySelectorAll('#scores-chart circle').length >= 6")
            assert not page.is_visible("#rounds-empty")
            assert set(classes(page)) >= set(names)
            check_that_texts_stayed_texts(page)
            check_a_filled_row(page, swarm.wait_for(peers[2], "joined", timeout_seconds=1.0)["peer_id"])
            check_what_all_peers_make(page, entry[1])
            check_on_phone_and_in_the_dark(page)

            swarm.kill(peers[2])
            wait_for(
                page, "() => document.querySelector('#peers tr.stale bdi')?.textContent === \"Ada's laptop\""
            )
            assert {name: classes(page)[name] for name in names} == dict(
                zip(names, ["", "", "stale"], strict=True)
            )
            wait_for(page, "() => document.querySelector('#dropped')?.innerText.includes('silent')")
            (line,) = (line for line in dropped(page) if "silent" in line)
            assert re.fullmatch(r"round \d+ Ada's laptop \w{8} absent silent: its heartbeats ended .*", line)
            page.reload()  # the server keeps what was
            wait_for(page, "() => document.querySelectorAll('#scores-chart circle').length >= 6")
            wait_for(page, "() => document.querySelector('#peers tr.stale') !== null")
            assert line in dropped(page)
            assert page.locator("#rounds tbody tr").count() >= 2
            name, card = downloaded_card(page)
            assert re.fullmatch(r"test-round-\d+\.md", name)
            assert card.startswith("---\nlibrary_name: transformers")
        assert {address[: len(url)] for address in asked} == {url}
        assert [what for what in wrong if "TrustedHTML" not in what] == []
        check_that_it_leaves_in_order(monitor.process.pid, lambda: monitor.process.send_signal(signal.SIGINT))
        assert monitor.process.wait(30.0) == 130


def check_a_filled_row(page: Page, peer_id: str) -> None:
    row = '(peer) => document.querySelector(`#peers tr[data-peer="${peer}"] progress`)'
    wait_for(page, row, peer_id)  # it has none between two phases
    shown = cells(page, peer_id)
    patterns = {
        "Peer": rf"Ada's laptop\s+{peer_id[-8:]}",
        "Phase": "finetuning|evaluating|ready|waiting",
        "Round": r"[1-9]\d*",
        "Device": r"\S.*",
        "Examples/s": r"[1-9]\d*\.\d",
        "Sent": r"[1-9][\d.]* (kB|MB)",
        "Received": r"[1-9][\d.]* (kB|MB)",
        "State": "agrees|behind|differs",  # as it happens while a round is being committed
        "Last seen": r"just now|[1-5] s ago",
    }
    for head, pattern in patterns.items():
        assert re.fullmatch(pattern, shown[head]), f"{head}: {shown[head]!r}"
    assert shown["progress"] == "" or 0.0 <= float(shown["progress"]) <= 1.0


def check_what_all_peers_make(page: Page, digest: str) -> None:
    wait_for(page, "() => document.getElementById('agreement').textContent === '3 of 3'")
    assert re.fullmatch(r"[1-9][\d.]* (kB|MB)", page.inner_text("#bytes-sent"))
    assert re.match(r"[1-9][\d.]* (kB|MB) received", page.inner_text("#bytes-received"))
    assert re.search(r"signed by [23], electorate 3", page.inner_text("#signed-by"))
    assert page.inner_text("#digest") == digest
    page.click("summary")
    spec = spec_shown(page)
    assert (spec["run name"], spec["round seconds"], spec["lease seconds"]) == ("test", "3", "5")
    assert spec["created at"].startswith("20")


def check_on_phone_and_in_the_dark(page: Page) -> None:
    assert brightness(page, "body") > 200
    page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
    page.emulate_media(color_scheme="dark")
    assert overflow_pixels(page) <= 0
    assert brightness(page, "body") < 60
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": DESKTOP["width"], "height": DESKTOP["height"]})


def check_that_it_leaves_in_order(pid: int, stop: Callable[[], None]) -> None:
    children = psutil.Process(pid).children(recursive=True)
    assert any("p2pd" in child.name() for child in children)
    stop()
    _, left = psutil.wait_procs(children, timeout=30.0)
    assert left == []
