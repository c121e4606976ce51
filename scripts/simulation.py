"""What would a swarm make of these data? A whole run in one process, with one model in memory at a time.

    who is here -> decide(): who trains -> finetune, one after another -> decide(): fuse -> commit

The functions are those of real peers: `coordinator.rounds.decide` on heartbeats, `peer.learner.Learner`,
`peer.manifest.prepare`, `peer.fusion.fuse`, `peer.outer.outer_step`, and a chain of commits that is signed
and verified. Replaced are the transport, the clock (a round takes a minute) and the votes: everybody agrees.
What a network adds is left out: parts that get lost, kept deltas, audits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coordinator.chain import Chain, build_chain
from coordinator.errors import StateError, UsageError
from coordinator.identity import Identity
from coordinator.membership import Member
from coordinator.records import (
    Commit,
    Contribution,
    PeerRecord,
    Phase,
    RecordError,
    SignedCommit,
    parse_record,
    sign,
    signature_text,
)
from coordinator.rounds import Action, Finetune, Fuse, Standing, decide
from coordinator.spec import RunSpec
from peer.compression import CODECS
from peer.data import TaskData
from peer.feedback import ErrorFeedback, cut_to_usual_norm
from peer.finetune import Budget, FinetuneConfig, FinetuneResult
from peer.fusion import Member as Sender
from peer.fusion import fuse
from peer.genesis import State
from peer.learner import Evaluation, Learner
from peer.manifest import Outgoing, prepare
from peer.outer import outer_step
from scripts.local_peers import identity_of, noise_as_long_as, shuffled_labels

ROUND_SECONDS = 60.0  # of the clock that all share
Harm = Literal["none", "noise", "flipped", "x100", "shuffled"]
HARMS: dict[Harm, str] = {
    "none": "honest",
    "noise": "sends normal noise, as long as what it learned",
    "flipped": "sends minus what it learned",
    "x100": "sends 100 times what it learned",
    "shuffled": "learns from labels dealt out anew",
}
MAX_SPEED = 10.0
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Contributor:
    """One simulated peer."""

    name: str  # unique; its key, and so its luck in the draw, follows from it and the seed
    data: TaskData
    seed: int  # of its own draws: batches, heads
    speed: float = 1.0  # times the budget it has done when the round closes, as where only time closes it
    harm: Harm = "none"  # see HARMS

    def __post_init__(self) -> None:
        if not 0 < self.speed <= MAX_SPEED:
            raise UsageError(
                f"the speed of {self.name} must be above 0 and at most {MAX_SPEED:g}, not {self.speed}"
            )


@dataclass(frozen=True)
class Work:
    """What one contributor did in a round."""

    name: str
    base: Evaluation  # of the round's base model, on its own held-out split
    result: FinetuneResult
    norm: float  # of the delta as sent; NaN when it was not finite, and so not sent
    factor: float  # 0 to 1: what rule and screening left of it


@dataclass(frozen=True)
class Outcome:
    """One tick of the clock. Without a commit there were too few peers."""

    tick: int  # from 1
    round: int  # after the tick
    state_hash: str  # after the tick
    committed: bool
    present: tuple[str, ...]
    works: tuple[Work, ...]
    fused_norm: float  # of the fused delta; 0 without a commit


@dataclass
class _Peer:
    contributor: Contributor
    identity: Identity
    learner: Learner
    feedback: ErrorFeedback = field(default_factory=ErrorFeedback)
    residual_before: torch.Tensor | None = None  # what its last contribution had to make up for


class SimulatedSwarm:
    """A run from its first state on. Deterministic by spec, contributors, settings and number of threads."""

    def __init__(
        self,
        spec: RunSpec,
        model_dir: Path,
        first: State,
        contributors: Sequence[Contributor],
        config: FinetuneConfig,
        *,
        eval_examples: int,
        seed: int,
        churn: float = 0.0,
        drop: float = 0.0,
        trim: float = 0.0,
        on_progress: Progress = lambda _: None,
    ) -> None:
        """`churn`: the probability that a peer is away, drawn per tick. `drop`, `trim`: see `dropped`,
        `trimmed`; what they take away is not sent later. Raises UsageError, SpecError.
        """
        if first.state_hash != spec.backbone_hash:
            raise UsageError("the first state is not the one that the spec names")
        if len({c.name for c in contributors}) != len(contributors):
            raise UsageError("two contributors have the same name")
        for name, share in (("churn", churn), ("drop", drop), ("trim", trim)):
            if not 0 <= share < 1:
                raise UsageError(f"{name} must be from 0 up to 1, not {share}")
        self.spec, self.state, self.chain, self.tick = spec, first, Chain(spec), 0
        self._first, self._seed, self._churn = first, seed, churn
        self._drop, self._trim = drop, trim
        self._peers: dict[str, _Peer] = {}  # by peer id
        backbone = first.manifest.layout.backbone
        for number, contributor in enumerate(contributors, start=1):
            identity, data = identity_of(contributor.name, seed), contributor.data
            learner = Learner(
                shuffled_labels(data, contributor.seed) if contributor.harm == "shuffled" else data,
                model_dir,
                backbone,
                first.backbone,
                config,
                eval_examples=eval_examples,
                seed=contributor.seed,
            )
            learner.unload()
            self._peers[identity.peer_id] = _Peer(contributor, identity, learner)
            on_progress(number / len(contributors))

    @property
    def is_done(self) -> bool:
        return self.chain.round >= self.spec.num_rounds

    def step(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Progress = lambda _: None,
    ) -> Outcome | None:
        """One round, or a tick in which there are too few for one.

        None when `should_stop` said so: then nothing has changed but heads, so that a run that is to go on
        bit for bit is loaded again. Raises ValueError when all rounds are done.
        """
        if self.is_done:
            raise ValueError("all rounds are done")
        self.tick += 1
        present = [peer_id for peer_id in sorted(self._peers) if self._is_here(self._peers[peer_id])]
        drawn = [p for p in present if isinstance(self._decide(p, present, "finetuning"), Finetune)]
        works, outgoing, sums = {}, {}, {}
        for number, peer_id in enumerate(drawn):
            progress = _portion(on_progress, number, len(drawn))
            done = self._finetune(self._peers[peer_id], should_stop, progress)
            if done is None:
                self.tick -= 1
                return None
            works[peer_id], sent = done
            if sent is not None:
                outgoing[peer_id], sums[peer_id] = sent
        fused_norm, factors = self._fuse(works, outgoing, sums)
        return Outcome(
            tick=self.tick,
            round=self.chain.round,
            state_hash=self.state.state_hash,
            committed=bool(factors),
            present=tuple(self._peers[p].contributor.name for p in present),
            works=tuple(_with_factor(works[p], factors.get(p, 0.0)) for p in drawn),
            fused_norm=fused_norm,
        )

    # ---- a round

    @property
    def _now(self) -> float:
        return self.spec.created_at + self.tick * ROUND_SECONDS

    def _is_here(self, peer: _Peer) -> bool:
        return _uniform(self._seed, "here", self.tick, peer.contributor.name) >= self._churn

    def _decide(
        self,
        peer_id: str,
        here: Sequence[str],
        phase: Phase,
        num_examples: Mapping[str, int] | None = None,
    ) -> Action:
        """What a peer makes of the heartbeats of the others. Who is away or was not drawn has resigned."""
        examples = num_examples or {}
        others = [self._member(p, phase, examples.get(p, 0)) for p in here if p != peer_id]
        return decide(
            self.chain,
            Standing(peer_id, is_ready=phase == "ready", entered_at=self._now),
            others,
            self._now,
            absent=self.chain.cohort - set(here),
        )

    def _member(self, peer_id: str, phase: Phase, num_examples: int) -> Member:
        record = PeerRecord(
            run=self.spec.digest,
            phase=phase,
            round=self.chain.round,
            state_hash=self.chain.state_hash,
            commit=self.chain.tip,
            num_examples=num_examples,
            entered_at=self._now,
            issued_at=self._now,
            expires_at=self._now + self.spec.lease_seconds,
        )
        return Member(peer_id, record, sign(record, self._peers[peer_id].identity).to_json())

    def _finetune(
        self, peer: _Peer, should_stop: Callable[[], bool], on_progress: Progress
    ) -> tuple[Work, tuple[Outgoing, torch.Tensor] | None] | None:
        """As `Session._one_round`: evaluate, start the head, finetune, encode."""
        learner, round_, contributor = peer.learner, self.chain.round + 1, peer.contributor
        learner.load_backbone(self.state.backbone)
        base = learner.evaluate_base(round_, on_progress=lambda f: on_progress(0.2 * f))
        result = learner.finetune(
            self._budget(contributor.speed),
            round_=round_,
            should_stop=should_stop,
            on_progress=lambda f: on_progress(0.2 + 0.8 * f),
        )
        if should_stop():
            learner.unload()
            return None
        delta = learner.export_backbone()
        learner.unload()
        delta -= self.state.backbone
        draw = int(_uniform(self._seed, "noise", self.tick, contributor.name) * 2**53)
        delta = _harmed(trimmed(dropped(delta, self._drop, draw), self._trim), contributor.harm, draw)
        if result.num_examples == 0 or not bool(torch.isfinite(delta).all()):
            return Work(contributor.name, base, result, float("nan"), 0.0), None
        peer.residual_before = peer.feedback.sent
        total = peer.feedback.add_to(delta)
        outgoing = prepare(
            total,
            CODECS[self.spec.compression],
            peer.identity,
            run=self.spec.digest,
            round=round_,
            previous=self.chain.tip,
        )
        return Work(contributor.name, base, result, outgoing.manifest.norm, 0.0), (outgoing, total)

    def _budget(self, speed: float) -> Budget:
        examples, seconds = self.spec.round_examples, self.spec.round_seconds
        return Budget(
            None if examples is None else max(1, round(examples * speed)),
            None if seconds is None else seconds * speed,
        )

    def _fuse(
        self, works: Mapping[str, Work], outgoing: Mapping[str, Outgoing], sums: Mapping[str, torch.Tensor]
    ) -> tuple[float, dict[str, float]]:
        """(norm of the fused delta, factors by peer); (0, {}) when there is no quorum."""
        ready = sorted(outgoing)
        if not ready:
            return 0.0, {}
        examples = {peer_id: works[peer_id].result.num_examples for peer_id in ready}
        action = self._decide(ready[0], ready, "ready", examples)
        if not isinstance(action, Fuse):
            self._give_back(ready)
            return 0.0, {}
        first = outgoing[ready[0]]
        owned = first.grid.owned(list(action.members))
        owner = {part: peer_id for peer_id, parts in owned.items() for part in parts}
        before = {p: self._peers[o].feedback.reduced[p] for p, o in owner.items() if self._has_residual(o, p)}
        weights = {p: self.spec.contribution_weight(examples[p]) for p in action.members}
        fusion = fuse(
            [Sender(p, weights[p], outgoing[p]) for p in action.members],
            aggregation=self.spec.aggregation,
            screening=self.spec.screening,
            residuals=before,
        )
        delta = fusion.delta(first.grid, first.codec)
        norm = float(torch.linalg.vector_norm(delta))
        missing = {  # what a rule leaves out is in no part of the result
            p: ((0, first.grid.num_parts),) if weight == 0 else ()
            for p, weight in zip(action.members, fusion.plan.weights, strict=True)
        }
        self._commit(action, delta, [
            Contribution(
                peer=p,
                num_examples=examples[p],
                weight=weights[p],
                norm=outgoing[p].manifest.norm,
                factor=f,
                missing=missing[p],
            )
            for p, f in zip(action.members, fusion.plan.factors, strict=True)
        ])  # fmt: skip
        for peer_id in action.members:
            mine = {part: fusion.residuals[part] for part in owned[peer_id] if part in fusion.residuals}
            feedback = self._peers[peer_id].feedback
            feedback.committed(sums[peer_id], outgoing[peer_id], missing[peer_id], mine)
            if feedback.sent is not None:
                feedback.sent = cut_to_usual_norm(feedback.sent, self.chain)
        for peer_id, peer in self._peers.items():
            if peer_id not in action.members:  # who is overtaken cannot prove what it had to make up for
                peer.feedback.forget_reduced()
        return norm, dict(zip(action.members, fusion.plan.factors, strict=True))

    def _has_residual(self, owner: str, part: int) -> bool:
        return part in self._peers[owner].feedback.reduced

    def _give_back(self, ready: Sequence[str]) -> None:
        """A round without a commit: what was cut off before stays cut off, the finetuning is lost."""
        for peer_id in ready:
            self._peers[peer_id].feedback.sent = self._peers[peer_id].residual_before

    def _commit(self, fuse_: Fuse, delta: torch.Tensor, contributions: Sequence[Contribution]) -> None:
        spec = self.spec
        flat = outer_step(
            spec.outer_optimizer, self.state.flat, delta, lr=spec.outer_lr, momentum=spec.outer_momentum
        )
        self.state = State.of(self.state.manifest.layout, flat)
        commit = Commit(
            run=spec.digest,
            round=self.chain.round + 1,
            attempt=0,
            previous=self.chain.tip,
            state_hash=self.state.state_hash,
            contributors=list(contributions),
            electorate=list(fuse_.electorate),
            committed_at=self._now,
        )
        signers = {*fuse_.members}
        signatures = {p: signature_text(commit, self._peers[p].identity) for p in sorted(signers)}
        self.chain = self.chain.extended(SignedCommit(commit=commit, signatures=signatures))

    # ---- keeping

    def save(self, path: Path) -> None:
        """All that `load` needs, in one file that replaces the last one whole. Raises StateError."""
        tensors = {"state": self.state.flat}
        for peer in self._peers.values():
            name = peer.contributor.name
            tensors |= {f"head/{name}/{key}": t for key, t in peer.learner.head_state().items()}
            tensors |= {f"reduced/{name}/{key}": t for key, t in peer.feedback.reduced_by_name().items()}
            if peer.feedback.sent is not None:
                tensors[f"sent/{name}"] = peer.feedback.sent
        commits = [signed.model_dump(mode="json") for signed in self.chain.commits]
        metadata = {"run": self.spec.digest, "tick": str(self.tick), "commits": json.dumps(commits)}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file({key: t.contiguous() for key, t in tensors.items()}, partial, metadata)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise StateError(f"cannot write {path}: {error}") from error

    def load(self, path: Path) -> None:
        """Go on from `save`. Raises StateError for the file of another run, or one that is damaged."""
        try:
            with safe_open(path, "pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if metadata["run"] != self.spec.digest:
                raise StateError(f"{path} is of another run: its spec, model or seed differ")
            commits = [parse_record(commit, SignedCommit) for commit in json.loads(metadata["commits"])]
            chain = build_chain(self.spec, commits)
            state = State.of(self._first.manifest.layout, tensors["state"])
        except (OSError, SafetensorError, RecordError, KeyError, ValueError) as error:
            raise StateError(f"{path} cannot be read: {error}; delete it to begin anew") from error
        if state.state_hash != chain.state_hash:
            raise StateError(f"{path} is damaged: its state is not that of its last commit")
        self.chain, self.state, self.tick = chain, state, int(metadata["tick"])
        for peer in self._peers.values():
            name = peer.contributor.name
            peer.learner.load_head_state(_below(tensors, f"head/{name}/"))
            peer.feedback = ErrorFeedback.of(tensors.get(f"sent/{name}"), _below(tensors, f"reduced/{name}/"))


def dropped(delta: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """(n,) float32, in place: each value is 0 with probability `share`, else 1 / (1 - share) times itself.

    DARE: Yu et al. 2024, "Language Models are Super Mario", section 3.2.
    """
    if share > 0:
        kept = torch.rand(delta.numel(), generator=torch.Generator().manual_seed(seed)) >= share
        delta.mul_(kept).div_(1 - share)
    return delta


def trimmed(delta: torch.Tensor, share: float) -> torch.Tensor:
    """(n,) float32, in place: the `share` of smallest magnitude is set to 0, and all that is as small.

    The first step of TIES: Yadav et al. 2023, section 4; `disjoint_mean` is the other two.
    """
    if share > 0 and delta.isfinite().all():
        position = max(1, round(share * delta.numel()))
        delta[delta.abs() <= delta.abs().kthvalue(position).values] = 0.0
    return delta


def _harmed(delta: torch.Tensor, harm: Harm, seed: int) -> torch.Tensor:
    if harm == "flipped":
        return delta.neg_()
    if harm == "x100":
        return delta.mul_(100.0)
    if harm == "noise":
        return noise_as_long_as(float(torch.linalg.vector_norm(delta)), delta.numel(), seed)
    return delta


def _uniform(*key: object) -> float:
    """A number in [0, 1) that follows from `key`."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _with_factor(work: Work, factor: float) -> Work:
    return Work(work.name, work.base, work.result, work.norm, factor)


def _portion(on_progress: Progress, number: int, total: int) -> Progress:
    return lambda fraction: on_progress((number + fraction) / total)


def _below(tensors: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
