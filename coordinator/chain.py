"""Which rounds happened: commits in a row, how one is verified, and which of two chains wins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coordinator.records import GENESIS, Commit, RecordError, SignedCommit, is_signature_of
from coordinator.spec import RunSpec


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
        return self.commits[-1].commit.cohort if self.commits else frozenset()

    def extended(self, signed: SignedCommit) -> Chain:
        """The chain with one commit more. Raises RecordError when it does not follow or lacks signatures."""
        verify_commit(signed, self)
        return Chain(self.spec, (*self.commits, signed))


def required_signatures(electorate: Collection[str]) -> int:
    """More than half."""
    return len(electorate) // 2 + 1


def verify_commit(signed: SignedCommit, previous: Chain) -> None:
    """Raises RecordError unless `signed` is a valid next commit after `previous`."""
    commit = signed.commit
    if commit.run != previous.spec.digest:
        raise RecordError("a commit of another run")
    if commit.round != previous.round + 1 or commit.previous != previous.tip:
        raise RecordError(f"the commit of round {commit.round} does not follow round {previous.round}")
    if commit.round > previous.spec.num_rounds:
        raise RecordError(f"round {commit.round} of a run of {previous.spec.num_rounds}")
    _check_contributors(commit, previous)
    _check_signatures(signed)


def _check_contributors(commit: Commit, previous: Chain) -> None:
    spec = previous.spec
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
    if len(set(commit.electorate)) != len(commit.electorate):
        raise RecordError("a peer is named twice in the electorate")
    if previous.commits and not set(commit.electorate) <= previous.cohort:
        raise RecordError("the electorate holds peers that were not in the previous round")


def _check_signatures(signed: SignedCommit) -> None:
    commit = signed.commit
    allowed = commit.cohort | set(commit.electorate)
    for peer, signature in signed.signatures.items():
        if peer not in allowed:
            raise RecordError(f"signed by {peer[-8:]}, who has no part in the round")
        if not is_signature_of(signature, commit, peer):
            raise RecordError(f"the signature of {peer[-8:]} does not fit")
    voters = set(commit.electorate) & signed.signatures.keys()
    if len(voters) < required_signatures(commit.electorate):
        raise RecordError(
            f"{len(voters)} of {len(commit.electorate)} signed; "
            f"{required_signatures(commit.electorate)} are needed"
        )


def build_chain(spec: RunSpec, commits: Sequence[SignedCommit]) -> Chain:
    """Verify all of `commits` from the first round on. Raises RecordError."""
    chain = Chain(spec)
    for signed in commits:
        chain = chain.extended(signed)
    return chain


def is_better(challenger: Chain, mine: Chain) -> bool:
    """Whether to leave `mine` for `challenger`.

    More signed contributions since the fork win, then the smaller hash. A chain that continues mine
    has more of them; a bare round number wins nothing.
    """
    if challenger.tip == mine.tip:
        return False
    fork = _fork_round(challenger, mine)
    theirs, ours = (_num_signed(chain, fork) for chain in (challenger, mine))
    return theirs > ours or (theirs == ours and challenger.tip < mine.tip)


def _fork_round(one: Chain, other: Chain) -> int:
    for index, (a, b) in enumerate(zip(one.commits, other.commits, strict=False)):
        if a.commit.hash != b.commit.hash:
            return index
    return min(one.round, other.round)


def _num_signed(chain: Chain, after_round: int) -> int:
    return sum(len(signed.commit.cohort & signed.signatures.keys()) for signed in chain.commits[after_round:])
