"""Which rounds happened: commits in a row, how one is verified, and which of two chains wins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from coordinator.records import (
    GENESIS,
    Commit,
    Contribution,
    FirstCommit,
    RecordError,
    SignedCommit,
    Witness,
    is_signature_of,
    wrong_signer,
)
from coordinator.spec import RunSpec

RECENT_ROUNDS = 10  # two at least: a roll-back has no contributors, and never follows another one
MAX_MISSING_RANGES_IN_ALL = 16_384  # of all contributions: a commit must fit into one message


class Backing(NamedTuple):
    """Who stands behind one commit, given those before it; compared from left to right.

    Copies of one commit carry different signatures (whoever had a majority first stops collecting), so
    signatures cannot be counted: two peers would weigh the same chain differently and never agree. The
    value of a commit is the same in all copies, so this is a function of values alone: of how many keys of a
    kind every certificate must hold a signature.
    """

    cohort: int  # of those who made the previous round
    recent: int  # of those who made one of the last rounds
    contributors: int  # see `num_backed`


@dataclass(frozen=True)
class Chain:
    """The commits of a run, oldest first; `commits[r - 1]` is round r. Round 0 is in the spec."""

    spec: RunSpec
    commits: tuple[SignedCommit, ...] = ()

    @property
    def round(self) -> int:
        return len(self.commits)

    @property
    def tip(self) -> str:
        return self.commits[-1].commit.hash if self.commits else GENESIS

    @property
    def state_hash(self) -> str:
        return self.commits[-1].commit.state_hash if self.commits else self.spec.backbone_hash

    @property
    def committed_at(self) -> float:
        """Instant from which the limit of the next round counts."""
        return self.commits[-1].commit.committed_at if self.commits else self.spec.created_at

    @property
    def cohort(self) -> frozenset[str]:
        """Whose majority the next commit needs: the contributors of the last fusion, rolled back or not."""
        fusions = (signed.commit for signed in reversed(self.commits) if signed.commit.kind == "fuse")
        return next((commit.cohort for commit in fusions), frozenset())

    @cached_property
    def members(self) -> frozenset[str]:
        """Whoever contributed to a round of this chain."""
        return frozenset(c.peer for signed in self.commits for c in signed.commit.contributors)

    def backing(self, index: int) -> Backing:
        """Of `commits[index]`. It follows from that and the RECENT_ROUNDS before it."""
        commit = self.commits[index].commit
        recent = [signed.commit for signed in self.commits[max(0, index - RECENT_ROUNDS) : index]]
        cohorts = [before.cohort for before in recent if before.kind == "fuse"]
        electorate = set(commit.electorate)
        required = required_signatures(electorate)
        of_cohort = required if cohorts and electorate <= cohorts[-1] else 0
        of_recent = max(0, required - len(electorate.difference(*cohorts)))
        return Backing(of_cohort, of_recent, num_backed(commit, self.spec))

    @property
    def is_rolled_back(self) -> bool:
        return bool(self.commits) and self.commits[-1].commit.kind == "rollback"

    @property
    def num_rollbacks(self) -> int:
        """In a row: how often what followed one and the same state was undone."""
        number, standing = 0, self.round
        while standing > 1 and self.commits[standing - 1].commit.kind == "rollback":
            number, standing = number + 1, standing - 2
        return number

    @property
    def left_out(self) -> Mapping[str, str]:
        """Who is to take no part in the next fusion, and why, as the latest roll-backs say.

        Until `gate_left_out_rounds` fusions of the spec stand; an undone one does not count.
        """
        return {peer: reason for peer, (reason, _) in self._left_out.items()}

    @property
    def left_out_rounds(self) -> Mapping[str, int]:
        """Of those in `left_out`: how many fusions have yet to stand without them."""
        return {peer: num_rounds for peer, (_, num_rounds) in self._left_out.items()}

    @cached_property
    def _left_out(self) -> Mapping[str, tuple[str, int]]:
        found: dict[str, tuple[str, int]] = {}
        index, num_standing = self.round, 0
        while index > 0 and num_standing < self.spec.gate_left_out_rounds:
            index -= 1
            commit = self.commits[index].commit
            if commit.kind == "fuse":
                num_standing += 1
            else:
                num_rounds = self.spec.gate_left_out_rounds - num_standing
                for exclusion in commit.excluded:
                    found.setdefault(exclusion.peer, (exclusion.reason, num_rounds))
                index -= 1  # the fusion that it undid
        return found

    @property
    def witness(self) -> Witness | None:
        """The word of the run's starter for the first commit, where this copy of the chain has it."""
        if not self.commits or not self.commits[0].witness:
            return None
        return Witness(commit=self.commits[0].commit.hash, signature=self.commits[0].witness)

    def witnessed(self, witness: Witness) -> Chain:
        """The same chain with that word, if it is of its first commit. It must have been checked."""
        if not self.commits or self.commits[0].witness or self.commits[0].commit.hash != witness.commit:
            return self
        first = self.commits[0].model_copy(update={"witness": witness.signature})
        return Chain(self.spec, (first, *self.commits[1:]))

    def before(self) -> Chain:
        """Without its last commit: the state to which a roll-back returns."""
        return Chain(self.spec, self.commits[:-1])

    def extended(self, signed: SignedCommit) -> Chain:
        """The chain with one commit more. Raises RecordError when it does not follow or lacks signatures."""
        verify_commit(signed, self)
        return Chain(self.spec, (*self.commits, signed))


def required_signatures(electorate: Collection[str]) -> int:
    """More than half."""
    return len(electorate) // 2 + 1


def missing_signatures(commit: Commit, signers: Collection[str], spec: RunSpec) -> int:
    """How many more make a certificate: of more than half of the electorate, and of min_peers in all.

    The second keeps a single peer from committing by itself, as it could claim that all others are silent.
    """
    voters = len(set(commit.electorate) & set(signers))
    return max(required_signatures(commit.electorate) - voters, spec.min_peers - len(set(signers)), 0)


def verify_commit(signed: SignedCommit, previous: Chain) -> None:
    """Raises RecordError unless `signed` is a valid next commit after `previous`."""
    verify_value(signed.commit, previous)
    _check_signatures(signed, previous.spec)


def verify_value(commit: Commit, previous: Chain) -> None:
    """All that can be checked without signatures. Raises RecordError."""
    if commit.run != previous.spec.digest:
        raise RecordError("a commit of another run")
    if commit.round != previous.round + 1 or commit.previous != previous.tip:
        raise RecordError(f"the commit of round {commit.round} does not follow round {previous.round}")
    if commit.round > previous.spec.num_rounds + (commit.kind == "rollback"):  # the last one can be undone
        raise RecordError(f"round {commit.round} of a run of {previous.spec.num_rounds}")
    if commit.kind == "rollback":
        _check_rollback(commit, previous)
    else:
        _check_contributors(commit, previous.spec)
    _check_exclusions(commit)
    _check_electorate(commit, previous)


def _check_rollback(commit: Commit, previous: Chain) -> None:
    if not previous.commits or previous.is_rolled_back:
        raise RecordError("a roll-back follows a fusion, never the beginning or another roll-back")
    if commit.state_hash != previous.before().state_hash:
        raise RecordError(f"a roll-back of round {previous.round} returns to the state before it")
    if commit.contributors:
        raise RecordError("a roll-back has no contributors")
    if not set(commit.electorate) <= previous.cohort:
        raise RecordError("a roll-back is voted on by those who made the round")
    named = {exclusion.peer for exclusion in commit.excluded}
    if len(named) > 1 or not named <= previous.cohort:
        raise RecordError("a roll-back leaves out at most one peer, of those who made the undone round")


def _check_contributors(commit: Commit, spec: RunSpec) -> None:
    if commit.reason:
        raise RecordError("only a roll-back gives a reason")
    if len(commit.cohort) != len(commit.contributors):
        raise RecordError("a contributor is named twice")
    if not spec.min_peers <= len(commit.contributors) <= spec.max_peers:
        raise RecordError(
            f"{len(commit.contributors)} contributors; the spec wants {spec.min_peers} to {spec.max_peers}"
        )
    for contribution in commit.contributors:
        if contribution.weight != spec.contribution_weight(contribution.num_examples):
            raise RecordError(
                f"weight {contribution.weight} is not what the spec gives {contribution.peer[-8:]}"
            )
        _check_missing(contribution)
    if sum(len(contribution.missing) for contribution in commit.contributors) > MAX_MISSING_RANGES_IN_ALL:
        raise RecordError(f"more than {MAX_MISSING_RANGES_IN_ALL} ranges of missing parts")


def _check_missing(contribution: Contribution) -> None:
    reached = 0
    for first, stop in contribution.missing:
        if not reached <= first < stop:
            raise RecordError(f"the missing parts of {contribution.peer[-8:]} are not in order")
        reached = stop


def _check_exclusions(commit: Commit) -> None:
    excluded = {exclusion.peer for exclusion in commit.excluded}
    if len(excluded) != len(commit.excluded):
        raise RecordError("a peer is excluded twice")
    if excluded & commit.cohort:
        raise RecordError("a contributor is excluded")


def _check_electorate(commit: Commit, previous: Chain) -> None:
    electorate = set(commit.electorate)
    if len(electorate) != len(commit.electorate):
        raise RecordError("a peer is named twice in the electorate")
    if len(electorate) > previous.spec.max_peers:  # those who made a round, or who are drawn for one
        raise RecordError(f"{len(electorate)} voters, where a round has at most {previous.spec.max_peers}")
    if electorate & previous.cohort and not electorate <= previous.cohort:
        raise RecordError("the electorate mixes the previous round's peers with others")


def _check_signatures(signed: SignedCommit, spec: RunSpec) -> None:
    commit = signed.commit
    most = len(commit.contributors) + len(commit.electorate) + spec.max_peers
    if len(signed.signatures) > most:
        raise RecordError(f"{len(signed.signatures)} signatures, where at most {most} peers took part")
    if missing_signatures(commit, signed.signatures, spec) > 0:  # first: it costs nothing
        raise RecordError(
            f"{len(signed.voters)} of {len(commit.electorate)} signed; "
            f"{required_signatures(commit.electorate)} are needed, and {spec.min_peers} signatures in all"
        )
    if (peer := wrong_signer(signed.signatures, commit)) is not None:
        raise RecordError(f"the signature of {peer[-8:]} does not fit")
    if signed.witness:
        witness = Witness(commit=commit.hash, signature=signed.witness)
        if commit.round != 1 or not is_witness(witness, spec):
            raise RecordError("what the run's starter is said to have signed does not fit")


def is_witness(witness: Witness, spec: RunSpec) -> bool:
    """Whether it is signed by the starter that the spec names."""
    value = FirstCommit(run=spec.digest, commit=witness.commit)
    return spec.starter is not None and is_signature_of(witness.signature, value, spec.starter)


def build_chain(spec: RunSpec, commits: Sequence[SignedCommit]) -> Chain:
    """Verify all of `commits` from the first round on. Raises RecordError."""
    chain = Chain(spec)
    for signed in commits:
        chain = chain.extended(signed)
    return chain


def is_better(challenger: Chain, mine: Chain) -> bool:
    """Whether to leave `mine` for `challenger`.

    One that begins as the run's starter says wins over one that does not (`beginning.py`). Else, from the
    fork on, commit by commit, the larger `Backing` wins; then the longer chain, then the smaller
    hash of the first commit that differs. So it is decided where they part, by those who had made what both
    share. Keys that somebody makes up have no part in that, however many rounds they sign afterwards: a sum
    over the rounds would let a few of them outweigh everybody, as they need no time for a round.

    A lexicographic order of paths in a tree is a total order: no three chains beat each other in a circle,
    and peers that see the same chains choose the same one. A chain that continues mine is better.
    """
    if challenger.tip == mine.tip:
        return False
    fork = fork_round(challenger, mine)
    is_from_start = fork == 0 and challenger.commits and mine.commits
    if is_from_start and (challenger.witness is None) != (mine.witness is None):
        return mine.witness is None
    for index in range(fork, min(challenger.round, mine.round)):
        theirs, ours = challenger.backing(index), mine.backing(index)
        if theirs != ours:
            return theirs > ours
    if challenger.round != mine.round:
        return challenger.round > mine.round
    return challenger.commits[fork].commit.hash < mine.commits[fork].commit.hash


def num_backed(commit: Commit, spec: RunSpec) -> int:
    """How many contributors of a commit count: at most as many as its electorate has members (or min_peers,
    if that is more).

    Contributors alone would be a number that the author chooses: it may name anybody. The electorate
    is not free: a certificate takes the signatures of more than half of it, so k keys cannot
    claim one of more than 2k - 1, and a single liar gets no certificate at all (min_peers signatures).
    Newcomers beyond that number count from the next round on, when they are the electorate.
    What a contributor signed itself, its ready record and its acceptance, names no state: a liar could
    collect those of others and show them beside a state of its own. Only votes bind to a state.

    A roll-back has no contributors; its electorate vouches for it as that of a fusion would. So a chain
    with a roll-back beats the chain without, and loses to no fusion by the same peers for lack of work.
    """
    most = max(len(commit.electorate), spec.min_peers)
    return most if commit.kind == "rollback" else min(len(commit.contributors), most)


def fork_round(one: Chain, other: Chain) -> int:
    """The last one that both have."""
    for index, (a, b) in enumerate(zip(one.commits, other.commits, strict=False)):
        if a.commit.hash != b.commit.hash:
            return index
    return min(one.round, other.round)
