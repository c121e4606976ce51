"""What does each fault cost the others? Every kind at every step of a round, with four real peers.

    python -m scripts.fault_matrix                     # all cells; about half a minute each
    python -m scripts.fault_matrix --only kill freeze  # some kinds
    python -m scripts.fault_matrix --only nan --out D  # kept in D, one file a cell; the table is of all in D
    python -m scripts.fault_matrix --only kill --repeats 5    # medians

A cell is a swarm of processes on loopback with a tiny model; one peer fails in round 2 (`tests/faults.py`),
the others must hold one hash in every round, commit the next round, and their states must be the mean of
the recorded contributions, part by part, against float64. Seconds lost: of the slowest survivor, from ready
to committed in the round of the fault, beyond the same in the clean cell of such a run. Needs a checkout:
the injector is in tests/.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console
from rich.table import Table

from coordinator.cli import Parser, positive_int, run_main
from coordinator.errors import SwarmError
from peer.model import load_backbone
from peer.parts import PartGrid
from peer.state import CheckpointStore
from scripts.swarm_processes import LocalSwarm, SwarmProcess, sigterm_as_exit
from tests.tiny_models import make_model_dir, make_texts

NUM_PEERS = 4
NUM_ROUNDS = 4
LEASE_SECONDS = 5.0
START_SECONDS = 120.0  # importing torch and transformers on a loaded machine
CELL_SECONDS = 240.0
MAX_TRIES = 3  # of a cell whose fault was not injected
NOT_INJECTED = "the fault was never injected"
PRELOADED = ("peer.join", "peer.session", "coordinator.start", "tests.faults")
LOOPBACK = ("--host-maddrs", "/ip4/127.0.0.1/tcp/0")
TOLERANCE = 2e-6  # of a state against float64; the values are around 1
MIDDLE = "middle-part"


@dataclass(frozen=True)
class Cell:
    kind: str
    step: str
    compression: str = "fp32"
    screening: str = "none"  # other than none: two phases

    @property
    def run(self) -> str:
        """What of the run is not as usual."""
        return " ".join(v for v in (self.compression, self.screening) if v not in ("fp32", "none"))

    @property
    def clean(self) -> Cell:
        """The same run without a fault."""
        return replace(self, kind="none", step="download" if self.step == "download" else "ready")

    @property
    def name(self) -> str:
        return f"{self.kind} at {self.step}{self.run and ', '}{self.run}"

    @property
    def file_name(self) -> str:
        return "-".join(filter(None, (self.kind, "at", self.step, *self.run.split()))) + ".json"

    @property
    def num_unused_tokens(self) -> int:
        """A state of several chunks is fetched from all who have it, so the faulty ones are asked as well."""
        return 100_000 if self.step == "download" else 0

    @property
    def num_rounds(self) -> int:
        """A newcomer who is to download a state must come before the run is over."""
        return 10 if self.step == "download" else NUM_ROUNDS


CELLS = (
    Cell("none", "ready"),
    Cell("none", "download"),
    *(Cell("kill", step) for step in ("ready", "proposal", "first-part", MIDDLE, "last-part")),
    *(Cell("kill", step) for step in ("first-result", "last-result", "commit", "download")),
    *(Cell("freeze", step) for step in ("ready", "proposal", "first-part", MIDDLE, "last-part")),
    *(Cell("freeze", step) for step in ("first-result", "last-result", "commit", "download")),
    *(Cell("freeze-2", step) for step in ("ready", "proposal", MIDDLE, "first-result", "commit")),
    *(Cell("delay", step) for step in ("proposal", MIDDLE, "first-result", "commit", "download")),
    *(Cell("nan", step) for step in ("first-part", MIDDLE, "last-part")),
    *(Cell("corrupt", step) for step in ("first-part", MIDDLE, "last-part", "download")),
    *(Cell("wrong-shape", step) for step in ("first-part", MIDDLE, "last-part")),
    Cell("wrong-norm", MIDDLE),
    Cell("wrong-group", "first-part"),
    Cell("wrong-weight", "ready"),
    Cell("wrong-result", "first-result"),
    Cell("equivocate", "first-result"),
    Cell("equivocate-once", "first-result"),
    Cell("alive-only", "first-result"),
    Cell("withheld-manifest", "first-result"),
    Cell("nan-result", "first-result"),
    Cell("short-result", "first-result"),
    Cell("truncated-state", "download"),
    Cell("forged-record", "ready"),
    Cell("false-claim", "ready"),
    Cell("deaf", "ready"),
    Cell("flood", "ready"),
    Cell("none", "ready", compression="int8"),
    *(Cell("kill", step, compression="int8") for step in (MIDDLE, "first-result")),
    Cell("none", "ready", screening="norm_cosine"),
    *(Cell("kill", step, screening="norm_cosine") for step in (MIDDLE, "first-result")),
)
LIES_OF_REDUCERS = ("wrong-result", "equivocate", "equivocate-once")  # each is proven by signatures
# Which nobody can prove: attempts without them.
FAULTS_OF_REDUCERS = ("alive-only", "withheld-manifest", "nan-result", "short-result")
FAULTS_AT_A_STEP = ("kill", "freeze", "freeze-2", "delay")
# By `tests/faults.py`, in DIR/failed: else a cell that injects nothing would pass.
FAULTS_THAT_ARE_NOTED = (
    *FAULTS_AT_A_STEP,
    *("nan-result", "short-result", "deaf", "false-claim", "forged-record", "truncated-state", "flood"),
)
# A result is off by half a step at most, and so is what its reducer has to make up for.
STEPS_OF_CODECS = {"fp32": 0.0, "int8": 2 / 127}  # of the largest value
LIES_IN_PARTS = ("nan", "wrong-norm", "wrong-shape", "corrupt")


@dataclass(frozen=True)
class Outcome:
    cell: Cell
    problems: tuple[str, ...]  # empty: as promised
    what_happened: str
    samples: tuple[float, ...]  # seconds of the slowest survivor, in the round of the fault; of what ended
    max_error: float  # of a state against float64

    @property
    def exchange_seconds(self) -> float:
        return statistics.median(self.samples or (0.0,))


def run_cell(cell: Cell, directory: Path) -> Outcome:
    """Raises SwarmError when a survivor does not end in time."""
    model = make_model_dir(directory / "pretrained", num_unused_tokens=cell.num_unused_tokens)
    dump = directory / "dump"
    with LocalSwarm(directory / "logs", preload=PRELOADED) as swarm:
        entry = _start_run(swarm, cell, model, directory)
        faulty = {2, 3} if cell.step == "download" else {3}
        peers = [
            _start_peer(swarm, cell if index in faulty else Cell("none", "ready"), index, directory, entry)
            for index in range(NUM_PEERS)
        ]
        honest = [peer for index, peer in enumerate(peers) if index not in faulty]
        if cell.step == "download":
            swarm.wait_for(honest[0], "committed", timeout_seconds=START_SECONDS)
            honest.append(_start_peer(swarm, Cell("none", "ready"), NUM_PEERS, directory, entry))
        swarm.wait_until_ended(honest, timeout_seconds=CELL_SECONDS)
        _end_frozen(peers)
    names = [process.name for process in honest]
    commits = _commits(directory / names[0])
    error, allowed = _largest_error(commits, model, dump, cell)
    liar = _short_id(peers[3])
    problems = [
        *([] if _has_happened(cell, dump) else [NOT_INJECTED]),
        *_hash_problems(honest, cell.num_rounds),
        *_record_problems(cell, commits, liar, [directory / n for n in names]),
    ]
    if error > allowed:
        problems.append(f"a state is {error:.1e} from the mean of the recorded contributions")
    return Outcome(cell, tuple(problems), _story(commits, liar), (_seconds(directory, names),), error)


def _start_run(swarm: LocalSwarm, cell: Cell, model: Path, directory: Path) -> list[str]:
    flags = [
        "--model",
        str(model),
        "--run-name",
        "faults",
        "--output-dir",
        str(directory / "starter"),
        *LOOPBACK,
    ]
    budget = ["--round-seconds", "5"] if cell.step == "download" else ["--round-examples", "16"]
    rounds = ["--rounds", str(cell.num_rounds), *budget, "--min-peers", "3"]
    limits = ["--lease-seconds", str(LEASE_SECONDS), "--round-limit-seconds", "20", "--audit-parts", "16"]
    weights = ["--weights", "examples" if cell.kind == "wrong-weight" else "uniform"]
    rules = ["--compression", cell.compression, "--screening", cell.screening]
    starter = swarm.start("starter", "coordinator.start", [*flags, *rounds, *limits, *weights, *rules])
    started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
    return ["--run", started["spec_digest"], "--initial-peers", *started["initial_peers"]]


def _start_peer(
    swarm: LocalSwarm, cell: Cell, index: int, directory: Path, entry: Sequence[str]
) -> SwarmProcess:
    data = directory / f"{index}.jsonl"
    texts, labels = make_texts(60, seed=index)
    rows = (json.dumps({"text": t, "label": label}) for t, label in zip(texts, labels, strict=True))
    data.write_text("\n".join(rows) + "\n")
    injector = [cell.kind, cell.step, "--dump", str(directory / "dump"), "--", "peer.join"]
    output = ["--data", str(data), "--output-dir", str(directory / f"peer{index}"), *LOOPBACK]
    training = [
        "--batch-size",
        "8",
        "--learning-rate",
        "1e-3",
        "--max-length",
        "16",
        "--linger-seconds",
        "10",
    ]
    return swarm.start(f"peer{index}", "tests.faults", [*injector, *output, *training, *entry])


def _end_frozen(peers: Sequence[SwarmProcess]) -> None:
    for peer in peers:
        if peer.exit_code is None:
            os.killpg(peer.process.pid, signal.SIGKILL)


# what came of it


def _commits(directory: Path) -> list[dict[str, Any]]:
    with CheckpointStore(directory) as store:
        checkpoint = store.load()
    if checkpoint is None:
        raise SwarmError(f"{directory.name} has no checkpoint")
    return [entry["commit"] for entry in checkpoint.commits]


def _has_happened(cell: Cell, dump: Path) -> bool:
    is_noted = cell.kind in FAULTS_THAT_ARE_NOTED or (cell.kind == "corrupt" and cell.step == "download")
    return not is_noted or (dump / "failed").exists()


def _hash_problems(honest: Sequence[SwarmProcess], num_rounds: int) -> list[str]:
    """Every round has one hash, and every survivor came to the last round."""
    problems = []
    hashes: dict[int, set[str]] = {}
    for process in honest:
        for event in process.of_kind("committed"):
            hashes.setdefault(event["round"], set()).add(event["state_hash"])
        stopped = process.of_kind("stopped")
        is_undone = bool(process.of_kind("rolled_back"))  # so was the last round, if a lie in it was proven
        if not stopped or stopped[0]["round"] not in (num_rounds, num_rounds + is_undone):
            problems.append(f"{process.name} did not come to round {num_rounds}")
    problems += [f"round {r} has {len(h)} states" for r, h in sorted(hashes.items()) if len(h) > 1]
    return problems


def _record_problems(
    cell: Cell, commits: Sequence[Mapping[str, Any]], liar: str, directories: Sequence[Path]
) -> list[str]:
    """Whoever lied must be named in the record of the round, or have been caught by the audit."""
    contributions = [c for commit in commits for c in commit["contributors"]]
    if cell.kind in LIES_IN_PARTS and cell.step != "download":
        named = [c for c in contributions if c["peer"].endswith(liar) and c["missing"] and c["reason"]]
        return [] if named else ["the liar is not named in any record"]
    later = [c for commit in commits if commit["round"] >= 2 for c in commit["contributors"]]
    theirs = [c for c in later if c["peer"].endswith(liar)]
    if cell.kind == "wrong-group":  # as a reducer it mostly fails as well, and then is in no record at all
        counted = [c for c in theirs if "another group" not in c["reason"]]
        return ["the liar counts, and no record says what it did"] if counted else []
    if cell.kind in FAULTS_OF_REDUCERS:
        return ["the liar contributed to a later round"] if theirs else []
    if cell.kind == "wrong-weight" and max(c["weight"] for c in contributions) > 4.0:
        return ["a declared weight was not capped"]
    if cell.kind in LIES_OF_REDUCERS:
        blind = [d.name for d in directories if liar not in _read_text(d / "excluded.jsonl")]
        if blind:
            return [f"{', '.join(blind)} did not name the liar"]
        if liar in {c["peer"][-8:] for c in commits[-1]["contributors"]}:
            return ["the liar contributed to the last round"]
    return []


def _read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _short_id(process: SwarmProcess) -> str:
    joined = process.of_kind("joined")
    return str(joined[0]["peer_id"])[-8:] if joined else "?"


def _story(commits: Sequence[Mapping[str, Any]], liar: str) -> str:
    """The rounds in a few words: how many contributed, in which attempt, who is missing where."""
    words = []
    for commit in commits:
        if commit["kind"] == "rollback":
            words.append("rolled back")
            continue
        attempt = f", attempt {commit['attempt']}" if commit["attempt"] else ""
        missing = [c for c in commit["contributors"] if c["missing"]]
        partly = f", {len(missing)} in part" if missing else ""
        words.append(f"{len(commit['contributors'])} peers{attempt}{partly}")
    return "; ".join(words)


def _seconds(directory: Path, names: Sequence[str]) -> float:
    """From ready to committed in round 2 or 3, whichever was slower: the fault may hit either."""
    slowest = 0.0
    for name in names:
        for line in _read_text(directory / name / "rounds.jsonl").splitlines():
            entry = json.loads(line)
            if entry["round"] >= 2:
                seconds = entry["seconds"]
                waited = sum(seconds.get(phase, 0.0) for phase in ("find_group", "allreduce", "commit"))
                slowest = max(slowest, waited)
    return slowest


def _largest_error(
    commits: Sequence[Mapping[str, Any]], model: Path, dump: Path, cell: Cell
) -> tuple[float, float]:
    """Of all states against the float64 mean of the recorded contributions, part by part; what is allowed."""
    _, backbone = load_backbone(model)
    state = backbone.numpy().astype(np.float64)
    before, worst, largest = state, 0.0, 0.0
    for commit, following in zip(commits, [*commits[1:], None], strict=True):
        if commit["kind"] == "rollback":
            state = before
            continue
        is_undone = following is not None and following["kind"] == "rollback"
        measured = _state(dump, commit["state_hash"])
        if measured is None:  # a round that none of the survivors took part in
            raise SwarmError(f"no peer held the state of round {commit['round']}")
        if not (is_undone and cell.kind in LIES_OF_REDUCERS):  # which holds the lie
            mean = _mean_delta(commit, dump)
            worst = max(worst, float(np.abs(measured - (state + mean)).max()))
            largest = max(largest, float(np.abs(mean).max()))
        before, state = state, measured.astype(np.float64)
    return worst, TOLERANCE + STEPS_OF_CODECS[cell.compression] * largest


def _state(dump: Path, state_hash: str) -> np.ndarray | None:
    path = dump / f"state-{state_hash[:16]}.npy"
    return np.load(path) if path.exists() else None


def _mean_delta(commit: Mapping[str, Any], dump: Path) -> np.ndarray:
    total, weights = None, None
    for contribution in commit["contributors"]:
        delta = np.load(dump / f"delta-{commit['round']}-{contribution['peer'][-8:]}.npy").astype(np.float64)
        grid = PartGrid(delta.size)
        weight = np.full(delta.size, contribution["weight"], dtype=np.float64)
        for first, stop in contribution["missing"]:
            weight[grid.bounds(first)[0] : grid.bounds(stop - 1)[1]] = 0.0
        total = weight * delta if total is None else total + weight * delta
        weights = weight if weights is None else weights + weight
    assert total is not None
    assert weights is not None
    return total / np.maximum(weights, 1e-30)


# the command


def _selected(
    only: Sequence[str] | None, steps: Sequence[str] | None, kept: Collection[Cell] = ()
) -> list[Cell]:
    """The cells that flags ask for, and their clean ones, unless these are kept from an earlier call."""
    chosen = [c for c in CELLS if (not only or c.kind in only) and (not steps or c.step in steps)]
    clean = {cell.clean for cell in chosen} - {*kept}
    return [cell for cell in CELLS if cell in chosen or cell in clean]


def _keep(outcome: Outcome, directory: Path) -> None:
    (directory / outcome.cell.file_name).write_text(json.dumps(asdict(outcome), indent=1) + "\n")


def _kept(directory: Path) -> list[Outcome]:
    """What this call and earlier ones have left, in the order of `CELLS`. Raises SwarmError."""
    outcomes = []
    for cell in CELLS:
        file = directory / cell.file_name
        if not file.exists():
            continue
        try:
            fields = json.loads(file.read_bytes())
            tuples = {key: tuple(fields[key]) for key in ("problems", "samples")}
            outcomes.append(Outcome(**{**fields, **tuples, "cell": Cell(**fields["cell"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise SwarmError(f"{file} holds no outcome of a cell ({error}): remove it") from error
    return outcomes


def _print(outcomes: Sequence[Outcome], console: Console) -> None:
    clean = {o.cell: o for o in outcomes if o.cell.kind == "none"}
    table = Table(title="Faults, 4 peers, the others' view", title_justify="left")
    for heading in ("fault", "step", "run", "outcome", "rounds"):
        table.add_column(heading)
    table.add_column("seconds lost", justify="right")
    table.add_column("error", justify="right")
    for o in outcomes:
        outcome = "as promised" if not o.problems else "; ".join(o.problems)
        cells = (o.cell.kind, o.cell.step, o.cell.run, outcome, o.what_happened)
        table.add_row(*cells, _told_seconds(o, clean.get(o.cell.clean)), f"{o.max_error:.0e}")
    console.print(table)
    for cell, outcome_ in clean.items():
        console.print(f"{cell.name}: {outcome_.exchange_seconds:.1f} s from ready to committed")


def _told_seconds(outcome: Outcome, clean: Outcome | None) -> str:
    """The median of the repetitions beyond that of the clean cell, and the longest."""
    if outcome.cell.kind == "none" or clean is None or not outcome.samples:
        return "-"
    lost = [max(0.0, seconds - clean.exchange_seconds) for seconds in outcome.samples]
    longest = f" (to {max(lost):.1f})" if len(lost) > 1 else ""
    return f"{statistics.median(lost):.1f}{longest}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    kinds = sorted({cell.kind for cell in CELLS})
    steps = sorted({cell.step for cell in CELLS})
    parser = Parser(prog="python -m scripts.fault_matrix", description="What each fault costs the others.")
    parser.add_argument("--only", nargs="+", choices=kinds, metavar="KIND", help="some kinds of faults")
    parser.add_argument("--steps", nargs="+", choices=steps, metavar="STEP", help="some steps")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=1,
        metavar="N",
        help="of every cell; seconds lost are then a median (default 1)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="keep every outcome as JSON there; the table is of all that are there, of earlier calls as well",
    )
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def _main(flags: argparse.Namespace) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 190)
    transformers.logging.disable_progress_bar()
    if flags.out is not None:
        flags.out.mkdir(parents=True, exist_ok=True)
    kept = [] if flags.out is None else _kept(flags.out)
    outcomes = []
    with sigterm_as_exit():
        for cell in _selected(flags.only, flags.steps, [outcome.cell for outcome in kept]):
            outcome = _together([_outcome_of(cell) for _ in range(flags.repeats)])
            outcomes.append(outcome)
            if flags.out is not None:
                _keep(outcome, flags.out)
            console.print(f"{cell.name}: {'; '.join(outcome.problems) or 'as promised'}", soft_wrap=True)
    _print(outcomes if flags.out is None else _kept(flags.out), console)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _outcome_of(cell: Cell) -> Outcome:
    """Once more where the fault was not injected: the honest donors of a download may have given all of it
    before the faulty ones were asked."""
    for _ in range(MAX_TRIES):
        outcome = _try(cell)
        if outcome.problems != (NOT_INJECTED,):
            break
    return outcome


def _try(cell: Cell) -> Outcome:
    # Ended in the middle of ending its peers, it leaves them a moment in which to write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            return run_cell(cell, Path(directory))
        except SwarmError as error:
            return Outcome(cell, (str(error).splitlines()[0],), "", (), 0.0)


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """Repetitions of one cell: the story of the slowest, and every problem that any of them had."""
    slowest = max(outcomes, key=lambda o: o.samples)
    return replace(
        slowest,
        problems=tuple(dict.fromkeys(problem for o in outcomes for problem in o.problems)),
        samples=tuple(seconds for o in outcomes for seconds in o.samples),
        max_error=max(o.max_error for o in outcomes),
    )


if __name__ == "__main__":
    sys.exit(main())
