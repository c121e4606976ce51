"""What to do now? `decide` is one pure function of the spec, the chain, the heartbeats and the time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coordinator.chain import Chain, required_signatures
from coordinator.membership import TRAINING_PHASES, Member
from coordinator.spec import RunSpec

MAX_COSTLY_PROPOSALS = 2  # of one peer in a round, without a pause: two who propose at once is no attack
MAX_FALTERS = 2  # a leader that was silent so often in a round leads last
MAX_DOUBLINGS = 3  # of the patience with leaders


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


NOT_DRAWN = Wait("not drawn this round")
LEFT_OUT = Wait("left out of this round, as a round that this peer took part in was undone")


@dataclass(frozen=True)
class Fuse:
    members: tuple[str, ...]  # who is ready, ranked: the leader of attempt a is members[a % len]
    electorate: tuple[str, ...]  # whose majority must sign, sorted

    def leader(self, attempt: int) -> str:
        return self.members[attempt % len(self.members)]


class Leaders:
    """Who leads an attempt of this round, as far as one peer can tell: silent leaders come last.

    And whose proposals are heard. Anybody may propose, and a later proposal ends an earlier one; so one who
    proposes again and again could keep all others from ever being done: it never begins, or it ends each
    attempt before that is late, so that nobody gets to name who holds it up. Each of its proposals that cost
    an attempt, beyond the first ones, doubles the time for which it is not heard. To refuse a proposal is
    always safe (`ballot.py`); a leader whose messages are lost, or whose own attempts fail, is heard again.

    Where one leader after the other seems silent it may be the network: each is waited for longer, as in
    Castro & Liskov 1999, section 4.5.2, so that in the end the wait is long enough, whatever the network.
    """

    def __init__(self) -> None:
        self._falters: Counter[str] = Counter()
        self._num_silent = 0  # leaders in this round
        self._num_costly: Counter[str] = Counter()  # accepted proposals that cost an attempt, by author
        self._unheard_until: dict[str, float] = {}  # by author

    def cost_an_attempt(self, author: str, now: float, pause_seconds: float, max_seconds: float) -> None:
        """A proposal of `author` was accepted and never began, or it ended another attempt before its time.

        `pause_seconds`: what one attempt of somebody else takes.
        """
        self._num_costly[author] += 1
        if (excess := self._num_costly[author] - MAX_COSTLY_PROPOSALS) > 0:
            pause = min(max_seconds, pause_seconds * 2.0 ** min(excess - 1, 20))
            self._unheard_until[author] = now + pause

    def in_next_round(self) -> Leaders:
        """Half of what proposals cost is remembered: one who does it in every round is stopped sooner."""
        following = Leaders()
        following._num_costly = Counter({peer: n // 2 for peer, n in self._num_costly.items() if n > 1})
        return following

    def is_heard(self, author: str, now: float) -> bool:
        return now >= self._unheard_until.get(author, now)

    def was_silent(self, leader: str) -> None:
        self._falters[leader] += 1
        self._num_silent += 1

    @property
    def patience(self) -> float:
        """Times what the pace of the calls says: doubled with each silent leader but the first, up to 8."""
        return 2.0 ** min(max(0, self._num_silent - 1), MAX_DOUBLINGS)

    def two_at_once(self) -> None:
        """Somebody else led the attempt that I led: we rank differently. Back to the order that all have.

        Else two peers that were both silent once would forever lead together and wait together.
        """
        self._falters.clear()

    def ranked(self, fuse: Fuse) -> Fuse:
        """Stable: whoever was not silent too often keeps the rank of the draw."""
        members = sorted(fuse.members, key=lambda peer: self._falters[peer] >= MAX_FALTERS)
        return Fuse(tuple(members), fuse.electorate)


Action = Stop | CatchUp | Finetune | Alone | Wait | Fuse


def decide(
    chain: Chain,
    me: Standing,
    others: Sequence[Member],
    now: float,
    *,
    known_tips: Collection[str] = (),
    absent: Collection[str] = (),
    counted: Collection[str] = (),
    left_out: Collection[str] = (),
) -> Action:
    """The next step of a peer in the run.

    `others` are the live members, by heartbeat. `known_tips` are hashes of commits that need no
    looking at: my chain's own, and those of chains that were compared with it and lost. `absent` and
    `counted` say who votes (see `electorate_of`). `left_out` take no part in the next attempt where the
    others can commit without them, though they may vote in the round.
    """
    spec = chain.spec
    known = {*known_tips, chain.tip}
    elsewhere = tuple(m.peer_id for m in others if m.record.round > 0 and m.record.commit not in known)
    if elsewhere:
        return CatchUp(elsewhere)
    if chain.round >= spec.num_rounds:
        return Stop("all rounds are committed")
    barred = barred_from(chain, me.peer_id, others)
    if me.peer_id in barred:
        return LEFT_OUT
    in_training = [m for m in others if trains_on(m, chain) and m.peer_id not in barred]
    if not me.is_ready:
        return _finetune_or_wait(chain, me, in_training, absent)
    if len(in_training) + 1 < spec.min_peers:
        return Alone()
    electorate = electorate_of(chain, me.peer_id, others, absent=absent, counted=counted)
    trainers = [m for m in in_training if m.peer_id not in left_out]
    if _missing({me.peer_id, *(m.peer_id for m in trainers)}, electorate, spec) is not None:
        trainers = in_training  # nothing can be committed without them: better to try again with them
    drawn = draw(chain, [*(m.peer_id for m in trainers), me.peer_id], absent)
    if me.peer_id not in drawn:
        return NOT_DRAWN
    ready = {m.peer_id for m in trainers if m.record.phase == "ready"} | {me.peer_id}
    members = tuple(peer for peer in drawn if peer in ready)
    if (missing := _missing(members, electorate, spec)) is not None:
        return Wait(missing)
    entered = [m.record.entered_at for m in trainers if m.peer_id in drawn] + [me.entered_at]
    if len(members) == len(drawn) or now >= round_deadline(chain, entered):
        return Fuse(members=members, electorate=electorate)
    return Wait(f"{len(drawn) - len(members)} of {len(drawn)} peers still finetune")


def trains_on(member: Member, chain: Chain) -> bool:
    """Whether a member works on the round that follows `chain`."""
    return member.record.commit == chain.tip and member.record.phase in TRAINING_PHASES


def barred_from(chain: Chain, own_peer_id: str, others: Collection[Member]) -> frozenset[str]:
    """Who takes no part in the next fusion because of an undone one; nobody where too few would be left.

    They keep their votes. So nobody can be stuck: a run of those who are here always goes on.
    """
    if not chain.left_out:
        return frozenset()
    here = {own_peer_id, *(m.peer_id for m in others if trains_on(m, chain))}
    is_possible = len(here - chain.left_out.keys()) >= chain.spec.min_peers
    return frozenset(chain.left_out) if is_possible else frozenset()


def rank(chain: Chain, peer_id: str) -> str:
    """A draw that nobody knows before the previous commit: lowest hash(spec, previous commit, peer)."""
    return hashlib.sha256(f"{chain.spec.digest}/{chain.tip}/{peer_id}".encode()).hexdigest()


def draw(chain: Chain, candidates: Collection[str], absent: Collection[str] = ()) -> tuple[str, ...]:
    """Who of the candidates takes part in the round: at most max_peers, ranked.

    Half of the places (never all) are for those of the last round who still have a vote, who are not
    `absent`; the others are for the rest, by rank alone. Of a draw from all, with many candidates one or
    none would be of the last round, and one key could sign a commit with keys that it made up. Each peer is
    drawn as often as by that, on average for two rounds in a row.
    """
    ranked = sorted(candidates, key=lambda peer: rank(chain, peer))
    places, voters = chain.spec.max_peers, chain.cohort.difference(absent)
    num_kept = min((places + 1) // 2, places - 1)
    kept = [peer for peer in ranked if peer in voters][:num_kept]
    rest = [peer for peer in ranked if peer not in kept]
    drawn = {*kept, *rest[: places - len(kept)]}
    return tuple(peer for peer in ranked if peer in drawn)


def electorate_of(
    chain: Chain,
    own_peer_id: str,
    others: Collection[Member],
    *,
    absent: Collection[str],
    counted: Collection[str],
) -> tuple[str, ...]:
    """Whose majority signs the next commit: the previous cohort, less the absent (`Membership.absent`).

    When there are none of them (the first round, or all are gone), those drawn of all who are in training:
    the live `others`, and the `counted`, who are not silent yet (`Voter.counted`). The newcomers among
    them; or all, if those of the previous cohort who had resigned have come back and nobody else is there.
    """
    if voters := chain.cohort - frozenset(absent):
        return tuple(sorted(voters))
    here = {own_peer_id, *(m.peer_id for m in others if trains_on(m, chain))}
    resigned = {m.peer_id for m in others if m.record.resigned == chain.tip}
    voters = frozenset(here).union(counted) - resigned - frozenset(absent)
    return tuple(sorted(draw(chain, voters - chain.cohort or voters or here)))


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


def _finetune_or_wait(
    chain: Chain, me: Standing, in_training: Sequence[Member], absent: Collection[str]
) -> Action:
    trainers = [m.peer_id for m in in_training]
    if len(trainers) < chain.spec.max_peers:
        return Finetune()
    drawn = draw(chain, [*trainers, me.peer_id], absent)
    return Finetune() if me.peer_id in drawn else NOT_DRAWN


def _missing(members: Collection[str], electorate: Collection[str], spec: RunSpec) -> str | None:
    if len(members) < spec.min_peers:
        return f"{len(members)} of at least {spec.min_peers} peers are ready"
    voters = len(set(members) & set(electorate))
    if voters < required_signatures(electorate):
        return f"{voters} of the {required_signatures(electorate)} peers who must sign are ready"
    return None
