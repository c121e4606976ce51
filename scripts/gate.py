"""What does the gate do about a peer that sends plausible harm, and how often is it wrong? In one process.

    python -m scripts.gate --data-dir DATA --out DIR

DATA holds sst2/train.csv and so on. Five peers finetune all-MiniLM-L6-v2 and fuse by the plain mean: some
honest rounds, of which none should be rejected. Then, from the state of each of some rounds, the last peer
sends harm: finetuned on flipped labels under a head that is fitted to the true ones and held there, made as
long as the mean norm of the others. (Labels merely renamed are no attack: a head is private and learns the
new names.) It votes that all is well. Its weight is 1, as under uniform weights, or what the spec's cap lets
it claim where weights go by examples (4 by default). From there on

    without the gate    the round stands, and the next one is attacked again
    with the gate       the members vote as real peers do; the first round that they reject is undone, and
                        fused again without whom `most_deviant` names

Accuracy: head-only, mean of the honest peers, on the rows that they vote with. The functions are those of
real peers: `peer.fusion.fuse`, `peer.gate`, the probe on features.
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

from coordinator.cli import Parser, positive, positive_int, run_main
from coordinator.errors import UsageError
from coordinator.records import Contribution
from peer.compression import CODECS
from peer.data import TaskData
from peer.fusion import Fusion, Member, fuse
from peer.gate import most_deviant, p_value, verdict
from peer.layout import make_manifest
from peer.model import load_backbone
from peer.outer import outer_step
from scripts.demo import embedded_encoder
from scripts.local_peers import LocalPeer, Sizes, flipped_labels, load_tasks

TASKS = ("sst2", "rotten_tomatoes", "imdb", "tweet_sentiment", "amazon_reviews")
LEVEL, SHARE, MIN_VOTERS, MIN_PEERS = 0.01, 0.5, 2, 2  # the defaults of a run spec

Errors = tuple[np.ndarray, ...]  # per peer, of its held-out rows


@dataclass(frozen=True)
class Judged:
    """One round, as its members judged it."""

    round: int
    p_values: Mapping[str, float]  # by peer
    num_rejections: int
    is_rejected: bool
    left_out: str  # whom a roll-back would leave out
    norms: Mapping[str, float]


@dataclass(frozen=True)
class Attack:
    """One attacked round, and the one after it; accuracies in percent, of the honest peers."""

    judged: Judged
    second: Judged  # the attacked round after it, had it stood
    weight: float  # of the attacker; the others have 1
    before: float
    honest: float  # had the attacker been honest
    attacked: float
    next_without_gate: float
    next_with_gate: float  # the same where both stood


class Swarm:
    """Five peers, the last of which can attack."""

    def __init__(self, tasks: Mapping[str, TaskData], encoder: Path, sizes: Sizes, seed: int) -> None:
        self.layout, self.base = load_backbone(encoder)
        self.names = tuple(tasks)
        self.attacker = self.names[-1]

        def peer(name: str, data: TaskData) -> LocalPeer:
            number = seed + self.names.index(name)
            return LocalPeer(name, data, encoder, (self.layout, self.base), sizes, number)

        self._peers = {name: peer(name, data) for name, data in tasks.items()}
        self._liar = peer(self.attacker, flipped_labels(tasks[self.attacker]))
        self._errors: dict[str, Errors] = {}  # by the hash of the state

    def deltas(self, state: torch.Tensor, round_: int, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        return {name: self._peers[name].delta(state, round_) for name in names or self.names}

    def harm(self, state: torch.Tensor, round_: int, others: Sequence[torch.Tensor]) -> torch.Tensor:
        length = float(np.mean([float(torch.linalg.vector_norm(delta)) for delta in others]))
        return self._liar.harmful_delta(state, round_, length)

    def fuse(self, deltas: Mapping[str, torch.Tensor], round_: int, weight: float = 1.0) -> Fusion:
        """`weight`: of the last peer, where the others have 1."""
        members = [
            Member(
                name,
                weight if name == self.attacker else 1.0,
                self._peers[name].prepare(delta, CODECS["fp32"], round_),
            )
            for name, delta in deltas.items()
        ]
        return fuse(members, aggregation="mean", has_gram=True)

    def after(
        self, state: torch.Tensor, deltas: Mapping[str, torch.Tensor], round_: int, weight: float = 1.0
    ) -> torch.Tensor:
        fusion = self.fuse(deltas, round_, weight)
        outgoing = self._peers[self.attacker].prepare(deltas[next(iter(deltas))], CODECS["fp32"], round_)
        return outer_step("plain", state, fusion.delta(outgoing.grid, outgoing.codec), lr=1.0, momentum=0.0)

    def errors(self, state: torch.Tensor) -> Errors:
        """The probe's, on the held-out rows of each peer; once for each state."""
        key = make_manifest(self.layout, state).state_hash
        if key not in self._errors:
            self._errors[key] = tuple(1.0 - self._peers[name].correct(state) for name in self.names)
        return self._errors[key]

    def accuracy(self, state: torch.Tensor) -> float:
        return 100 * float(np.mean([1.0 - rows.mean() for rows in self.errors(state)[:-1]]))

    def judge(
        self,
        before: torch.Tensor,
        after: torch.Tensor,
        deltas: Mapping[str, torch.Tensor],
        round_: int,
        *,
        is_attack: bool,
    ) -> Judged:
        """As the members would: an attacker says that all is well."""
        pairs = zip(self.names, self.errors(before), self.errors(after), strict=True)
        p_values = {name: p_value("classification", one, other) for name, one, other in pairs}
        votes = {name: p < LEVEL for name, p in p_values.items()}
        if is_attack:
            votes[self.attacker] = False
        found = verdict(self.names, votes, share=SHARE, min_voters=MIN_VOTERS, is_over=True)
        assert found is not None
        ids = {name: self._peers[name].identity.peer_id for name in deltas}
        contributions = [Contribution(peer=ids[name], num_examples=1, weight=1.0) for name in deltas]
        named = most_deviant(contributions, self.fuse(deltas, round_).gram, min_left=MIN_PEERS)
        return Judged(
            round=round_,
            p_values=p_values,
            num_rejections=found.num_rejections,
            is_rejected=found.is_rejected,
            left_out="" if named is None else next(n for n in deltas if ids[n] == named.peer),
            norms={name: float(torch.linalg.vector_norm(delta)) for name, delta in deltas.items()},
        )


def attack(
    swarm: Swarm,
    state: torch.Tensor,
    honest: torch.Tensor,
    deltas: Mapping[str, torch.Tensor],
    round_: int,
    weight: float,
) -> Attack:
    """From `state`, whose honest next one is `honest`, made of `deltas`."""
    others = [delta for name, delta in deltas.items() if name != swarm.attacker]
    sent = {**deltas, swarm.attacker: swarm.harm(state, round_, others)}
    attacked = swarm.after(state, sent, round_, weight)
    judged = swarm.judge(state, attacked, sent, round_, is_attack=True)
    again = swarm.deltas(attacked, round_ + 1, swarm.names[:-1])
    again[swarm.attacker] = swarm.harm(attacked, round_ + 1, list(again.values()))
    ungated = swarm.after(attacked, again, round_ + 1, weight)
    second = swarm.judge(attacked, ungated, again, round_ + 1, is_attack=True)
    gated, undone = ungated, judged if judged.is_rejected else second
    if undone.is_rejected:  # from the state before it again, without whom the gate names
        start = state if judged.is_rejected else attacked
        left = [name for name in swarm.names if name != undone.left_out]
        retried = swarm.deltas(start, round_ + 2, [name for name in left if name != swarm.attacker])
        if swarm.attacker in left:
            retried[swarm.attacker] = swarm.harm(start, round_ + 2, list(retried.values()))
        gated = swarm.after(start, retried, round_ + 2, weight)
    states = (state, honest, attacked, ungated, gated)
    return Attack(judged, second, weight, *(swarm.accuracy(one) for one in states))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def study(
    swarm: Swarm,
    num_rounds: int,
    attacked: Sequence[int],
    weights: Sequence[float],
    say: Callable[[str], None],
) -> tuple[list[Judged], list[Attack], list[float]]:
    """Honest rounds, one after another; attacks branch off at some of them."""
    state, rounds, attacks = swarm.base, [], []
    accuracies = [swarm.accuracy(state)]
    for round_ in range(1, num_rounds + 1):
        deltas = swarm.deltas(state, round_)
        following = swarm.after(state, deltas, round_)
        rounds.append(swarm.judge(state, following, deltas, round_, is_attack=False))
        accuracies.append(swarm.accuracy(following))
        last, num_peers = rounds[-1], len(swarm.names)
        say(
            f"round {round_}: accuracy {accuracies[-1]:.1f}, {last.num_rejections} of {num_peers} reject, "
            f"lowest p {min(last.p_values.values()):.3f}"
        )
        for weight in weights if round_ in attacked else ():
            attacks.append(attack(swarm, state, following, deltas, round_, weight))
            one = attacks[-1]
            say(
                f"  weight {weight:g}: {one.before:.1f} -> {one.attacked:.1f}, "
                f"{one.judged.num_rejections} reject; then {one.next_without_gate:.1f}, "
                f"{one.second.num_rejections} reject, {one.second.left_out} would be left out"
            )
        state = following
    return rounds, attacks, accuracies


def print_tables(swarm: Swarm, rounds: Sequence[Judged], attacks: Sequence[Attack], console: Console) -> None:
    wrong = sum(judged.is_rejected for judged in rounds)
    votes = sum(judged.num_rejections for judged in rounds)
    console.print(
        f"honest rounds: {wrong} of {len(rounds)} rejected; {votes} of {len(rounds) * len(swarm.names)} votes"
        " reject one"
    )
    shown = Table(title="Attacked rounds, accuracy of the honest peers in percent", title_justify="left")
    for heading in ("round", "weight", "before", "honest", "attacked", "rejections", "again"):
        shown.add_column(heading)
    for heading in ("next, no gate", "next, gate"):
        shown.add_column(heading, justify="right")
    for one in attacks:
        shown.add_row(
            str(one.judged.round),
            f"{one.weight:g}",
            f"{one.before:.1f}",
            f"{one.honest:.1f}",
            f"{one.attacked:.1f}",
            *(
                f"{judged.num_rejections} of {len(swarm.names)}"
                + (f", undone without {judged.left_out}" if judged.is_rejected else "")
                for judged in (one.judged, one.second)
            ),
            f"{one.next_without_gate:.1f}",
            f"{one.next_with_gate:.1f}",
        )
    console.print(shown)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.gate", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2/train.csv and so on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for gate.json")
    parser.add_argument("--model", type=Path, help="directory of an encoder (default: the packaged one)")
    parser.add_argument(
        "--tasks", nargs="+", default=TASKS, metavar="TASK", help="the last one's peer attacks"
    )
    parser.add_argument("--rounds", type=positive_int, default=20, help="honest ones (default: 20)")
    parser.add_argument(
        "--attacked", type=int, nargs="*", default=[1, 10, 20], metavar="N", help="rounds (default: 1 10 20)"
    )
    parser.add_argument(
        "--attacker-weights",
        type=positive,
        nargs="+",
        default=[1.0, 4.0],
        metavar="W",
        help="each in turn (default: 1 4)",
    )
    parser.add_argument("--round-examples", type=positive_int, default=256)
    parser.add_argument("--train-examples", type=positive_int, default=1024)
    parser.add_argument("--eval-examples", type=positive_int, default=400)
    parser.add_argument("--probe-examples", type=positive_int, default=512)
    parser.add_argument("--learning-rate", type=positive, default=1e-4)
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--max-length", type=positive_int, default=48)
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse(arguments)


def _main(flags: argparse.Namespace) -> int:
    if len(flags.tasks) < 4:
        raise UsageError("name at least four tasks: of fewer, who deviates cannot be told")
    torch.set_num_threads(flags.threads)
    datasets.disable_progress_bars()
    console, started_at = Console(highlight=False, width=150), time.monotonic()

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - started_at:5.0f} s  {line}", soft_wrap=True)

    names = ("train_examples", "eval_examples", "round_examples", "probe_examples")
    sizes = Sizes(
        **{name: getattr(flags, name) for name in names},
        learning_rate=flags.learning_rate,
        batch_size=flags.batch_size,
        max_length=flags.max_length,
    )
    tasks = load_tasks(flags.data_dir, flags.tasks, sizes, flags.seed)
    swarm = Swarm(tasks, flags.model or embedded_encoder(), sizes, flags.seed)
    say(f"{', '.join(swarm.names)}; {swarm.attacker} attacks; seed {flags.seed}, {sizes}")
    rounds, attacks, accuracies = study(swarm, flags.rounds, flags.attacked, flags.attacker_weights, say)
    print_tables(swarm, rounds, attacks, console)
    results: dict[str, Any] = {
        "settings": {**asdict(sizes), "tasks": list(swarm.names), "seed": flags.seed},
        "rule": {"level": LEVEL, "share": SHARE, "min_voters": MIN_VOTERS, "leaves_out": "most_deviant"},
        "accuracies": accuracies,
        "rounds": [asdict(judged) for judged in rounds],
        "attacks": [asdict(one) for one in attacks],
        "seconds": round(time.monotonic() - started_at),
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "gate.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
