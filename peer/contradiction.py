"""Do signed statements of one reducer contradict each other? Then no part has to be computed again.

Two ways to lie with nothing but signatures:

- **Two statements of one group**: it told two members different things.
- **Feedback from nowhere**: what it calls its error feedback before a round is not what it signed as its
  feedback after the last committed round in which it reduced that part. A commit names the group that made
  it, so everybody with the same chain agrees on which statement that is. No feedback at all is always
  allowed: a peer that was overtaken, restarted or rolled back starts again without (`peer.session`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.chain import Chain
from coordinator.records import Commit, RecordError, open_signed
from peer.manifest import HASH_BYTES, MAX_SIGNED_BYTES, Statement, split_hashes

MAX_LOG_BYTES = 32 * 1024 * 1024  # of signed statements; 4 peers with 22.7M values make 70 KB a round
MAX_EARLIER = 4  # rounds that are looked back: a reducer keeps its parts while the group stays the same
MAX_STATEMENTS = MAX_EARLIER + 1  # in one piece of evidence
NO_FEEDBACK = bytes(HASH_BYTES)


@dataclass(frozen=True)
class Contradiction:
    """Signed statements of one reducer; the last one does not go with those before it."""

    reducer: str
    statements: tuple[bytes, ...]


class UnknownRoundError(Exception):
    """The statement is of a round that my chain does not lead to: others may be able to judge it."""


def judge_statements(contradiction: Contradiction, run_digest: str, chain: Chain) -> tuple[str, int]:
    """Why the reducer lied, and in which round; "" when it did not. Pure.

    Raises RecordError for statements that are no evidence, UnknownRoundError where the chain is another one.
    """
    opened = [open_signed(data, Statement, max_bytes=MAX_SIGNED_BYTES) for data in contradiction.statements]
    if not opened or any(author != contradiction.reducer for author, _ in opened):
        raise RecordError("a statement is not signed by the reducer")
    statements = [statement for _, statement in opened]
    if any(statement.run != run_digest for statement in statements):
        raise RecordError("a statement of another run")
    *earlier, last = statements
    if any(s.group == last.group and s.digest != last.digest for s in earlier):
        if any((s.round, s.previous) != (last.round, last.previous) for s in earlier):
            raise RecordError("the statements are not of one round")
        _commits_up_to(last, chain)  # of a round that is known: else each peer might undo another one
        return "it told two members different results", last.round
    by_group = {statement.group: statement for statement in earlier}
    return _invented_feedback(contradiction.reducer, last, by_group, chain), last.round


def _invented_feedback(reducer: str, last: Statement, earlier: Mapping[str, Statement], chain: Chain) -> str:
    claimed = dict(_by_part(last, last.residuals_before))
    expected = _expected(reducer, claimed.keys(), _commits_up_to(last, chain), earlier)
    for part, before in sorted(claimed.items()):
        if before != NO_FEEDBACK and part in expected and before != expected[part]:
            return f"its error feedback of part {part} is not what its last committed result left"
    return ""


def _commits_up_to(statement: Statement, chain: Chain) -> list[Commit]:
    """Those that the round of a statement starts from, oldest first."""
    commits = [signed.commit for signed in chain.commits[: statement.round - 1]]
    if (
        len(commits) != statement.round - 1
        or Chain(chain.spec, chain.commits[: statement.round - 1]).tip != statement.previous
    ):
        raise UnknownRoundError(f"round {statement.round} does not start from my chain")
    return commits


def _expected(
    reducer: str, parts: Collection[int], commits: Sequence[Commit], earlier: Mapping[str, Statement]
) -> dict[int, bytes]:
    """The hash of the feedback that each part must have, where that is known; back to the last roll-back."""
    expected: dict[int, bytes] = {}
    for commit in reversed(commits):
        if commit.kind == "rollback":
            break  # everybody begins without feedback
        if reducer not in commit.cohort:
            continue
        statement = earlier.get(commit.group or "")
        if statement is None:
            return expected
        for part, after in _by_part(statement, statement.residuals_after):
            expected.setdefault(part, after)
        if expected.keys() >= set(parts):
            return expected
    return {**dict.fromkeys(parts, NO_FEEDBACK), **expected}


def _by_part(statement: Statement, hashes: str) -> Iterator[tuple[int, bytes]]:
    """The hash of each part of a reducer; of no hashes at all, no feedback in any part."""
    num_parts = len(split_hashes(statement.results))
    split = split_hashes(hashes) or [NO_FEEDBACK] * num_parts
    if len(split) != num_parts:
        raise RecordError("the statement does not name the error feedback of each of its parts")
    return zip(range(statement.first_part, statement.first_part + num_parts), split, strict=True)


class StatementLog:
    """The statements of committed rounds that this member took part in; the oldest are forgotten first."""

    def __init__(self, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._signed: dict[str, Mapping[str, bytes]] = {}  # by group, then by reducer; in order of time

    def keep(self, group: str, statements: Mapping[str, bytes]) -> None:
        """Of the group that a commit names."""
        if group in self._signed or not any(_has_feedback(signed) for signed in statements.values()):
            return
        self._signed[group] = dict(statements)
        self._num_bytes += _size(statements)
        while self._num_bytes > self._max_bytes and len(self._signed) > 1:
            self._num_bytes -= _size(self._signed.pop(next(iter(self._signed))))

    def contradiction(
        self, reducer: str, signed: bytes, run_digest: str, chain: Chain
    ) -> Contradiction | None:
        """With the statement of a round just reduced; None when it goes with all that is kept."""
        cohorts = [c.commit for c in chain.commits if c.commit.kind == "fuse" and reducer in c.commit.cohort]
        own = open_signed(signed, Statement, max_bytes=MAX_SIGNED_BYTES)[1].group
        groups = [commit.group for commit in cohorts if commit.group not in (None, own)]
        kept = [self._signed.get(group or "", {}) for group in groups[-MAX_EARLIER:]]
        earlier = [statements[reducer] for statements in kept if reducer in statements]
        found = Contradiction(reducer, (*earlier, signed))
        try:
            return found if judge_statements(found, run_digest, chain)[0] else None
        except UnknownRoundError:
            return None


def _has_feedback(signed: bytes) -> bool:
    statement = open_signed(signed, Statement, max_bytes=MAX_SIGNED_BYTES)[1]
    return bool(statement.residuals_after or statement.residuals_before)


def _size(statements: Mapping[str, bytes]) -> int:
    return sum(map(len, statements.values()))
