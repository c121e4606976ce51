"""How does the monitor's page look? Pictures of it, of a real swarm on this machine, for the docs.

    python -m scripts.screenshots [--out docs/images] [--rounds 6]

Five peers finetune the demo's encoder on error messages of installed libraries; one of them keeps its
scores to itself, one is killed half way. Takes some minutes; needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.cli import positive_int, run_main
from coordinator.errors import SwarmError
from scripts.browser import headless_browser
from scripts.demo import embedded_encoder
from scripts.error_messages import PRIVATE_TASKS, UNSEEN_TASKS, CorpusConfig, write_tasks
from scripts.swarm_processes import LocalSwarm, SwarmProcess, sigterm_as_exit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

START_SECONDS = 180.0
ROUND_SECONDS = 240.0
MAX_PICTURE_BYTES = 300_000
LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
NAMES = (
    "Lakeside clinic",
    "Ada's laptop",
    "library of Ghent",
    "Institut für Physik",
    "",
)  # the last one says no name
PICTURES: dict[str, dict[str, Any]] = {
    "monitor-light": {"color_scheme": "light", "viewport": {"width": 1180, "height": 800}},
    "monitor-dark": {"color_scheme": "dark", "viewport": {"width": 1180, "height": 800}},
    "monitor-phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the pictures of the monitor's page.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: docs/images)")
    parser.add_argument("--rounds", type=positive_int, default=6, help="of the swarm (default: 6)")
    flags = parser.parse_args(arguments)
    return run_main(lambda: _main(flags.out, flags.rounds))


def _main(out: Path, num_rounds: int) -> int:
    with (
        sigterm_as_exit(),
        tempfile.TemporaryDirectory() as folder,
        LocalSwarm(Path(folder) / "logs") as swarm,
    ):
        url, peers = _start(swarm, Path(folder), num_rounds)
        _wait_for_round(swarm, peers[0], max(1, num_rounds // 2))
        swarm.kill(peers[-2])
        _wait_for_round(swarm, peers[0], num_rounds - 1)
        # In the last round, while others finetune, the killed one being stale.
        _wait_until(url, lambda s: _is_busy(s) and any(p["status"] == "stale" for p in s["peers"]))
        with headless_browser() as browser:
            for name, options in PICTURES.items():
                take_picture(browser, url, out / f"{name}.png", **options)
    return 0


def take_picture(browser: Browser, url: str, path: Path, **options: Any) -> None:
    """Of the whole page, once it has filled. Raises SwarmError for one that is too large for the docs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(reduced_motion="reduce", **options)
    try:
        page.goto(url)
        page.wait_for_selector("#peers tbody tr", timeout=30_000)
        page.screenshot(path=path, full_page=True)
    finally:
        page.close()
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise SwarmError(f"{path} has {path.stat().st_size} bytes, more than {MAX_PICTURE_BYTES}")
    print(f"{path}: {path.stat().st_size} bytes")


def _start(swarm: LocalSwarm, folder: Path, num_rounds: int) -> tuple[str, list[SwarmProcess]]:
    """The monitor's address, and the peers."""
    groups = {**PRIVATE_TASKS, **UNSEEN_TASKS}
    tasks = {name: groups[name] for name in list(groups)[: len(NAMES)]}
    write_tasks(folder / "data", CorpusConfig(max_per_class=120), tasks)
    encoder = folder / "all-MiniLM-L6-v2"
    encoder.symlink_to(embedded_encoder())
    flags = ["--model", str(encoder), "--run-name", "error-messages", "--lease-seconds", "10"]
    flags += ["--rounds", str(num_rounds), "--round-examples", "96", "--min-peers", "3"]
    flags += ["--output-dir", str(folder / "starter"), *LOOPBACK]
    starter = swarm.start("starter", "coordinator.start", flags)
    started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
    entry = ["--initial-peers", *started["initial_peers"], "--run", started["spec_digest"]]
    monitor = swarm.start("monitor", "coordinator.monitor", [*entry, "--web", "0"])
    peers = []
    for number, (name, task) in enumerate(zip(NAMES, tasks, strict=True)):
        own = ["--data", str(folder / "data" / task), "--output-dir", str(folder / "peers" / task)]
        own += ["--learning-rate", "2e-4", "--batch-size", "16"]
        own += ["--max-length", "48", "--eval-examples", "128"]
        own += ["--seed", str(number), "--threads", "1", "--use-cpu", *LOOPBACK, *entry]
        own += ["--name", name] if name else []
        own += ["--share-metrics"] if number != 2 else []
        peers.append(swarm.start(task, "peer.join", own))
    return swarm.wait_for(monitor, "web", timeout_seconds=START_SECONDS)["url"], peers


def _wait_for_round(swarm: LocalSwarm, peer: SwarmProcess, round_: int) -> None:
    swarm.wait_for(
        peer,
        "committed",
        timeout_seconds=ROUND_SECONDS * round_,
        where=lambda event: event["round"] >= round_,
    )


def _is_busy(state: dict[str, Any]) -> bool:
    return sum(peer["progress"] is not None for peer in state["peers"]) >= 2 or state["is_over"]


def _wait_until(url: str, is_there: Callable[[dict[str, Any]], bool]) -> None:
    """Raises SwarmError."""
    ends_at = time.monotonic() + ROUND_SECONDS
    while time.monotonic() < ends_at:
        with urllib.request.urlopen(f"{url}api/state", timeout=10.0) as reply:
            if is_there(json.load(reply)):
                return
        time.sleep(0.5)
    raise SwarmError("the swarm did not come to where the pictures are taken")


if __name__ == "__main__":
    sys.exit(main())
