"""What do two liars of eight do to a fused model, under each rule? Real finetuning, in one process.

    python -m scripts.byzantine --data-dir DATA --out DIR

DATA holds sst2/train.csv and so on. Eight peers finetune all-MiniLM-L6-v2, each on its own task; six of them
are honest. Per rule: all eight honest; the six alone; and two liars who send

    noise       normal noise, as long as the median honest delta
    flipped     minus what they really learned
    x100        100 times what they really learned
    shuffled    what they really learned from labels shuffled among their examples (labels renamed, such as
                0 for 1 and 1 for 0, are no attack: a head is private and learns the new names)
    little      "a little is enough" (Baruch et al. 2019, section 3): mean + z std of the honest deltas, per
                coordinate, both the same; z of the paper's formula, for 2 of 8: 0.32
    little_1.5  the same with z = 1.5, which the paper uses against its larger swarms
    against     minus the mean of the honest deltas, made as long as the median one of them, both the same (as
                the inner product manipulation of Xie et al. 2019, within what clipping lets pass)

First figure: how much of the mean of the honest deltas is in the fused delta of the first round, which
starts from the same deltas for all; 1 is all of it, as with the six alone under the mean. Beside it the
length of what points elsewhere, in lengths of that mean. Exact, where accuracies have errors; --only-deltas
stops here.

Second figure: head-only accuracy on held-out rows of the six honest tasks after the last round, minus that
of the six alone under the same rule. The same state is finetuned once, whichever rules and conditions lead
to it. Each step goes to DIR/journal.jsonl, so a run that was stopped goes on; more can be added later.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from coordinator.cli import Parser, positive, positive_int, run_main
from coordinator.errors import UsageError
from peer.compression import CODECS
from peer.data import TaskData
from peer.fusion import Member, fuse
from peer.layout import make_manifest
from peer.model import load_backbone
from peer.outer import outer_step
from scripts.demo import embedded_encoder
from scripts.local_peers import (
    LocalPeer,
    Sizes,
    load_tasks,
    mean_accuracy,
    noise_as_long_as,
    paired_difference,
    shuffled_labels,
)

HONEST = ("sst2", "tweet_emotion", "tweet_offensive", "ag_news", "subj", "snli")
LIARS = ("cola", "qqp")  # two more families; in "clean" their peers are honest
RULES = {
    "mean": ("mean", "none"),
    "clipped_mean": ("clipped_mean", "none"),
    "trimmed_mean": ("trimmed_mean", "none"),
    "median": ("median", "none"),
    "centered_clipping": ("centered_clipping", "none"),
    "mean, screened": ("mean", "norm_cosine"),
    "clipped_mean, screened": ("clipped_mean", "norm_cosine"),
}
ATTACKS = ("noise", "flipped", "x100", "shuffled", "little", "little_1.5", "against")
CONDITIONS = ("clean", "six", *ATTACKS)
TARGET_POINTS = 1.0  # a robust rule stays within so much of the six alone

Group = Mapping[str, torch.Tensor]  # deltas by peer
Correct = tuple[np.ndarray, ...]  # per honest task, which held-out rows are right


@dataclass(frozen=True)
class Settings:
    sizes: Sizes
    num_rounds: int
    seed: int
    honest: tuple[str, ...] = HONEST
    liars: tuple[str, ...] = LIARS


@dataclass(frozen=True)
class Cell:
    """One entry of the table."""

    rule: str  # key of RULES
    condition: str


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def baruch_z(num_peers: int, num_liars: int) -> float:
    """How many standard deviations hide: of Baruch et al. 2019, algorithm 3.

    s honest peers more are needed for a majority; the largest z with Phi(z) < (n - s) / n. Their example is
    24 liars of 50: s = 2, z = 1.75.
    """
    needed = num_peers // 2 + 1 - num_liars
    return NormalDist().inv_cdf((num_peers - needed) / num_peers)


def lies(
    condition: str, liars: Sequence[str], honest: Sequence[torch.Tensor], own: Group, seed: int
) -> dict[str, torch.Tensor]:
    """What the liars send, who know all honest deltas; `own` is what they learned, where that matters."""
    if condition == "clean":
        return {name: own[name] for name in liars}
    if condition == "flipped":
        return {name: -own[name] for name in liars}
    if condition == "x100":
        return {name: 100.0 * own[name] for name in liars}
    if condition in ("noise", "against"):
        norms = sorted(float(torch.linalg.vector_norm(delta)) for delta in honest)
        length = norms[len(norms) // 2]
        if condition == "noise":
            return {
                name: noise_as_long_as(length, honest[0].numel(), seed + i) for i, name in enumerate(liars)
            }
        mean = _shifted_mean(honest, 0.0)
        return dict.fromkeys(liars, mean * (-length / float(torch.linalg.vector_norm(mean))))
    z = 1.5 if condition == "little_1.5" else baruch_z(len(honest) + len(liars), len(liars))
    return dict.fromkeys(liars, _shifted_mean(honest, z))


class Journal:
    """What is done: one JSON object per line; the first one says with which settings."""

    def __init__(self, path: Path, settings: Settings, state_hash: str) -> None:
        """Raises UsageError where the file is of other settings or of another model."""
        self._path = path
        self._moves: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._correct: dict[str, Correct] = {}
        header = {"kind": "settings", **asdict(settings), "base": state_hash}
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a torn last line is dropped
        entries = [json.loads(line) for line in lines]
        if entries and entries[0] != json.loads(json.dumps(header)):
            raise UsageError(f"{path} is of a run with other settings; name another --out")
        path.write_text("".join(line + "\n" for line in lines))
        for entry in entries[1:]:
            self._take(entry)
        if not entries:
            self._append(header)

    def move(self, cell: Cell, round_: int) -> dict[str, Any] | None:
        """How a round ended: `state` after it, `factors` and `excluded` peers; None: it is to be done."""
        return self._moves.get((cell.rule, cell.condition, round_))

    def add_move(self, cell: Cell, round_: int, **outcome: Any) -> None:
        self._append(entry := {"kind": "move", **asdict(cell), "round": round_, **outcome})
        self._take(entry)

    def correct(self, state_hash: str) -> Correct | None:
        return self._correct.get(state_hash)

    def add_correct(self, state_hash: str, correct: Correct) -> None:
        rows = ["".join("01"[int(right)] for right in task) for task in correct]
        self._append(entry := {"kind": "score", "state": state_hash, "correct": rows})
        self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        if entry["kind"] == "move":
            self._moves[entry["rule"], entry["condition"], entry["round"]] = entry
        else:
            self._correct[entry["state"]] = tuple(
                np.array([c == "1" for c in rows]) for rows in entry["correct"]
            )

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Study:
    """All cells, round by round: those that stand at the same state share its finetunings."""

    def __init__(
        self,
        settings: Settings,
        encoder: Path,
        tasks: Mapping[str, TaskData],
        out: Path,
        say: Callable[[str], None],
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.settings, self._say = settings, say
        self._layout, self._base = load_backbone(encoder)
        self.base_hash = make_manifest(self._layout, self._base).state_hash
        self.journal = Journal(out / "journal.jsonl", settings, self.base_hash)
        self._states = out / "states"
        self._states.mkdir(exist_ok=True)
        numbered = {name: settings.seed + i for i, name in enumerate((*settings.honest, *settings.liars))}

        def peer(name: str, data: TaskData) -> LocalPeer:
            base = (self._layout, self._base)
            return LocalPeer(name, data, encoder, base, settings.sizes, numbered[name])

        self._peers = {name: peer(name, tasks[name]) for name in numbered}
        self._misled = {
            name: peer(name, shuffled_labels(tasks[name], numbered[name])) for name in settings.liars
        }

    def run(self, cells: Sequence[Cell]) -> None:
        for round_ in range(1, self.settings.num_rounds + 1):
            todo: dict[str, list[Cell]] = {}
            for cell in cells:
                if self.journal.move(cell, round_) is None:
                    todo.setdefault(self._state_hash(cell, round_ - 1), []).append(cell)
            for number, (state_hash, here) in enumerate(todo.items(), start=1):
                self._say(f"round {round_}: state {number} of {len(todo)}, for {_names(here)}")
                self._move(state_hash, here, round_)
            self._forget_all_but({self._state_hash(cell, round_) for cell in cells})

    def score(self, cells: Sequence[Cell]) -> None:
        final = {self.base_hash, *(self._state_hash(cell, self.settings.num_rounds) for cell in cells)}
        unscored = sorted(state_hash for state_hash in final if self.journal.correct(state_hash) is None)
        for number, state_hash in enumerate(unscored, start=1):
            self._say(f"scoring state {number} of {len(unscored)}")
            state = self._load(state_hash)
            correct = tuple(self._peers[name].correct(state) for name in self.settings.honest)
            self.journal.add_correct(state_hash, correct)
        self._forget_all_but(set())

    def result(self, cell: Cell) -> Correct:
        correct = self.journal.correct(self._state_hash(cell, self.settings.num_rounds))
        assert correct is not None
        return correct

    def _move(self, state_hash: str, cells: Sequence[Cell], round_: int) -> None:
        """From one state to the next of each cell."""
        settings, state = self.settings, self._load(state_hash)
        conditions = {cell.condition for cell in cells}
        honest = {name: self._peers[name].delta(state, round_) for name in settings.honest}
        own: dict[str, torch.Tensor] = {}
        if conditions & {"clean", "flipped", "x100"}:
            own = {name: self._peers[name].delta(state, round_) for name in settings.liars}
        honest_mean = _shifted_mean(list(honest.values()), 0.0)
        for condition in CONDITIONS:
            here = [cell for cell in cells if cell.condition == condition]
            if not here:
                continue
            group = {**honest, **self._others(condition, list(honest.values()), own, state, round_)}
            members = self._members(group, round_)
            for cell in here:
                self._fuse(cell, members, state, round_, honest_mean)

    def _others(
        self, condition: str, honest: list[torch.Tensor], own: Group, state: torch.Tensor, round_: int
    ) -> Group:
        if condition == "six":
            return {}
        if condition == "shuffled":
            return {name: peer.delta(state, round_) for name, peer in self._misled.items()}
        seed = 1_000 * self.settings.seed + 10 * round_
        return lies(condition, self.settings.liars, honest, own, seed)

    def _members(self, group: Group, round_: int) -> dict[str, Member]:
        """Who diverged sits the round out, as in a real session."""
        codec = CODECS["fp32"]
        return {
            name: Member(
                self._peers[name].identity.peer_id, 1.0, self._peers[name].prepare(delta, codec, round_)
            )
            for name, delta in group.items()
            if bool(torch.isfinite(delta).all())
        }

    def _fuse(
        self,
        cell: Cell,
        members: Mapping[str, Member],
        state: torch.Tensor,
        round_: int,
        honest_mean: torch.Tensor,
    ) -> None:
        aggregation, screening = RULES[cell.rule]
        fusion = fuse(list(members.values()), aggregation=aggregation, screening=screening)
        outgoing = next(iter(members.values())).outgoing
        fused = fusion.delta(outgoing.grid, outgoing.codec)
        along, aside = _along(fused, honest_mean)
        flat = outer_step("plain", state, fused, lr=1.0, momentum=0.0, out=fused)
        state_hash = make_manifest(self._layout, flat).state_hash
        file = self._states / f"{state_hash}.safetensors"
        if not file.exists():
            save_file({"flat": flat}, file)
        self.journal.add_move(
            cell,
            round_,
            state=state_hash,
            along=along,
            aside=aside,
            factors=dict(zip(members, fusion.plan.factors, strict=True)),
            excluded={name: why for name, why in zip(members, fusion.plan.reasons, strict=True) if why},
        )

    def _state_hash(self, cell: Cell, round_: int) -> str:
        move = self.journal.move(cell, round_)
        return self.base_hash if move is None else str(move["state"])

    def _load(self, state_hash: str) -> torch.Tensor:
        if state_hash == self.base_hash:
            return self._base
        return load_file(self._states / f"{state_hash}.safetensors")["flat"]

    def _forget_all_but(self, kept: set[str]) -> None:
        for file in self._states.glob("*.safetensors"):
            if file.stem not in kept:
                file.unlink()


def print_deltas(study: Study, rules: Sequence[str], conditions: Sequence[str], console: Console) -> None:
    shown = Table(
        title="First round: share of the honest mean in the fused delta, and what points elsewhere (in its"
        " lengths); contributions of liars/others left out",
        title_justify="left",
    )
    for column in ("rule", *conditions):
        shown.add_column(column, justify="left" if column == "rule" else "right")
    for rule in rules:
        row = []
        for condition in conditions:
            move = study.journal.move(Cell(rule, condition), 1)
            assert move is not None
            left_out = _share(_left_out(study, range(1, 2), Cell(rule, condition)))
            row.append(f"{move['along']:.2f} {move['aside']:.2f} {left_out}".rstrip())
        shown.add_row(rule, *row)
    console.print(shown)


def summary(
    study: Study, settings: Settings, rules: Sequence[str], conditions: Sequence[str]
) -> dict[str, Any]:
    """Per rule: accuracy of each condition, in percent, and what tells whether the rule holds, in points."""
    base = study.journal.correct(study.base_hash)
    assert base is not None
    table: dict[str, Any] = {"base": mean_accuracy(base), "rules": {}}
    for rule in rules:
        results = {condition: study.result(Cell(rule, condition)) for condition in conditions}
        table["rules"][rule] = {
            "accuracy": {condition: mean_accuracy(correct) for condition, correct in results.items()},
            "against_six": {
                condition: paired_difference(correct, results["six"])
                for condition, correct in results.items()
                if condition in ATTACKS
            },
            "against_mean": {
                condition: paired_difference(results[condition], study.result(Cell("mean", condition)))
                for condition in ("clean", "six")
            },
            "left_out": {
                c: _left_out(study, range(1, settings.num_rounds + 1), Cell(rule, c)) for c in conditions
            },
        }
    return table


def print_summary(table: Mapping[str, Any], conditions: Sequence[str], console: Console) -> None:
    attacks = [condition for condition in ATTACKS if condition in conditions]
    plain = Table(
        title="Without liars: head-only accuracy, %, mean of the six honest tasks", title_justify="left"
    )
    for column in ("rule", "8 honest", "to mean", "6 honest", "to mean"):
        plain.add_column(column, justify="left" if column == "rule" else "right")
    lying = Table(
        title="Two liars of eight: points of head-only accuracy to the six alone (standard error;"
        " contributions of liars/others left out)",
        title_justify="left",
    )
    for column in ("rule", *attacks, "worst"):
        lying.add_column(column, justify="left" if column == "rule" else "right")
    for rule, row in table["rules"].items():
        accuracy, costs = row["accuracy"], row["against_mean"]
        figures = (accuracy["clean"], costs["clean"], accuracy["six"], costs["six"])
        plain.add_row(rule, *(_points(f) if isinstance(f, tuple | list) else f"{f:.2f}" for f in figures))
        cells = [f"{_points(row['against_six'][a])} {_share(row['left_out'][a])}" for a in attacks]
        worst = min((row["against_six"][a][0] for a in attacks), default=0.0)
        verdict = "holds" if worst >= -TARGET_POINTS else "FAILS"
        lying.add_row(rule, *cells, f"{worst:+.2f} {verdict}")
    console.print(f"Base model, before any round: {table['base']:.2f} %")
    console.print(plain)
    console.print(lying)


# ---- helpers ------------------------------------------------------------------------------


def _shifted_mean(honest: Sequence[torch.Tensor], z: float) -> torch.Tensor:
    """mean + z std, coordinate by coordinate."""
    mean, variance = torch.zeros_like(honest[0]), torch.zeros_like(honest[0])
    for delta in honest:
        mean += delta / len(honest)
    for delta in honest:
        variance += (delta - mean).square_() / len(honest)
    return mean.add_(variance.sqrt_(), alpha=z)


def _along(fused: torch.Tensor, honest_mean: torch.Tensor) -> tuple[float, float]:
    """How many times the mean is in `fused`, and the length of the rest, in lengths of the mean."""
    square = float(torch.dot(honest_mean, honest_mean))
    along = float(torch.dot(fused, honest_mean)) / square
    rest = fused - along * honest_mean
    return along, float(torch.linalg.vector_norm(rest)) / square**0.5


def _left_out(study: Study, rounds: range, cell: Cell) -> tuple[int, int]:
    """Contributions of liars, and of others, that screening left out."""
    moves = [study.journal.move(cell, round_) for round_ in rounds]
    names = [name for move in moves if move is not None for name in move["excluded"]]
    liars = () if cell.condition == "clean" else study.settings.liars
    num_liars = sum(name in liars for name in names)
    return num_liars, len(names) - num_liars


def _names(cells: Sequence[Cell]) -> str:
    return f"{cells[0].rule}/{cells[0].condition}" + (f" and {len(cells) - 1} more" if len(cells) > 1 else "")


def _points(figure: Sequence[float]) -> str:
    return f"{figure[0]:+.2f} ({figure[1]:.2f})"


def _share(left_out: Sequence[int]) -> str:
    return f"{left_out[0]}/{left_out[1]}" if any(left_out) else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.byzantine", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2/train.csv and so on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="goes on where it stopped")
    parser.add_argument("--model", type=Path, help="directory of an encoder (default: the packaged one)")
    parser.add_argument("--honest", nargs="+", default=HONEST, metavar="TASK")
    parser.add_argument("--liars", nargs="+", default=LIARS, metavar="TASK")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--conditions", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="ATTACK")
    parser.add_argument("--only-deltas", action="store_true", help="no accuracies: the first table only")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--round-examples", type=positive_int, default=64)
    parser.add_argument("--train-examples", type=positive_int, default=160)
    parser.add_argument("--eval-examples", type=positive_int, default=256)
    parser.add_argument("--probe-examples", type=positive_int, default=64)
    parser.add_argument("--learning-rate", type=positive, default=3e-4)
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--max-length", type=positive_int, default=32)
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse(arguments)


def _main(flags: argparse.Namespace) -> int:
    torch.set_num_threads(flags.threads)
    datasets.disable_progress_bars()
    console, started_at = Console(highlight=False, width=180), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - started_at:5.0f} s  {line}", soft_wrap=True)

    sizes = Sizes(
        **{
            name: getattr(flags, name)
            for name in ("train_examples", "eval_examples", "round_examples", "probe_examples")
        },
        learning_rate=flags.learning_rate,
        batch_size=flags.batch_size,
        max_length=flags.max_length,
    )
    settings = Settings(sizes, flags.rounds, flags.seed, tuple(flags.honest), tuple(flags.liars))
    say(f"honest: {', '.join(settings.honest)}; liars: {', '.join(settings.liars)}")
    say(f"seed {settings.seed}, {settings.num_rounds} rounds, {sizes}")
    tasks = load_tasks(flags.data_dir, (*settings.honest, *settings.liars), sizes, settings.seed)
    study = Study(settings, flags.model or embedded_encoder(), tasks, flags.out, say)
    conditions = ("clean", "six", *flags.conditions)
    rules = list(dict.fromkeys(("mean", *flags.rules)))  # what a rule costs is measured against the mean
    cells = [Cell(rule, condition) for rule in rules for condition in conditions]
    study.run(cells)
    print_deltas(study, rules, conditions, console)
    if flags.only_deltas:
        return 0
    study.score(cells)
    table = summary(study, settings, rules, conditions)
    print_summary(table, conditions, console)
    results = {"settings": asdict(settings), **table, "seconds": round(time.monotonic() - started_at)}
    (flags.out / "byzantine.json").write_text(json.dumps(results, indent=2) + "\n")
    say(f"everything is in {flags.out / 'byzantine.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
