"""What does this peer do about the state of a round: its own vote, the verdict, and whom a roll-back names?

The decisions are in `gate.py`, the votes travel in `coordinator/gate_votes.py`; here is what lies between:
which round is judged, until when, and when the gate lets go: when too many roll-backs would follow one
another, or the others do not agree in time.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace

import numpy as np

from coordinator.agreement import Agreement
from coordinator.chain import Chain
from coordinator.network import Network
from coordinator.records import Commit, Exclusion
from coordinator.spec import RunSpec
from peer.display import Reporter
from peer.gate import Verdict, most_deviant, p_value, verdict
from peer.learner import Evaluation
from peer.tasks import TaskKind

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # after the deadline, for votes that were cast in time and are told on
AGREEING_SECONDS = 30.0  # from the first proposal of a roll-back; then this peer lets go
CALL_SECONDS = 15.0  # for what takes milliseconds in the network's thread


@dataclass(frozen=True)
class _Round:
    """The newest commit, as far as this peer judges it."""

    commit: Commit
    began_at: float  # by time.monotonic(): when this peer had its state
    num_rollbacks: int  # in a row before it
    was_there: bool  # in its all-reduce; else it knows no inner products, and agrees to no roll-back
    leaves_out: tuple[Exclusion, ...]
    verdict: Verdict | None = None  # once nothing changes it any more
    told: Verdict | None = None  # what people have been told last
    proposed_at: float | None = None  # when this peer first wanted it undone
    is_let_go: bool = False
    vote: bool | None = None  # the own one: whether it rejects
    p_value: float | None = None


class Gatekeeper:
    """Of one peer in one run. `is_rejected` and `leaves_out` may be asked from any thread."""

    def __init__(
        self, spec: RunSpec, network: Network, agreement: Agreement, reporter: Reporter, kind: TaskKind
    ) -> None:
        self._spec, self._network, self._agreement = spec, network, agreement
        self._reporter, self._kind = reporter, kind
        self._lock = threading.RLock()
        self._round: _Round | None = None

    def begin(self, chain: Chain, *, was_there: bool = False, gram: np.ndarray | None = None) -> None:
        """This peer holds the state of `chain`. `gram`: inner products of the tip's contributions."""
        with self._lock:
            self._round = None
            if not self._spec.gate or not chain.commits or chain.is_rolled_back:
                return
            commit = chain.commits[-1].commit
            named = None
            if self._spec.gate_leaves_out == "most_deviant":
                named = most_deviant(commit.contributors, gram, min_left=self._spec.min_peers)
            self._round = _Round(
                commit=commit,
                began_at=time.monotonic(),
                num_rollbacks=chain.before().num_rollbacks,
                was_there=was_there,
                leaves_out=() if named is None else (named,),
            )

    def vote(self, before: Evaluation, after: Evaluation) -> None:
        """Judge the newest state against the one before it, and tell the others one bit."""
        judged = self._round
        if judged is None or len(after.errors) == 0:
            return
        if self._network.peer_id not in judged.commit.cohort or len(before.errors) != len(after.errors):
            return
        p = p_value(self._kind, before.errors, after.errors)
        rejects = p < self._spec.gate_level
        if time.monotonic() > judged.began_at + self._spec.gate_vote_seconds:
            logger.warning("round %d: too late to vote on it, so it counts as accepted", judged.commit.round)
            return
        self._update(judged, vote=rejects, p_value=p)
        self._reporter.voted(judged.commit.round, rejects, p)
        votes = self._agreement.gate_votes
        self._network.run(votes.cast(judged.commit.hash, rejects=rejects), timeout_seconds=CALL_SECONDS)

    def told(self) -> dict[str, bool | float | None]:
        """The own vote on the newest round, for `rounds.jsonl`."""
        judged = self._round
        if judged is None:
            return {"rejects": None, "p_value": None}
        return {"rejects": judged.vote, "p_value": judged.p_value}

    def is_settled(self, chain: Chain) -> bool:
        """Whether there is a verdict on the tip, or nothing to wait for."""
        judged = self._of(chain)
        return judged is None or self._verdict(judged) is not None

    def is_rejected(self, chain: Chain) -> bool:
        """Whether the tip is to be undone, as far as this peer knows and can check."""
        judged = self._of(chain)
        if judged is None or judged.is_let_go or not judged.was_there:
            return False
        found = self._verdict(judged)
        if found is None or not found.is_rejected:
            return False
        if judged.num_rollbacks >= self._spec.gate_max_rollbacks:
            self._let_go(judged, f"{judged.num_rollbacks} roll-backs in a row are enough")
            return False
        return True

    def leaves_out(self, chain: Chain) -> tuple[Exclusion, ...]:
        """Whom a roll-back of the tip has to name."""
        judged = self._of(chain)
        return () if judged is None else judged.leaves_out

    def reason(self, chain: Chain) -> str:
        """Of a roll-back, for its record."""
        judged = self._of(chain)
        found = None if judged is None else self._verdict(judged)
        if found is None:
            return "the gate"
        return f"the gate: {found.num_rejections} of {found.num_votes} votes say that round is worse"

    def tell_votes(self, chain: Chain) -> None:
        """Before a roll-back is proposed, so that others come to the same verdict. Lets go after a while."""
        judged = self._of(chain)
        if judged is None:
            return
        now = time.monotonic()
        if judged.proposed_at is None:
            judged = self._update(judged, proposed_at=now)
        elif now > judged.proposed_at + AGREEING_SECONDS:
            self._let_go(judged, "the others do not agree to a roll-back")
            return
        votes = self._agreement.gate_votes
        self._network.run(votes.tell_all(judged.commit.hash), timeout_seconds=CALL_SECONDS)

    def _of(self, chain: Chain) -> _Round | None:
        judged = self._round
        return judged if judged is not None and judged.commit.hash == chain.tip else None

    def _verdict(self, judged: _Round) -> Verdict | None:
        if judged.verdict is not None:
            return judged.verdict
        seconds = time.monotonic() - judged.began_at
        limit, votes = self._spec.gate_vote_seconds, self._agreement.gate_votes
        is_final = seconds > limit + GRACE_SECONDS
        if is_final:
            votes.close(judged.commit.hash)
        found = self._count(judged, is_over=is_final)
        is_final = found is not None
        if found is None and (seconds > limit or not votes.may_come(Network.now())):
            found = self._count(judged, is_over=True)  # a vote that is still told on may change it
        if found is not None:
            self._tell(self._update(judged, verdict=found if is_final else None), found)
        return found

    def _count(self, judged: _Round, *, is_over: bool) -> Verdict | None:
        return verdict(
            judged.commit.cohort,
            self._agreement.gate_votes.of(judged.commit.hash),
            share=self._spec.gate_share,
            min_voters=self._spec.gate_min_voters,
            is_over=is_over,
        )

    def _tell(self, judged: _Round, found: Verdict) -> None:
        with self._lock:
            known = self._round.told if self._round is not None else None
            if known is not None and known.is_rejected == found.is_rejected:
                return
            self._update(judged, told=found)
        self._reporter.verdict(
            judged.commit.round, found.is_rejected, found.num_rejections, found.num_votes, found.num_members
        )

    def _let_go(self, judged: _Round, why: str) -> None:
        self._update(judged, is_let_go=True)
        self._reporter.warning(f"round {judged.commit.round} was rejected and stands all the same: {why}")

    def _update(self, judged: _Round, **changes: object) -> _Round:
        """Of the newest commit; of an older one nothing is kept."""
        with self._lock:
            current = self._round
            if current is None or current.commit.hash != judged.commit.hash:
                return replace(judged, **changes)  # type: ignore[arg-type]
            self._round = replace(current, **changes)  # type: ignore[arg-type]
            return self._round
