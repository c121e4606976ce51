"""Which pairs of signed statements prove a lie, and which honest peers must never be convicted by them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from coordinator.chain import Chain
from coordinator.records import RecordError, sign
from peer.contradiction import Contradiction, StatementLog, UnknownRoundError, judge_statements
from peer.manifest import SenderReport, Statement, join_hashes
from tests.fakes import extend, hash_of, identity, make_commit, make_spec, peer, peers, signed_by

SPEC = make_spec()
RUN = SPEC.digest
ALL = ("a", "b", "c")
NONE, X, Y, Z = (bytes([byte]) * 32 for byte in (0, 1, 2, 3))  # hashes of feedback


def chain_of(*rounds: Sequence[str]) -> Chain:
    """Fusions of these cohorts, by the group "group of round r"; "rollback" undoes the one before."""
    chain = Chain(SPEC)
    voters: Sequence[str] = ALL  # who votes is the cohort before
    for number, cohort in enumerate(rounds, start=1):
        electorate = list(peers(voters))
        if cohort == "rollback":
            undone = make_commit(chain, voters, electorate=electorate).model_copy(
                update={"kind": "rollback", "state_hash": chain.before().state_hash, "contributors": []}
            )
            chain = chain.extended(signed_by(undone, voters))
        else:
            chain = extend(chain, cohort, voters, group=group_of(number), electorate=electorate)
            voters = cohort
    return chain


def group_of(round_: int) -> str:
    return hash_of(f"group of round {round_}")


def statement(chain: Chain, round_: int, before: list[bytes], after: list[bytes], **changes: Any) -> bytes:
    """Of reducer "a" about parts 4 and 5, unless told otherwise; signed."""
    author = changes.pop("author", "a")
    values: dict[str, Any] = {
        "run": RUN,
        "group": group_of(round_),
        "round": round_,
        "previous": Chain(SPEC, chain.commits[: round_ - 1]).tip,
        "first_part": 4,
        "senders": [
            SenderReport(peer=peer("a"), manifest=None, declared=1.0, is_planned=False, norm=0.0, num_parts=0)
        ],
        "results": join_hashes(bytes(32 * len(after))),
        "residuals_before": join_hashes(b"".join(before)),
        "residuals_after": join_hashes(b"".join(after)),
    }
    return sign(Statement.model_validate({**values, **changes}), identity(author)).to_bytes()


def judged(chain: Chain, *statements: bytes) -> str:
    return judge_statements(Contradiction(peer("a"), statements), RUN, chain)[0]


def lie_about(part: int) -> str:
    return f"its error feedback of part {part} is not what its last committed result left"


def test_feedback_that_follows_from_the_last_round() -> None:
    chain = chain_of(ALL, ALL)
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    assert judged(chain, first, statement(chain, 2, [X, Y], [Y, Z])) == ""
    assert judged(chain, first, statement(chain, 2, [X, X], [Y, Z])) == lie_about(5)
    assert judged(chain, first, statement(chain, 2, [Z, Y], [Y, Z])) == lie_about(4)


def test_no_feedback_is_always_allowed() -> None:
    """A peer that restarted without its checkpoint, or was overtaken."""
    chain = chain_of(ALL, ALL)
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    assert judged(chain, first, statement(chain, 2, [NONE, NONE], [Y, Z])) == ""
    assert judged(chain, first, statement(chain, 2, [X, NONE], [Y, Z])) == ""
    assert judged(chain, first, statement(chain, 2, [], [Y, Z])) == ""


def test_feedback_before_the_first_round() -> None:
    chain = chain_of(ALL)
    assert judged(chain, statement(chain, 1, [X, NONE], [Y, Z])) == lie_about(4)
    assert judged(chain, statement(chain, 1, [NONE, NONE], [Y, Z])) == ""


def test_the_attempt_need_not_be_committed() -> None:
    """The lie is signed; that its attempt failed does not undo it. The round is 2, the chain ends with 1."""
    chain = chain_of(ALL)
    lie = statement(chain, 2, [Z, Z], [Y, Y], group=hash_of("failed"))
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    assert judge_statements(Contradiction(peer("a"), (first, lie)), RUN, chain) == (lie_about(4), 2)


def test_a_statement_of_a_failed_attempt_is_not_the_last_committed_one() -> None:
    """An honest reducer signed another result in an attempt that came to nothing."""
    chain = chain_of(ALL, ALL)
    failed = statement(chain, 1, [NONE, NONE], [Z, Z], group=hash_of("failed"))
    honest = statement(chain, 2, [X, Y], [Y, Z])
    assert judged(chain, failed, honest) == ""
    assert judged(chain, failed, statement(chain, 1, [NONE, NONE], [X, Y]), honest) == ""


def test_parts_that_move_and_come_back() -> None:
    """Alone with "b" it reduced parts 4 and 5, in a larger group part 7; part 4 then goes on from round 1."""
    chain = chain_of(("a", "b"), ALL, ("a", "b"))
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    second = statement(chain, 2, [NONE], [Z], first_part=7)
    assert judged(chain, first, second, statement(chain, 3, [X, Y], [Y, Z])) == ""
    assert judged(chain, first, second, statement(chain, 3, [Z, Y], [Y, Z])) == lie_about(4)
    assert judged(chain, first, statement(chain, 3, [Z, Y], [Y, Z])) == ""  # not known what round 2 left


def test_a_round_without_the_reducer_leaves_its_feedback() -> None:
    chain = chain_of(ALL, ("b", "c"), ALL)
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    assert judged(chain, first, statement(chain, 3, [X, Y], [Y, Z])) == ""
    assert judged(chain, first, statement(chain, 3, [Y, Y], [Y, Z])) == lie_about(4)


def test_after_a_roll_back_everybody_begins_without() -> None:
    chain = chain_of(ALL, "rollback", ALL)
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    assert judged(chain, first, statement(chain, 3, [NONE, NONE], [Y, Z])) == ""
    assert judged(chain, first, statement(chain, 3, [X, Y], [Y, Z])) == lie_about(4)


def test_a_commit_that_names_no_group_proves_nothing() -> None:
    chain = extend(Chain(SPEC), ALL)
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    assert judged(chain, first, statement(chain, 2, [Z, Z], [Y, Z])) == ""


def test_two_statements_of_one_group_but_not_of_one_round_of_my_chain() -> None:
    """Each peer would take them for a lie of another round, and undo that or nothing."""
    chain = chain_of(ALL, ALL)
    one, moved = statement(chain, 1, [], [X, Y]), statement(chain, 1, [], [X, Y], round=2)
    with pytest.raises(RecordError, match="not of one round"):
        judged(chain, one, moved)
    elsewhere = [statement(chain, 1, [], [X, hashes], previous=hash_of("no commit")) for hashes in (Y, Z)]
    with pytest.raises(UnknownRoundError):
        judged(chain, *elsewhere)


def test_two_statements_of_one_group() -> None:
    chain = chain_of(ALL)
    one, other = statement(chain, 1, [], [X, Y]), statement(chain, 1, [], [X, Z])
    assert judge_statements(Contradiction(peer("a"), (one, other)), RUN, chain) == (
        "it told two members different results",
        1,
    )
    assert judged(chain, one, one) == ""
    elsewhere = statement(chain, 1, [], [X, Z], group=hash_of("another attempt"))
    assert judged(chain, one, elsewhere) == ""


def test_statements_that_are_no_evidence() -> None:
    chain = chain_of(ALL, ALL)
    first, lie = statement(chain, 1, [NONE, NONE], [X, Y]), statement(chain, 2, [Z, Y], [Y, Z])
    for statements in (
        (),
        (statement(chain, 1, [NONE, NONE], [X, Y], author="b"), lie),
        (first, statement(chain, 2, [Z, Y], [Y, Z], author="b")),
        (first, statement(chain, 2, [Z], [Y, Z])),
        (first, statement(chain, 2, [Z, Y], [Y, Z], run=hash_of("other"))),
        (first, lie.replace(b"a", b"b", 1)),
    ):
        with pytest.raises(RecordError):
            judged(chain, *statements)


def test_a_round_that_my_chain_does_not_lead_to() -> None:
    chain, other = chain_of(ALL, ALL), chain_of(("a", "b"), ALL)
    first, lie = statement(chain, 1, [NONE, NONE], [X, Y]), statement(chain, 2, [Z, Y], [Y, Z])
    with pytest.raises(UnknownRoundError):
        judged(other, first, lie)
    with pytest.raises(UnknownRoundError):
        judged(Chain(SPEC), first, lie)
    much_later = [statement(chain, 2, [], [X, after], round=9, previous=chain.tip) for after in (Y, Z)]
    with pytest.raises(UnknownRoundError):
        judged(chain, *much_later)


# What a member keeps.


def test_the_log_finds_the_lie_and_gives_its_proof() -> None:
    chain, log = chain_of(ALL, ALL), StatementLog()
    first = statement(chain, 1, [NONE, NONE], [X, Y])
    log.keep(group_of(1), {peer("a"): first})
    honest, lie = statement(chain, 2, [X, Y], [Y, Z]), statement(chain, 2, [X, Z], [Y, Z])
    assert log.contradiction(peer("a"), honest, RUN, chain) is None
    found = log.contradiction(peer("a"), lie, RUN, chain)
    assert found == Contradiction(peer("a"), (first, lie))
    assert judge_statements(found, RUN, chain) == (lie_about(5), 2)


def test_who_missed_a_round_convicts_nobody() -> None:
    """Its log holds round 1; what round 2 left it never saw."""
    chain, log = chain_of(ALL, ALL, ALL), StatementLog()
    log.keep(group_of(1), {peer("a"): statement(chain, 1, [NONE, NONE], [X, Y])})
    assert log.contradiction(peer("a"), statement(chain, 3, [Z, Z], [X, X]), RUN, chain) is None
    assert StatementLog().contradiction(peer("a"), statement(chain, 3, [Z, Z], [X, X]), RUN, chain) is None


def test_the_log_forgets_the_oldest_round() -> None:
    chain = chain_of(ALL, ALL)
    first, second = statement(chain, 1, [NONE], [X]), statement(chain, 2, [X], [Y])
    lie = statement(chain, 3, [Z], [X])
    log = StatementLog(max_bytes=len(first) + len(second) - 1)
    log.keep(group_of(1), {peer("a"): first})
    wrong_second = statement(chain, 2, [Z], [Y])
    assert log.contradiction(peer("a"), wrong_second, RUN, chain) is not None
    log.keep(group_of(2), {peer("a"): second})
    assert log.contradiction(peer("a"), wrong_second, RUN, chain) is None
    assert log.contradiction(peer("a"), lie, RUN, chain) is not None
