"""What to do now? `decide` is one pure function of the spec, the chain, the heartbeats and the time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coordinator.chain import Chain, required_signatures
from coordinator.membership import Member
from coordinator.spec import RunSpec

TRAINING_PHASES = frozenset({"finetuning", "ready", "evaluating"})


@dataclass(frozen=True)
class Standing:
    """Where I am in the round that follows my chain."""

    peer_id: str
    is_ready: bool  # finetuned, with a delta to contribute
    entered_at: float  # instant at which I began the round


@dataclass(frozen=True)
class Stop:
    reason: str


@dataclass(frozen=True)
class CatchUp:
    """Others claim another chain; to be verified before it wins anything."""

    peer_ids: tuple[str, ...]


@dataclass(frozen=True)
class Finetune:
    pass


@dataclass(frozen=True)
class Alone:
    """Ready, and fewer live peers than the quorum."""


@dataclass(frozen=True)
class Wait:
    reason: str


@dataclass(frozen=True)
class Fuse:
    members: tuple[str, ...]  # who is ready, ranked: the leader of attempt a is members[a % len]
    electorate: tuple[str, ...]  # whose majority must sign, sorted

    def leader(self, attempt: int) -> str:
        return self.members[attempt % len(self.members)]


Action = Stop | CatchUp | Finetune | Alone | Wait | Fuse


def decide(
    chain: Chain, me: Standing, others: Sequence[Member], now: float, *, known_tips: Collection[str] = ()
) -> Action:
    """The next step of a peer in the run.

    `others` are the live members, by heartbeat. `known_tips` are hashes of commits that need no
    looking at: my chain's own, and those of chains that were compared with it and lost.
    """
    spec = chain.spec
    known = {*known_tips, chain.tip}
    elsewhere = tuple(m.peer_id for m in others if m.record.round > 0 and m.record.commit not in known)
    if elsewhere:
        return CatchUp(elsewhere)
    if chain.round >= spec.num_rounds:
        return Stop("all rounds are committed")
    if not me.is_ready:
        return _finetune_or_wait(chain, me, others)
    trainers = [m for m in others if trains_on(m, chain)]
    if len(trainers) + 1 < spec.min_peers:
        return Alone()
    drawn = draw(chain, [*(m.peer_id for m in trainers), me.peer_id])
    if me.peer_id not in drawn:
        return Wait("not drawn this round")
    ready = {m.peer_id for m in trainers if m.record.phase == "ready"} | {me.peer_id}
    members = tuple(peer for peer in drawn if peer in ready)
    electorate = tuple(sorted(voters_of(chain, others, drawn) or drawn))
    if (missing := _missing(members, electorate, spec)) is not None:
        return Wait(missing)
    entered = [m.record.entered_at for m in trainers if m.peer_id in drawn] + [me.entered_at]
    if len(members) == len(drawn) or now >= round_deadline(chain, entered):
        return Fuse(members=members, electorate=electorate)
    return Wait(f"{len(drawn) - len(members)} of {len(drawn)} peers still finetune")


def trains_on(member: Member, chain: Chain) -> bool:
    """Whether a member works on the round that follows `chain`."""
    return member.record.commit == chain.tip and member.record.phase in TRAINING_PHASES


def rank(chain: Chain, peer_id: str) -> str:
    """A draw that nobody can choose before the previous commit: lowest hash(spec, previous commit, peer)."""
    return hashlib.sha256(f"{chain.spec.digest}/{chain.tip}/{peer_id}".encode()).hexdigest()


def draw(chain: Chain, candidates: Collection[str]) -> tuple[str, ...]:
    """Who of the candidates takes part in the round: at most max_peers, ranked."""
    return tuple(sorted(candidates, key=lambda peer: rank(chain, peer))[: chain.spec.max_peers])


def voters_of(chain: Chain, others: Collection[Member], drawn: Collection[str]) -> frozenset[str]:
    """The previous cohort, less those silent beyond their lease and those who take no part now.

    Their majority signs the next commit; when there are none (the first round, or all are gone),
    that of all drawn. Who takes no part says so in its heartbeat: it waits, joins, is done, or was
    not drawn. Who trains on another commit counts: it may be committing a round without me.
    """
    elsewhere = {
        m.peer_id for m in others if m.record.phase in TRAINING_PHASES and m.record.commit != chain.tip
    }
    return chain.cohort & (elsewhere | set(drawn))


def round_deadline(chain: Chain, entered: Sequence[float]) -> float:
    """Instant at which the round closes for those who are ready: the spec's limit after it could begin.

    It could begin with the previous commit, but not before a quorum of peers had entered.
    """
    if len(entered) < chain.spec.min_peers:
        return math.inf
    return max(chain.committed_at, sorted(entered)[chain.spec.min_peers - 1]) + chain.spec.round_limit_seconds


def training_deadline(chain: Chain, me: Standing, others: Sequence[Member]) -> float:
    """When to stop finetuning so as to be ready in time: a twentieth of the limit before the round closes."""
    entered = [m.record.entered_at for m in others if trains_on(m, chain)] + [me.entered_at]
    return round_deadline(chain, entered) - 0.05 * chain.spec.round_limit_seconds


def _finetune_or_wait(chain: Chain, me: Standing, others: Sequence[Member]) -> Action:
    trainers = [m.peer_id for m in others if trains_on(m, chain)]
    if len(trainers) < chain.spec.max_peers:
        return Finetune()
    drawn = draw(chain, [*trainers, me.peer_id])
    return Finetune() if me.peer_id in drawn else Wait("not drawn this round")


def _missing(members: Collection[str], electorate: Collection[str], spec: RunSpec) -> str | None:
    if len(members) < spec.min_peers:
        return f"{len(members)} of at least {spec.min_peers} peers are ready"
    voters = len(set(members) & set(electorate))
    if voters < required_signatures(electorate):
        return f"{voters} of the {required_signatures(electorate)} peers who must sign are ready"
    return None
