"""What does a peer do now? `decide` with heartbeats, a chain and a fake clock; no network."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.chain import Chain, required_signatures
from coordinator.membership import Member
from coordinator.rounds import (
    Action,
    Alone,
    CatchUp,
    Finetune,
    Fuse,
    Leaders,
    Standing,
    Stop,
    Wait,
    decide,
    draw,
    rank,
    round_deadline,
    training_deadline,
)
from tests.fakes import NOW, extend, hash_of, make_member, make_spec, peer, peers

LIMIT = 1800.0
EMPTY = Chain(make_spec(max_peers=4))
ENTERED = NOW - 10.0


def standing(name: str = "me", *, is_ready: bool = True, entered_at: float = ENTERED) -> Standing:
    return Standing(peer(name), is_ready, entered_at)


def ready(chain: Chain, names: str, **changes: Any) -> list[Member]:
    return [make_member(chain, name, phase="ready", **changes) for name in names]


def busy(chain: Chain, names: str, **changes: Any) -> list[Member]:
    return [make_member(chain, name, phase="finetuning", **changes) for name in names]


def in_phase(chain: Chain, names: str, phase: str, **changes: Any) -> list[Member]:
    return [make_member(chain, name, phase=phase, **changes) for name in names]


def test_who_is_not_ready_finetunes_alone_or_not() -> None:
    me = standing(is_ready=False)
    assert decide(EMPTY, me, [], NOW) == Finetune()
    assert decide(EMPTY, me, ready(EMPTY, "abc"), NOW) == Finetune()


def test_ready_and_alone() -> None:
    assert decide(EMPTY, standing(), [], NOW) == Alone()
    bystanders = in_phase(EMPTY, "ab", "serving") + in_phase(EMPTY, "cd", "joining")
    assert decide(EMPTY, standing(), bystanders, NOW) == Alone()


def test_a_quorum_of_one_fuses_by_itself() -> None:
    chain = Chain(make_spec(min_peers=1))
    assert decide(chain, standing(), [], NOW) == Fuse((peer("me"),), (peer("me"),))


def test_waits_for_those_who_finetune() -> None:
    others = ready(EMPTY, "a") + busy(EMPTY, "b")
    assert decide(EMPTY, standing(), others, NOW) == Wait("1 of 3 peers still finetune")
    evaluating = in_phase(EMPTY, "b", "evaluating")
    assert decide(EMPTY, standing(), ready(EMPTY, "a") + evaluating, NOW) == Wait(
        "1 of 3 peers still finetune"
    )


def test_fuses_when_all_are_ready() -> None:
    action = decide(EMPTY, standing(), ready(EMPTY, "ab"), NOW)
    assert isinstance(action, Fuse)
    assert set(action.members) == {peer("me"), *peers("ab")}
    assert action.electorate == tuple(sorted(action.members))  # the first round: all who take part


def test_the_deadline_closes_the_round_for_those_who_are_ready() -> None:
    """It counts from when the quorum had entered: of 10, 20 and 30 s ago, with two peers, 20 s ago."""
    chain = Chain(make_spec(created_at=0.0))
    others = ready(chain, "a", entered_at=NOW - 20.0) + busy(chain, "b", entered_at=NOW - 30.0)
    me = standing(entered_at=NOW - 10.0)
    deadline = NOW - 20.0 + LIMIT
    assert isinstance(decide(chain, me, others, deadline - 0.001), Wait)
    action = decide(chain, me, others, deadline)
    assert isinstance(action, Fuse)
    assert set(action.members) == {peer("me"), peer("a")}
    assert set(action.electorate) == {peer("me"), *peers("ab")}
    assert training_deadline(chain, me, others) == deadline - 0.05 * LIMIT


def test_the_deadline_counts_from_the_commit_when_that_is_later() -> None:
    chain = extend(EMPTY, ["a", "b"], committed_at=NOW)
    assert round_deadline(chain, [NOW - 50.0, NOW - 40.0]) == NOW + LIMIT
    assert round_deadline(chain, [NOW + 5.0, NOW - 40.0, NOW + 7.0]) == NOW + 5.0 + LIMIT
    assert round_deadline(chain, [NOW]) == math.inf  # below the quorum the round stays open


def test_below_the_quorum_the_round_stays_open_beyond_its_deadline() -> None:
    chain = Chain(make_spec(min_peers=3))
    others = ready(chain, "a") + busy(chain, "b")
    assert decide(chain, standing(), others, NOW + 10 * LIMIT) == Wait("2 of at least 3 peers are ready")


def test_a_majority_of_the_previous_cohort_must_be_ready() -> None:
    late = NOW + 10 * LIMIT
    chain = extend(Chain(make_spec(max_peers=64)), ["a", "b", "c"])
    others = ready(chain, "axy") + busy(chain, "bc")
    assert decide(chain, standing(), others, late) == Wait("1 of the 2 peers who must sign are ready")
    action = decide(chain, standing(), ready(chain, "abxy") + busy(chain, "c"), late)
    assert isinstance(action, Fuse)
    assert action.electorate == tuple(sorted(peers("abc")))


def test_the_silent_of_the_previous_cohort_do_not_vote() -> None:
    chain = extend(EMPTY, ["me", "a", "b", "c"])
    action = decide(chain, standing(), ready(chain, "a"), NOW, absent=peers("bc"))
    assert isinstance(action, Fuse)
    assert action.electorate == tuple(sorted([peer("me"), peer("a")]))


def test_who_is_neither_seen_nor_silent_for_long_enough_counts() -> None:
    """b and c may be there for each other: a peer that cannot reach them must not commit without them."""
    chain = extend(EMPTY, ["me", "a", "b", "c"])
    action = decide(chain, standing(), ready(chain, "a"), NOW, absent=peers("b"))
    assert isinstance(action, Fuse)  # two of three
    assert action.electorate == tuple(sorted([peer("me"), *peers("ac")]))
    action = decide(chain, standing(), ready(chain, "a"), NOW)
    assert action == Wait("2 of the 3 peers who must sign are ready")
    joining = in_phase(chain, "bc", "joining")  # back after a crash: they may have signed before it
    action = decide(chain, standing(), ready(chain, "a") + joining, NOW)
    assert action == Wait("2 of the 3 peers who must sign are ready")


def test_when_all_of_the_previous_cohort_are_gone_those_who_train_vote() -> None:
    chain = extend(EMPTY, ["x", "y"])
    action = decide(chain, standing(), ready(chain, "a"), NOW, absent=peers("xy"))
    assert isinstance(action, Fuse)
    assert action.electorate == tuple(sorted([peer("me"), peer("a")]))


def test_without_a_previous_cohort_those_vote_who_were_heard_of_late() -> None:
    """b cannot be reached any more and c sits out, yet b may be forming a group with others."""
    others = [*ready(EMPTY, "a"), *ready(EMPTY, "c", resigned=EMPTY.tip)]
    action = decide(EMPTY, standing(), others, NOW, counted=peers("ab"))
    assert isinstance(action, Fuse)
    assert set(action.members) == {peer("me"), *peers("ac")}
    assert action.electorate == tuple(sorted([peer("me"), *peers("ab")]))
    chain = extend(EMPTY, ["x", "a"])  # both have resigned; a has come back, and newcomers go first
    members = [*ready(chain, "a", resigned=chain.tip)]
    action = decide(chain, standing(), members, NOW, absent=peers("ax"))
    assert isinstance(action, Fuse)
    assert action.electorate == (peer("me"),)
    chain = extend(EMPTY, ["me", "a"])
    members = [*ready(chain, "a", resigned=chain.tip)]
    action = decide(chain, standing(), members, NOW, absent=[peer("me"), peer("a")])
    assert isinstance(action, Fuse)
    assert action.electorate == tuple(sorted([peer("me"), peer("a")]))


def test_who_is_left_out_of_an_attempt_still_votes() -> None:
    others = ready(EMPTY, "abc")
    action = decide(EMPTY, standing(), others, NOW, left_out=peers("b"))
    assert isinstance(action, Fuse)
    assert set(action.members) == {peer("me"), *peers("ac")}
    assert set(action.electorate) == {peer("me"), *peers("abc")}


def test_nobody_is_left_out_whom_a_commit_needs() -> None:
    """Else all would wait for ever: attempts are only counted up by trying."""
    three = make_spec(min_peers=3)
    everybody = {peer("me"), *peers("abc")}
    for spec, out in ((three, "ab"), (make_spec(min_peers=2), "ab")):  # no quorum; two of four voters
        chain = Chain(spec)
        action = decide(chain, standing(), ready(chain, "abc"), NOW, left_out=peers(out))
        assert isinstance(action, Fuse), spec
        assert set(action.members) == everybody
    action = decide(Chain(three), standing(), ready(Chain(three), "abc"), NOW, left_out=peers("b"))
    assert isinstance(action, Fuse)
    assert set(action.members) == {peer("me"), *peers("ac")}


def test_leaders_that_were_silent_twice_lead_last_until_two_lead_at_once() -> None:
    leaders, fuse = Leaders(), Fuse(members=("x", "y", "z"), electorate=("x",))
    leaders.was_silent("x")
    assert leaders.ranked(fuse).members == ("x", "y", "z")
    leaders.was_silent("x")
    assert leaders.ranked(fuse).members == ("y", "z", "x")
    leaders.two_at_once()
    assert leaders.ranked(fuse) == fuse


def test_one_silent_leader_costs_no_more_than_before_and_several_are_waited_for_longer() -> None:
    leaders, patience = Leaders(), []
    for leader in "xyzxyz":
        patience.append(leaders.patience)
        leaders.was_silent(leader)
    assert patience == [1.0, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert leaders.in_next_round().patience == 1.0


def test_whose_proposals_cost_attempt_after_attempt_is_heard_less_and_less() -> None:
    leaders, now = Leaders(), 100.0
    for _ in range(2):  # as may happen to two who propose at once
        leaders.cost_an_attempt("x", now, pause_seconds=2.0, max_seconds=10.0)
        assert leaders.is_heard("x", now)
    pauses = []
    for _ in range(5):
        leaders.cost_an_attempt("x", now, pause_seconds=2.0, max_seconds=10.0)
        pauses.append(next(s for s in range(100) if leaders.is_heard("x", now + s)))
        now += pauses[-1]
    assert pauses == [2, 4, 8, 10, 10]
    assert leaders.is_heard("y", 0.0)
    following = leaders.in_next_round()
    assert following.is_heard("x", 0.0)
    following.cost_an_attempt("x", 0.0, pause_seconds=2.0, max_seconds=10.0)
    assert not following.is_heard("x", 1.0)  # sooner than in its first round: half of it is remembered
    for _ in range(4):
        following = following.in_next_round()
    following.cost_an_attempt("x", 0.0, pause_seconds=2.0, max_seconds=10.0)
    assert following.is_heard("x", 0.0)  # who behaves is forgiven


@pytest.mark.parametrize("phase", ["waiting", "done", "serving"])
def test_who_takes_no_part_holds_nobody_up(phase: str) -> None:
    """Three of the previous four sit the round out, alive: they cannot sign what they do not compute."""
    chain = extend(EMPTY, ["me", "a", "b", "c"])
    others = ready(chain, "x") + in_phase(chain, "abc", phase, resigned=chain.tip)
    action = decide(chain, standing(), others, NOW, absent=peers("abc"))
    assert isinstance(action, Fuse)
    assert set(action.members) == {peer("me"), peer("x")}
    assert action.electorate == (peer("me"),)


def test_who_trains_on_another_commit_still_votes() -> None:
    """It may be committing a round of which I know nothing: no commit without its side's majority."""
    chain = extend(EMPTY, ["me", "a", "b"])
    behind = [make_member(EMPTY, name, phase="ready") for name in "ab"]
    action = decide(chain, standing(), behind + ready(chain, "x"), NOW)
    assert action == Wait("1 of the 2 peers who must sign are ready")


def test_more_peers_than_take_part_are_drawn_and_the_draw_cannot_stop_the_run() -> None:
    """Seven are ready for four places; whoever is drawn, the drawn can commit by themselves."""
    chain = extend(EMPTY, ["a", "b", "c", "d"])
    everybody = "abcdefg"
    drawn = draw(chain, peers(everybody))
    assert len(drawn) == 4
    for name in everybody:
        others = ready(chain, everybody.replace(name, ""))
        resigned = chain.cohort - set(drawn)  # as `fuse` does when it is not drawn
        action = decide(chain, standing(name), others, NOW, absent=resigned)
        if peer(name) not in drawn:
            assert action == Wait("not drawn this round")
            continue
        assert isinstance(action, Fuse)
        assert action.members == drawn
        assert set(action.electorate) == (set(drawn) & chain.cohort or set(drawn))


@pytest.mark.parametrize(("max_peers", "num_kept"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_a_round_is_of_the_one_before_and_all_are_drawn_as_often(
    max_peers: int, num_kept: int
) -> None:
    """Of a draw from all of twelve for four places, one or none would be of the last round in most rounds."""
    everybody, times, kept = peers("abcdefghijkl"), Counter[str](), Counter[int]()
    first = Chain(make_spec(min_peers=min(2, max_peers), max_peers=max_peers))
    chain = extend(first, "abcde"[:max_peers])
    for _ in range(60 * 12 // max_peers):
        drawn = draw(chain, everybody)
        assert len(drawn) == max_peers
        assert list(drawn) == sorted(drawn, key=lambda peer: rank(chain, peer))
        kept[len(chain.cohort.intersection(drawn))] += 1
        times.update(drawn)
        names = [name for name in "abcdefghijkl" if peer(name) in drawn]
        chain = extend(first, names, state_hash=hash_of(chain.tip))  # another tip, the same length
    assert min(kept) == num_kept
    assert len(times) == 12
    assert 30 <= min(times.values()) <= max(times.values()) <= 110  # 60 each, if chance had no say


@pytest.mark.parametrize(
    ("cohort", "candidates", "absent", "num_kept"),
    [
        ("ab", "abcdefg", "", 2),
        ("ab", "acdef", "", 1),
        ("abcd", "abcd", "", 4),
        ("abcd", "abcde", "", 3),
        ("abcd", "abcdefghijkl", "ab", 2),
    ],
)
def test_places_that_a_side_leaves_are_for_the_other(
    cohort: str, candidates: str, absent: str, num_kept: int
) -> None:
    chain = extend(EMPTY, cohort)
    drawn = draw(chain, peers(candidates), peers(absent))
    assert len(drawn) == 4
    assert len((chain.cohort - {*peers(absent)}).intersection(drawn)) == num_kept


def test_places_are_kept_for_those_who_vote() -> None:
    """Who rested has given up its vote; back in the round it takes no voter's place."""
    chain = extend(EMPTY, "abcd")
    everybody = "abcdefghijkl"
    ranked = sorted("abcd", key=lambda name: rank(chain, peer(name)))
    rested, voters = ranked[:2], ranked[2:]
    assert not {*peers(voters)}.intersection(draw(chain, peers(everybody)))  # were nobody absent
    for name in voters:
        others = busy(chain, everybody.replace(name, ""))
        action = decide(chain, standing(name, is_ready=False), others, NOW, absent=peers(rested))
        assert action == Finetune()


@given(st.sets(st.sampled_from("abcdefghij")), st.sets(st.sampled_from("abcdefghij")))
def test_who_is_drawn_is_drawn_where_others_are_not_seen(seen: set[str], unseen: set[str]) -> None:
    """Who hears of fewer peers may train in vain, but nobody waits who is expected to train."""
    chain = extend(EMPTY, "abcd")
    few, many = set(draw(chain, peers(seen))), set(draw(chain, peers(seen | unseen)))
    assert many.intersection(peers(seen)) <= few


def test_a_latecomer_to_a_full_round_trains_only_if_drawn() -> None:
    chain = extend(EMPTY, ["a", "b", "c", "d"])
    drawn = draw(chain, peers("abcdef"))
    for name in "ef":
        action = decide(chain, standing(name, is_ready=False), busy(chain, "abcdef".replace(name, "")), NOW)
        assert action == (Finetune() if peer(name) in drawn else Wait("not drawn this round"))


def test_catch_up_comes_first_and_known_commits_are_no_reason() -> None:
    ahead = extend(EMPTY, ["a", "b"])
    others = ready(EMPTY, "c") + busy(ahead, "ab")
    assert decide(EMPTY, standing(), others, NOW) == CatchUp((peer("a"), peer("b")))
    assert decide(EMPTY, standing(is_ready=False), others, NOW) == CatchUp((peer("a"), peer("b")))
    action = decide(EMPTY, standing(), others, NOW, known_tips=[ahead.tip])
    assert isinstance(action, Fuse)
    behind = busy(EMPTY, "a")  # at round 0: nothing to learn from it
    assert decide(ahead, standing(is_ready=False), behind, NOW) == Finetune()


def test_the_run_ends_but_not_before_another_chain_is_looked_at() -> None:
    done = extend(Chain(make_spec(num_rounds=1)), ["a", "b"])
    assert decide(done, standing(), [], NOW) == Stop("all rounds are committed")
    other = extend(Chain(done.spec), ["a", "c"], state_hash=hash_of("other"))
    assert decide(done, standing(), busy(other, "c"), NOW) == CatchUp((peer("c"),))


def test_the_leader_rotates_with_the_attempt() -> None:
    fuse = Fuse(members=("x", "y", "z"), electorate=("x",))
    assert [fuse.leader(attempt) for attempt in range(5)] == ["x", "y", "z", "x", "y"]


def test_the_rank_is_drawn_anew_by_each_commit() -> None:
    one = extend(EMPTY, ["a", "b"])
    two = extend(EMPTY, ["a", "b"], state_hash=hash_of("other"))
    orders = {tuple(sorted("abcdefgh", key=lambda n: rank(chain, peer(n)))) for chain in (EMPTY, one, two)}
    assert len(orders) == 3


PHASES = st.sampled_from(["ready", "finetuning", "evaluating", "waiting", "joining", "done", "absent"])


@given(st.lists(PHASES, min_size=6, max_size=6), st.sampled_from([0.0, 10 * LIMIT]), st.booleans())
def test_all_who_see_the_same_decide_the_same(phases: list[str], later: float, has_commit: bool) -> None:
    chain = extend(EMPTY, ["a", "b", "c"]) if has_commit else EMPTY
    members = {
        name: make_member(chain, name, phase=phase)
        for name, phase in zip("abcdef", phases, strict=True)
        if phase != "absent"
    }
    groups: list[Fuse] = []
    waits: list[Action] = []
    for name, member in members.items():
        if member.record.phase != "ready":
            continue
        others = sorted((m for n, m in members.items() if n != name), key=lambda m: m.peer_id)
        action = decide(chain, standing(name), others, NOW + later)
        (groups if isinstance(action, Fuse) else waits).append(action)  # type: ignore[arg-type]
    assert len(set(groups)) <= 1
    if groups:
        [group] = set(groups)
        assert len(groups) == len(group.members)  # every member agrees, and only members
        assert 2 <= len(group.members) <= 4
        assert len(set(group.members) & set(group.electorate)) >= required_signatures(group.electorate)
        assert all(wait == Wait("not drawn this round") for wait in waits)


@given(st.lists(PHASES, min_size=6, max_size=6))
def test_after_the_deadline_only_peers_in_training_can_hold_a_round_up(phases: list[str]) -> None:
    """Liveness: when everybody in training is ready, the round is fused, whatever the others do."""
    phases = ["ready" if phase in ("finetuning", "evaluating") else phase for phase in phases]
    chain = extend(EMPTY, ["a", "b", "c", "d"])
    others = [
        make_member(chain, name, phase=phase)
        for name, phase in zip("abcdef", phases, strict=True)
        if phase != "absent"
    ]
    gone = [p for p, phase in zip(peers("abcdef"), phases, strict=True) if phase != "ready"]
    drawn = draw(chain, [peer("me"), *(m.peer_id for m in others if m.record.phase == "ready")])
    absent = {*gone, *(chain.cohort - set(drawn))}  # silent, or resigned
    action = decide(chain, standing(), others, NOW + 10 * LIMIT, absent=absent)
    if phases.count("ready") == 0:
        assert action == Alone()
    else:
        assert isinstance(action, Fuse) or action == Wait("not drawn this round")
