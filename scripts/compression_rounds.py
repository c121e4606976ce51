"""What does compression cost over many rounds? Four peers finetune real data for 20 rounds, in one process.

    python -m scripts.compression_rounds --data-dir DATA --out DIR

DATA holds sst2/train.csv and so on. The same run is made with each codec, with error feedback at the senders
and at the reducers as in a real session, and once with int4 and no feedback. Figure: head-only accuracy on
held-out rows, mean of the four tasks, and its difference to fp32. fp16 is the yardstick: what it changes is
far below a step of training, so its difference is what mere chance makes of two runs.

Every round is fused twice from the encoded contributions, and both states are hashed: they must be equal.
Each run that is done is kept in DIR, so the whole goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file

from coordinator.cli import Parser, positive, positive_int, run_main
from coordinator.errors import SwarmError, UsageError
from peer.compression import CODECS
from peer.feedback import ErrorFeedback
from peer.fusion import Fusion, Member, fuse
from peer.layout import TensorLayout, make_manifest
from peer.model import load_backbone
from peer.outer import outer_step
from peer.parts import PartGrid
from scripts.demo import embedded_encoder
from scripts.local_peers import LocalPeer, Sizes, load_tasks, mean_accuracy, paired_difference

TASKS = ("sst2", "tweet_emotion", "ag_news", "subj")
TARGET_POINTS = 0.3  # int8 and int4 with feedback stay within so much of fp32


@dataclass(frozen=True)
class Line:
    """One run."""

    codec: str
    has_feedback: bool


LINES = {
    "fp32": Line("fp32", True),
    "fp16": Line("fp16", True),
    "int8": Line("int8", True),
    "int4": Line("int4", True),
    "int4, no feedback": Line("int4", False),
    "topk": Line("topk", True),
}


@dataclass(frozen=True)
class Course:
    """How one run went."""

    encoded_bytes: int  # of one peer's delta
    state_hashes: list[str]  # after each round; both computations agree
    correct: dict[int, list[np.ndarray]]  # by round: per task, which rows are right
    last_state: torch.Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


class Swarm:
    """The state, the peers' feedback, and the rounds of one run."""

    def __init__(
        self, line: Line, peers: Sequence[LocalPeer], base: tuple[TensorLayout, torch.Tensor]
    ) -> None:
        self._line, self._peers = line, peers
        self._layout, self.state = base
        self._feedback = [ErrorFeedback() for _ in peers]
        grid = PartGrid(self.state.numel())
        self._owned = grid.owned([peer.identity.peer_id for peer in peers])
        codec = CODECS[line.codec]
        self.encoded_bytes = sum(codec.size_bytes(grid.size(part)) for part in range(grid.num_parts))

    def round(self, round_: int, deltas: Sequence[torch.Tensor]) -> str:
        """Fuse the deltas, which are used up, and move on; returns the state hash. Raises SwarmError."""
        codec = CODECS[self._line.codec]
        sums = [f.add_to(delta) for f, delta in zip(self._feedback, deltas, strict=True)]
        members = [
            Member(peer.identity.peer_id, 1.0, peer.prepare(sent, codec, round_))
            for peer, sent in zip(self._peers, sums, strict=True)
        ]
        residuals = {part: values for f in self._feedback for part, values in f.reduced.items()}
        fusion, again = (fuse(members, aggregation="mean", residuals=residuals) for _ in range(2))
        state, state_hash = self._next(fusion, members[0])
        if state_hash != self._next(again, members[0])[1]:
            raise SwarmError(f"round {round_}: the same contributions gave two states")
        self.state = state
        if self._line.has_feedback:
            self._keep_feedback(members, sums, fusion)
        return state_hash

    def _next(self, fusion: Fusion, member: Member) -> tuple[torch.Tensor, str]:
        fused = fusion.delta(member.outgoing.grid, member.outgoing.codec)
        state = outer_step("plain", self.state, fused, lr=1.0, momentum=0.0, out=fused)
        return state, make_manifest(self._layout, state).state_hash

    def _keep_feedback(self, members: Sequence[Member], sums: Sequence[torch.Tensor], fusion: Fusion) -> None:
        for feedback, member, sent in zip(self._feedback, members, sums, strict=True):
            own = {p: fusion.residuals[p] for p in self._owned[member.peer_id] if p in fusion.residuals}
            feedback.committed(sent, member.outgoing, [], own)


def run_line(
    line: Line,
    peers: Sequence[LocalPeer],
    base: tuple[TensorLayout, torch.Tensor],
    first_deltas: Sequence[torch.Tensor],
    rounds: range,
    evaluate_every: int,
) -> Course:
    """`first_deltas`: of the first round, which are the same for every line."""
    swarm = Swarm(line, peers, base)
    hashes, correct = [], {}
    for round_ in rounds:
        if round_ == rounds.start:
            deltas = [delta.clone() for delta in first_deltas]
        else:
            deltas = [peer.delta(swarm.state, round_) for peer in peers]
        hashes.append(swarm.round(round_, deltas))
        if round_ % evaluate_every == 0 or round_ == rounds[-1]:
            correct[round_] = [peer.correct(swarm.state) for peer in peers]
    return Course(swarm.encoded_bytes, hashes, correct, swarm.state)


def save_course(course: Course, file: Path) -> None:
    tensors = {"state": course.last_state}
    for round_, tasks in course.correct.items():
        for number, rows in enumerate(tasks):
            tensors[f"correct.{round_}.{number}"] = torch.from_numpy(rows)
    metadata = {"hashes": " ".join(course.state_hashes), "encoded_bytes": str(course.encoded_bytes)}
    save_file(tensors, file.with_suffix(".partial"), metadata)
    file.with_suffix(".partial").replace(file)


def load_course(file: Path) -> Course:
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        names = [name.split(".") for name in stored.keys() if name != "state"]  # noqa: SIM118
        at = sorted((int(round_), int(number)) for _, round_, number in names)
        correct: dict[int, list[np.ndarray]] = {}
        for round_, number in at:
            correct.setdefault(round_, []).append(stored.get_tensor(f"correct.{round_}.{number}").numpy())
        state = stored.get_tensor("state")
    return Course(int(metadata["encoded_bytes"]), metadata["hashes"].split(), correct, state)


def summary(courses: Mapping[str, Course], base: torch.Tensor) -> dict[str, Any]:
    """Per line: accuracies in percent, differences to fp32 in points, and how far apart the states are."""
    reference = courses["fp32"]
    last = max(reference.correct)
    way = float(torch.linalg.vector_norm(reference.last_state - base))
    return {
        name: {
            "encoded_megabytes": course.encoded_bytes / 1e6,
            "accuracy": {r: mean_accuracy(correct) for r, correct in course.correct.items()},
            "against_fp32": paired_difference(course.correct[last], reference.correct[last]),
            "mean_against_fp32": float(
                np.mean(
                    [paired_difference(course.correct[r], reference.correct[r])[0] for r in course.correct]
                )
            ),
            "distance": float(torch.linalg.vector_norm(course.last_state - reference.last_state)) / way,
            "state_hashes": course.state_hashes,
        }
        for name, course in courses.items()
    }


def print_summary(table: Mapping[str, Any], base_accuracy: float, console: Console) -> None:
    rounds = list(table["fp32"]["accuracy"])
    shown = Table(title="Head-only accuracy, %, mean of the tasks", title_justify="left")
    shown.add_column("codec")
    for column in (
        "MB a delta",
        *(f"round {r}" for r in rounds),
        "to fp32 at the end (s.e.)",
        "mean of rounds scored",
        "distance of states",
    ):
        shown.add_column(column, justify="right")
    for name, row in table.items():
        points, error = row["against_fp32"]
        shown.add_row(
            name,
            f"{row['encoded_megabytes']:.1f}",
            *(f"{accuracy:.2f}" for accuracy in row["accuracy"].values()),
            f"{points:+.2f} ({error:.2f})",
            f"{row['mean_against_fp32']:+.2f}",
            f"{row['distance']:.3f}",
        )
    console.print(f"Base model, before any round: {base_accuracy:.2f} %")
    console.print(shown)
    console.print("Distance: of the last state to that of fp32, in lengths of the way from the base to that.")
    for name in ("int8", "int4"):
        if name in table:
            points = table[name]["against_fp32"][0]
            verdict = "within" if abs(points) <= TARGET_POINTS else "BEYOND"
            console.print(f"{name}: {points:+.2f} points, {verdict} {TARGET_POINTS} of fp32")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.compression_rounds", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2/train.csv and so on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="goes on where it stopped")
    parser.add_argument("--model", type=Path, help="directory of an encoder (default: the packaged one)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--codecs", nargs="+", choices=LINES, default=list(LINES), metavar="CODEC")
    parser.add_argument("--rounds", type=positive_int, default=20)
    parser.add_argument("--evaluate-every", type=positive_int, default=5, metavar="ROUNDS")
    parser.add_argument("--round-examples", type=positive_int, default=32)
    parser.add_argument("--train-examples", type=positive_int, default=192)
    parser.add_argument("--eval-examples", type=positive_int, default=300)
    parser.add_argument("--probe-examples", type=positive_int, default=48)
    parser.add_argument("--learning-rate", type=positive, default=2e-4)
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--max-length", type=positive_int, default=32)
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse(arguments)


def _main(flags: argparse.Namespace) -> int:
    torch.set_num_threads(flags.threads)
    datasets.disable_progress_bars()
    console, started_at = Console(highlight=False, width=150), time.monotonic()
    say: Callable[[str], None] = lambda line: console.print(  # noqa: E731
        f"{time.monotonic() - started_at:5.0f} s  {line}", soft_wrap=True
    )
    sizes = Sizes(
        train_examples=flags.train_examples,
        eval_examples=flags.eval_examples,
        round_examples=flags.round_examples,
        probe_examples=flags.probe_examples,
        learning_rate=flags.learning_rate,
        batch_size=flags.batch_size,
        max_length=flags.max_length,
    )
    say(f"{', '.join(flags.tasks)}; seed {flags.seed}, {flags.rounds} rounds, {sizes}")
    settings = {**asdict(sizes), "tasks": list(flags.tasks), "seed": flags.seed, "rounds": flags.rounds}
    _check_folder(flags.out, settings)
    encoder = flags.model or embedded_encoder()
    base = load_backbone(encoder)
    tasks = load_tasks(flags.data_dir, flags.tasks, sizes, flags.seed)
    peers = [LocalPeer(n, tasks[n], encoder, base, sizes, flags.seed + i) for i, n in enumerate(flags.tasks)]
    base_accuracy = mean_accuracy([peer.correct(base[1]) for peer in peers])
    rounds = range(1, flags.rounds + 1)
    first_deltas = [peer.delta(base[1], rounds.start) for peer in peers]
    courses: dict[str, Course] = {}
    for name in dict.fromkeys(("fp32", *flags.codecs)):
        file = flags.out / f"{name}.safetensors"
        if not file.exists():
            save_course(run_line(LINES[name], peers, base, first_deltas, rounds, flags.evaluate_every), file)
        courses[name] = load_course(file)
        say(f"{name}: {' '.join(f'{mean_accuracy(c):.2f}' for c in courses[name].correct.values())}")
    table = summary(courses, base[1])
    results = {"settings": settings, "base": base_accuracy, "codecs": table}
    (flags.out / "compression.json").write_text(json.dumps(results, indent=2) + "\n")
    print_summary(table, base_accuracy, console)
    return 0


def _check_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises UsageError where what lies there is of other settings."""
    out.mkdir(parents=True, exist_ok=True)
    file, text = out / "settings.json", json.dumps(settings, indent=2) + "\n"
    if file.exists() and file.read_text() != text:
        raise UsageError(f"{out} holds a run with other settings; name another --out")
    file.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
