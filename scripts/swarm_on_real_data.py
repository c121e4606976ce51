"""Does it work on real tasks, and under churn? Six peers on six data sets, as real processes on loopback.

    python -m scripts.swarm_on_real_data --data-dir DIR --model ENCODER --out DIR [--rounds 5]
        [--train-examples 800] [--churn]

DIR holds sst2/train.csv, sst2/validation.csv and so on. Prints per peer and round the head-only score of the
round's base model, of the peer's own backbone, and of the fused one, on its held-out split. With --churn:
the starter is killed after round 1; one peer is killed (SIGKILL) in round 2 and started again with the same
output folder; a seventh joins in round 3 through the address of another peer. Then what must hold is checked,
and the exit code is 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.cli import Parser, positive_int, run_main
from coordinator.errors import SwarmError, UsageError
from scripts.swarm_processes import Event, LocalSwarm, SwarmProcess, sigterm_as_exit, threads_each

TASKS = ("sst2", "tweet_emotion", "tweet_offensive", "qqp", "subj", "mnli")
LATE_TASK = "ag_news"  # of the peer that joins in round 3
KILLED_TASK = "qqp"  # of the peer that is killed in round 2
START_SECONDS = 180.0
ROUND_SECONDS = 900.0  # for one event of one round, on a busy machine
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True)
class Settings:
    data_dir: Path
    model: str
    out: Path
    num_rounds: int
    train_examples: int  # at most, of each peer; also the budget of a round
    eval_examples: int
    min_peers: int
    learning_rate: float
    max_length: int
    lease_seconds: float  # silence after which a peer counts as gone
    seed: int


@dataclass(frozen=True)
class Check:
    what: str
    holds: bool
    seen: str


class RealSwarm:
    """Starter and peers of one experiment, by the name of their task."""

    def __init__(self, settings: Settings, swarm: LocalSwarm) -> None:
        self.settings = settings
        self.peers: dict[str, SwarmProcess] = {}  # the newest process of each task
        self.digest = ""
        self._swarm = swarm
        self._num_started = 0

    def begin(self, tasks: Sequence[str]) -> SwarmProcess:
        """Start the run and a peer for each task; returns the starter."""
        s = self.settings
        flags = [
            *("--model", s.model, "--run-name", "real-data", "--output-dir", str(s.out / "starter")),
            *("--rounds", str(s.num_rounds), "--round-examples", str(s.train_examples)),
            *("--min-peers", str(s.min_peers), "--lease-seconds", str(s.lease_seconds)),
            *("--seed", str(s.seed), "--host-maddrs", LOOPBACK),
        ]
        starter = self._swarm.start("starter", "coordinator.start", flags)
        started = self._swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
        self.digest = started["spec_digest"]
        for task in tasks:
            self.join(task, started["initial_peers"])
        return starter

    def join(self, task: str, initial_peers: Sequence[str]) -> SwarmProcess:
        """Start the peer of a task, or start it again with the same output folder."""
        s = self.settings
        flags = [
            *("--initial-peers", *initial_peers, "--run", self.digest),
            *("--data", str(s.data_dir / task), "--output-dir", str(self.output_dir(task))),
            *("--max-train-examples", str(s.train_examples), "--eval-examples", str(s.eval_examples)),
            *("--learning-rate", str(s.learning_rate), "--max-length", str(s.max_length)),
            *("--threads", str(threads_each(len(TASKS))), "--host-maddrs", LOOPBACK, "--use-cpu"),
            *("--seed", str(s.seed + self._num_started), "--log-level", "info"),
        ]
        self._num_started += 1
        name = task if task not in self.peers else f"{task}-again"
        self.peers[task] = self._swarm.start(name, "peer.join", flags, num_threads=threads_each(len(TASKS)))
        return self.peers[task]

    def output_dir(self, task: str) -> Path:
        return self.settings.out / "peers" / task

    def wait_for_round(self, task: str, event_name: str, round_: int) -> Event:
        return self._swarm.wait_for(
            self.peers[task],
            event_name,
            timeout_seconds=ROUND_SECONDS,
            where=lambda event: event["round"] >= round_,
        )

    def wait_until_ended(self) -> None:
        limit = START_SECONDS + ROUND_SECONDS * self.settings.num_rounds
        self._swarm.wait_until_ended(list(self.peers.values()), timeout_seconds=limit)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def run_calm(settings: Settings, swarm: LocalSwarm, console: Console) -> RealSwarm:
    real = RealSwarm(settings, swarm)
    real.begin(TASKS)
    console.print(f"{len(TASKS)} peers, {settings.num_rounds} rounds of {settings.train_examples} examples")
    real.wait_until_ended()
    return real


def run_churn(settings: Settings, swarm: LocalSwarm, console: Console) -> tuple[RealSwarm, list[Check]]:
    """Peers and the starter come and go; returns what had to hold, and whether it did."""
    real = RealSwarm(settings, swarm)
    starter = real.begin(TASKS)

    real.wait_for_round(TASKS[0], "committed", 1)
    swarm.kill(starter)
    console.print("round 1 is committed; the starter is killed")

    real.wait_for_round(KILLED_TASK, "round_started", 2)
    killed = real.peers[KILLED_TASK]
    swarm.kill(killed)
    console.print(f"round 2: {KILLED_TASK} is killed (SIGKILL) and started again")
    again = real.join(KILLED_TASK, _address_of(real.peers[TASKS[0]]))

    real.wait_for_round(TASKS[1], "round_started", 3)
    console.print(f"round 3: {LATE_TASK} joins through the address of {TASKS[1]}")
    late = real.join(LATE_TASK, _address_of(real.peers[TASKS[1]]))

    real.wait_until_ended()
    return real, _checks(real, again, late)


def print_rounds(real: RealSwarm, console: Console) -> None:
    """The table of each peer, from its rounds.jsonl."""
    for task in real.peers:
        rounds = read_rounds(real.output_dir(task))
        metric = rounds[0]["metric"] if rounds else "no round committed"
        table = Table(title=f"{task} ({metric}, head-only, x 100)", title_justify="left")
        for column in ("round", "base", "own", "fused", "peers", "examples", "MB sent", "MB received"):
            table.add_column(column, justify="right")
        table.add_column("seconds")
        for entry in rounds:
            scores = [f"{100 * entry['accuracy'][key]:.1f}" for key in ("base", "own", "fused")]
            moved = [f"{entry[key] / 1e6:.0f}" for key in ("bytes_sent", "bytes_received")]
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in entry["seconds"].items())
            counts = (str(entry["num_peers"]), str(entry["num_examples"]))
            table.add_row(str(entry["round"]), *scores, *counts, *moved, phases)
        console.print(table)


def print_gains(real: RealSwarm, console: Console) -> None:
    """First round's base model against the last fused one, per peer that saw both."""
    table = Table(title="From the pretrained model to the last fused one", title_justify="left")
    for column in ("peer", "base of its first round", "fused, its last round", "gain"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    gains = []
    for task in real.peers:
        rounds = read_rounds(real.output_dir(task))
        if rounds:
            first, last = rounds[0]["accuracy"]["base"], rounds[-1]["accuracy"]["fused"]
            gains.append(last - first)
            table.add_row(task, f"{100 * first:.1f}", f"{100 * last:.1f}", f"{100 * gains[-1]:+.1f}")
    if gains:
        table.add_section()
        table.add_row("mean", "", "", f"{100 * sum(gains) / len(gains):+.1f}")
    console.print(table)


def read_rounds(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _checks(real: RealSwarm, again: SwarmProcess, late: SwarmProcess) -> list[Check]:
    num_rounds = real.settings.num_rounds
    last = {task: _last_state(process) for task, process in real.peers.items()}
    resumed = [event["round"] for event in again.of_kind("round_started")]
    caught_up = late.of_kind("caught_up")
    first_rounds = {
        name: events[0]["round"]
        for name, process in (("again", again), ("late", late))
        if (events := process.of_kind("round_started"))
    }
    return [
        Check(
            "every peer ended with exit code 0",
            all(process.exit_code == 0 for process in real.peers.values()),
            str({task: process.exit_code for task, process in real.peers.items()}),
        ),
        Check(
            f"every peer holds round {num_rounds} at the end, in the same bytes",
            {round_ for round_, _ in last.values()} == {num_rounds}
            and len({state_hash for _, state_hash in last.values()}) == 1,
            str({task: f"{round_}:{state_hash[:12]}" for task, (round_, state_hash) in last.items()}),
        ),
        Check(
            "the killed peer went on from round 1's state or a later one, not from the pretrained weights",
            all(round_ >= 2 for round_ in resumed),
            f"rounds it started: {resumed}; caught up: {[e['round'] for e in again.of_kind('caught_up')]}",
        ),
        Check(
            "the late peer downloaded the swarm's state (round 2 or later) before it trained",
            bool(caught_up) and caught_up[0]["round"] >= 2 and first_rounds.get("late", num_rounds) >= 3,
            f"caught up: {[e['round'] for e in caught_up]}; first round trained: {first_rounds.get('late')}",
        ),
    ]


def _last_state(process: SwarmProcess) -> tuple[int, str]:
    """(round, state hash) that a peer held when it ended: committed with others, or downloaded."""
    known = [(0, ""), *((e["round"], e["state_hash"]) for e in process.events if "state_hash" in e)]
    return max(known)


def _address_of(process: SwarmProcess) -> list[str]:
    addresses: list[str] = process.of_kind("joined")[0]["initial_peers"]
    return addresses


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.swarm_on_real_data", description="Six peers on real tasks.")
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="holds sst2/train.csv, ..."
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="default: the demo's encoder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N")
    parser.add_argument("--train-examples", type=positive_int, default=800, metavar="N")
    parser.add_argument("--eval-examples", type=positive_int, default=400, metavar="N")
    parser.add_argument("--min-peers", type=positive_int, metavar="N", help="default: all, with --churn: 3")
    parser.add_argument("--learning-rate", type=float, default=5e-5, metavar="LR")
    parser.add_argument("--max-length", type=positive_int, default=96, metavar="N", help="tokens")
    parser.add_argument("--lease-seconds", type=float, default=30.0, metavar="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--churn", action="store_true", help="kill the starter and a peer, add a late one")
    namespace: argparse.Namespace = parser.parse_args(arguments)
    return namespace


def _settings(flags: argparse.Namespace) -> Settings:
    from scripts.demo import embedded_encoder

    for task in (*TASKS, *((LATE_TASK,) if flags.churn else ())):
        if not (flags.data_dir / task / "train.csv").is_file():
            raise UsageError(f"--data-dir {flags.data_dir}: there is no {task}/train.csv in it")
    if flags.out.exists() and any(flags.out.iterdir()):
        raise UsageError(f"--out {flags.out}: not empty; peers would resume what is there")
    if flags.churn and flags.rounds < 4:
        raise UsageError("--churn needs at least 4 rounds: the last to join does so in round 3")
    return Settings(
        data_dir=flags.data_dir,
        model=flags.model or str(embedded_encoder()),
        out=flags.out,
        num_rounds=flags.rounds,
        train_examples=flags.train_examples,
        eval_examples=flags.eval_examples,
        min_peers=flags.min_peers or (3 if flags.churn else len(TASKS)),
        learning_rate=flags.learning_rate,
        max_length=flags.max_length,
        lease_seconds=flags.lease_seconds,
        seed=flags.seed,
    )


def _main(flags: argparse.Namespace) -> int:
    settings = _settings(flags)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    started_at = time.monotonic()

    def tell(name: str, event: Event) -> None:
        if event["event"] not in ("finetuned", "fused"):
            facts = {k: v for k, v in event.items() if k not in ("event", "initial_peers")}
            elapsed = time.monotonic() - started_at
            console.print(f"{elapsed:5.0f} s  {name}: {event['event']} {facts}", soft_wrap=True, markup=False)

    checks: list[Check] = []
    with sigterm_as_exit(), LocalSwarm(settings.out / "logs", on_event=tell) as swarm:
        if flags.churn:
            real, checks = run_churn(settings, swarm, console)
        else:
            real = run_calm(settings, swarm, console)
    print_rounds(real, console)
    print_gains(real, console)
    states = {_last_state(process) for process in real.peers.values()}
    console.print(f"states at the end: {sorted(states)}", soft_wrap=True)
    for check in checks:
        console.print(f"{'ok  ' if check.holds else 'FAIL'}  {check.what}: {check.seen}", soft_wrap=True)
    console.print(f"{time.monotonic() - started_at:.0f} s in all; logs and models are in {settings.out}")
    if len(states) != 1 or not all(check.holds for check in checks):
        raise SwarmError("not everything holds that must hold: see above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
