"""Does the gate reject what is worse beyond noise, and only that; and does a swarm act on it?"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.chain import Chain
from coordinator.network import Network, PeerUnreachable
from coordinator.records import _SIGNATURE_DOMAIN as SIGNATURE_DOMAIN
from coordinator.records import (
    Commit,
    Contribution,
    Exclusion,
    GateVote,
    RecordError,
    Signed,
    SignedCommit,
    sign,
    signature_text,
)
from coordinator.rounds import LEFT_OUT, Finetune, Fuse, Standing, decide
from peer.allreduce import _PART as PART_FRAME
from peer.allreduce import Rules, _Exchange
from peer.display import Reporter
from peer.gate import Verdict, most_deviant, p_value, rejects, verdict
from peer.gatekeeper import Gatekeeper
from peer.learner import Evaluation
from scripts.swarm_processes import LocalSwarm, SwarmProcess
from tests import exchanges
from tests.fakes import (
    CALL_SECONDS,
    NOW,
    hash_of,
    identity,
    make_commit,
    make_heartbeat,
    make_member,
    make_spec,
    peer,
    peers,
    signed_by,
)
from tests.test_agreement import Peer, swarm
from tests.test_swarm import LOOPBACK, START_SECONDS, final_state
from tests.tiny_models import make_model_dir, make_texts

FIVE, EIGHT = peers("abcde"), peers("abcdefgh")


def rows(*, lost: int, gained: int, same: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Errors before and after: so many rows were right and are wrong, and the other way round."""
    before = np.array([0.0] * lost + [1.0] * gained + [0.0, 1.0] * same)
    after = np.array([1.0] * lost + [0.0] * gained + [0.0, 1.0] * same)
    return before, after


# the bit


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        (0, 0, 1.0),
        (3, 0, 1 / 8),
        (7, 0, 1 / 128),
        (9, 1, 11 / 1024),  # 10 over 9, and 10 over 10
        (10, 1, 12 / 2048),
        (5, 5, 638 / 1024),  # (1024 + 252) / 2
        (0, 7, 1.0),
    ],
)
def test_the_exact_test_of_mcnemar_by_hand(lost: int, gained: int, expected: float) -> None:
    before, after = rows(lost=lost, gained=gained)
    assert p_value("classification", before, after) == pytest.approx(expected, rel=1e-12)
    assert rejects("classification", before, after, 0.01) == (expected < 0.01)


def test_rows_that_nothing_happened_to_do_not_count() -> None:
    few, many = rows(lost=8, gained=2, same=0), rows(lost=8, gained=2, same=5000)
    assert p_value("classification", *few) == p_value("classification", *many) == pytest.approx(56 / 1024)


def test_signed_ranks_of_a_regression_by_hand() -> None:
    """Six differences, all larger after: of 64 signs one is as bad. One that is smaller, of rank 1: two."""
    before = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    worse = before + np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    assert p_value("regression", before, worse) == pytest.approx(1 / 64)
    assert p_value("regression", worse, before) == 1.0
    worse[0] = before[0] - 0.01
    assert p_value("regression", before, worse) == pytest.approx(2 / 64)
    assert p_value("regression", before, before) == 1.0


def test_errors_that_are_not_finite_are_the_worst() -> None:
    before = np.linspace(0.1, 1.0, 20)
    ruined = np.full(20, np.nan)
    assert rejects("regression", before, ruined, 0.01)
    assert not rejects("regression", ruined, before, 0.01)
    assert p_value("regression", ruined, np.full(20, np.inf)) == 1.0  # one ruin is no worse than another


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="different rows"):
        p_value("classification", np.zeros(3), np.zeros(4))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_noise_rejects_as_rarely_as_the_level_says(seed: int) -> None:
    """400 votes on states that are no worse: at most the level, give or take the draw."""
    generator = np.random.default_rng(seed)
    changed = generator.integers(0, 60, size=400)
    lost = generator.binomial(changed, 0.5)
    wrong = [
        rejects("classification", *rows(lost=int(n), gained=int(m - n), same=0), 0.01)
        for n, m in zip(lost, changed, strict=True)
    ]
    assert sum(wrong) <= 20  # 400 votes at 0.01: 4 expected; 20 has a probability below 1e-8


# the verdict


def judged(votes: str, *, names: str = "abcde", is_over: bool = True, **rule: Any) -> Verdict | None:
    """`votes`: r and a in the order of the names, - for silence."""
    cast = {peer(n): v == "r" for n, v in zip(names, votes, strict=True) if v != "-"}
    return verdict(peers(names), cast, **{"share": 0.5, "min_voters": 2, "is_over": is_over, **rule})


@pytest.mark.parametrize(
    ("votes", "is_rejected"),
    [
        ("rrraa", True),
        ("rraaa", False),
        ("rraa-", False),  # half is not more than half
        ("rra--", True),  # 2 of 3 votes, of more than half of the members
        ("rr---", False),  # too few votes, whatever they say
        ("-----", False),
        ("aaaaa", False),
    ],
)
def test_votes_of_five(votes: str, is_rejected: bool) -> None:
    found = judged(votes)
    assert found == Verdict(is_rejected, votes.count("r"), 5 - votes.count("-"), 5)


def test_liars_of_eight() -> None:
    """The figures of the module's docstring."""
    names = "abcdefgh"
    for votes, is_rejected in [
        ("rraaa---", False),  # one liar needs two honest rejections where five vote
        ("rrraa---", True),
        ("rrrraaaa", False),  # and four where all do
        ("rrrrraaa", True),
        ("rr------", False),  # two liars alone undo nothing
        ("rrr-----", False),
        ("rrr--aa-", True),  # three do, if no more than two honest members vote
        ("rrraaa--", False),
        ("aaarrrrr", True),  # three do not save a harmful state, four do
        ("aaaarrrr", False),
    ]:
        found = judged(votes, names=names)
        assert found is not None
        assert found.is_rejected == is_rejected, votes


def test_one_voice_never_undoes_a_round() -> None:
    assert judged("r", names="a") == Verdict(False, 1, 1, 1)
    assert judged("r-", names="ab") == Verdict(False, 1, 1, 2)
    assert judged("ra", names="ab") == Verdict(False, 1, 2, 2)
    assert judged("rr", names="ab") == Verdict(True, 2, 2, 2)
    assert judged("rrr--", min_voters=4) == Verdict(False, 3, 3, 5)


def test_strangers_do_not_count() -> None:
    votes = dict.fromkeys(peers("vwxyz"), True) | {peer("a"): False}
    assert verdict(FIVE, votes, share=0.5, min_voters=2, is_over=True) == Verdict(False, 0, 1, 5)


@pytest.mark.parametrize(
    ("votes", "is_rejected"),
    [("rrr--", True), ("rr---", None), ("rra--", None), ("aaa--", False), ("-----", None), ("aarr-", None)],
)
def test_a_verdict_comes_as_soon_as_nothing_can_change_it(votes: str, is_rejected: bool | None) -> None:
    found = judged(votes, is_over=False)
    assert (None if found is None else found.is_rejected) == is_rejected


VOTES = st.lists(st.sampled_from("ra-"), min_size=1, max_size=9)


@settings(deadline=None)
@given(votes=VOTES, share=st.floats(0.5, 0.99), min_voters=st.integers(2, 6))
def test_no_more_than_the_share_never_reject(votes: list[str], share: float, min_voters: int) -> None:
    names = "abcdefghi"[: len(votes)]
    found = judged("".join(votes), names=names, share=share, min_voters=min_voters)
    assert found is not None
    num_votes = len(votes) - votes.count("-")
    if votes.count("r") <= share * num_votes or num_votes < min_voters or 2 * num_votes <= len(votes):
        assert not found.is_rejected
    else:
        assert found.is_rejected


@settings(deadline=None)
@given(
    votes=VOTES, later=st.lists(st.sampled_from("ra-"), min_size=9, max_size=9), share=st.floats(0.5, 0.99)
)
def test_an_early_verdict_is_the_last_one(votes: list[str], later: list[str], share: float) -> None:
    names = "abcdefghi"[: len(votes)]
    early = judged("".join(votes), names=names, share=share, is_over=False)
    filled = [new if old == "-" else old for old, new in zip(votes, later, strict=False)]
    last = judged("".join(filled), names=names, share=share)
    assert last is not None
    assert early is None or early.is_rejected == last.is_rejected


# who is left out


def contributions(names: str, **factors: float) -> list[Contribution]:
    return [Contribution(peer=peer(n), num_examples=1, weight=1.0, factor=factors.get(n, 1.0)) for n in names]


def gram_of(*vectors: list[float]) -> np.ndarray:
    matrix = np.array(vectors)
    return matrix @ matrix.T


ALIKE = ([1.0, 0.5, 0.0], [1.0, 0.0, 0.5], [1.0, 0.5, 0.5], [1.0, -0.5, 0.0])


def test_the_one_that_points_elsewhere_is_left_out() -> None:
    """Its cosines to the others, by hand: -0.894, -0.894, -0.816, -0.894; the lower median is -0.894."""
    named = most_deviant(contributions("abcde"), gram_of(*ALIKE, [-1.0, 0.0, 0.0]), min_left=2)
    assert named is not None
    assert named.peer == peer("e")
    assert named.reason.startswith("median cosine -0.894 to the others")


def test_the_one_that_is_far_too_long_is_left_out_first() -> None:
    named = most_deviant(
        contributions("abcde"), gram_of([9.0, 0.0, 0.0], *ALIKE[1:], [-1.0, 0.0, 0.0]), min_left=2
    )
    assert named == Exclusion(peer=peer("a"), reason="norm 9 in a round that was undone, the median is 1.12")


def test_whom_nobody_can_tell_apart() -> None:
    gram = gram_of(*ALIKE)
    assert most_deviant(contributions("ab"), gram_of(*ALIKE[:2]), min_left=1) is None  # each is as far away
    assert most_deviant(contributions("abcd"), gram, min_left=4) is None  # too few would be left
    assert most_deviant(contributions("abcd"), None, min_left=2) is None
    assert most_deviant(contributions("abc"), gram, min_left=2) is None  # of other contributions
    gram[:2] = gram[:, :2] = np.nan
    assert most_deviant(contributions("abcd"), gram, min_left=2) is None


def test_who_was_screened_out_did_no_harm() -> None:
    gram = gram_of(*ALIKE, [-1.0, 0.0, 0.0])
    gram[4] = gram[:, 4] = np.nan
    named = most_deviant(contributions("abcde", e=0.0), gram, min_left=2)
    assert named is not None
    assert named.peer == peer("d")


def test_a_reducer_that_dropped_a_contribution_does_not_hide_what_the_others_took() -> None:
    """The record's factor is the lowest of all reducers'; half of its values counted all the same."""
    gram = gram_of(*ALIKE, [-0.5, 0.0, 0.0])
    named = most_deviant(contributions("abcde", e=0.0), gram, min_left=2)
    assert named is not None
    assert named.peer == peer("e")


# the chain: for how long


def fused(chain: Chain, names: str, **changes: Any) -> Chain:
    commit = make_commit(chain, names, state_hash=hash_of(f"state {chain.round} {names}"), **changes)
    return chain.extended(signed_by(commit, names))


def undone(chain: Chain, *left_out: str, **changes: Any) -> Chain:
    """By all who made the tip."""
    names = [n for n in "abcde" if peer(n) in chain.cohort]
    commit = make_commit(
        chain,
        [],
        kind="rollback",
        state_hash=chain.before().state_hash,
        electorate=sorted(chain.cohort),
        excluded=[Exclusion(peer=peer(n), reason=f"for {n}").model_dump() for n in left_out],
        **changes,
    )
    return chain.extended(signed_by(commit, names))


def test_left_out_until_so_many_fusions_stand() -> None:
    chain = Chain(make_spec(num_rounds=20, gate_left_out_rounds=2))
    chain = undone(fused(chain, "abcde"), "e")
    assert chain.left_out == {peer("e"): "for e"}
    chain = fused(chain, "abcd")
    assert chain.left_out == {peer("e"): "for e"}
    undone_again = undone(fused(chain, "abcd"), "d")  # an undone round does not count
    assert undone_again.left_out == {peer("d"): "for d", peer("e"): "for e"}
    chain = fused(chain, "abcd")
    assert chain.left_out == {}
    assert fused(fused(undone_again, "abc"), "abc").left_out == {}


def test_roll_backs_in_a_row_are_counted() -> None:
    chain = fused(Chain(make_spec(num_rounds=20)), "abcde")
    assert chain.num_rollbacks == 0
    for number in (1, 2, 3):
        chain = undone(fused(chain, "abcde"))
        assert chain.num_rollbacks == number
        assert fused(chain, "abcde").before().num_rollbacks == number
    assert fused(fused(chain, "abcde"), "abcde").before().num_rollbacks == 0


def test_a_roll_back_names_one_of_its_round_at_most() -> None:
    chain = fused(Chain(make_spec(num_rounds=20)), "abcd")
    with pytest.raises(RecordError, match="at most one"):
        undone(chain, "a", "b")
    with pytest.raises(RecordError, match="at most one"):
        undone(chain, "e")


def test_who_is_left_out_waits_and_the_others_go_on_without() -> None:
    chain = undone(fused(Chain(make_spec(num_rounds=20)), "abcd"), "d")

    def action(name: str, here: str, *, is_ready: bool = True) -> Any:
        others = [make_member(chain, n, phase="ready", num_examples=100) for n in here if n != name]
        return decide(chain, Standing(peer(name), is_ready, NOW - 10.0), others, NOW)

    assert action("d", "abcd") == action("d", "abcd", is_ready=False) == LEFT_OUT
    fuse = action("a", "abcd")
    assert isinstance(fuse, Fuse)
    assert set(fuse.members) == set(peers("abc"))
    assert isinstance(action("a", "ad", is_ready=False), Finetune)
    assert isinstance(action("d", "ad", is_ready=False), Finetune)  # else nobody could go on


# votes, over real networks


def settled_chain(members: list[Peer], chain: Chain | None = None) -> Chain:
    """With a round more, that all of them made."""
    chain = chain or members[0].agreement.chain
    ids = [member.peer_id for member in members]
    made = [Contribution(peer=p, num_examples=100, weight=1.0) for p in ids]
    commit = make_commit(chain, ["a"]).model_copy(update={"contributors": made, "electorate": ids})
    return signed_by_all(members, chain, commit)


def undone_by(members: list[Peer], chain: Chain) -> Chain:
    back = {
        "kind": "rollback",
        "contributors": [],
        "electorate": [member.peer_id for member in members],
        "state_hash": chain.before().state_hash,
    }
    return signed_by_all(members, chain, make_commit(chain, ["a"]).model_copy(update=back))


def signed_by_all(members: list[Peer], chain: Chain, commit: Commit) -> Chain:
    signatures = {m.peer_id: signature_text(commit, m.identity) for m in members}
    return chain.extended(SignedCommit(commit=commit, signatures=signatures))


def cast(member: Peer, tip: str, *, rejects: bool) -> None:
    member.run(member.agreement.gate_votes.cast(tip, rejects=rejects))


def test_votes_reach_all_and_only_members_and_one_bit_each_counts(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        chain = settled_chain(members)
        a, b, c = members
        cast(a, chain.tip, rejects=True)  # before b and c know the commit
        for member in members:
            member.adopt(chain)
        cast(b, chain.tip, rejects=False)
        counts = [member.agreement.gate_votes.of(chain.tip) for member in members]
        assert counts == [{a.peer_id: True, b.peer_id: False}] * 3

        stranger = sign(GateVote(run=chain.spec.digest, commit=chain.tip, rejects=True), identity("x"))
        a.call(b, "gate_vote", {"votes": [stranger.to_json()]})
        forged = {**stranger.to_json(), "peer_id": c.peer_id}
        bad: list[Any] = [[forged], "all", [{}], [None], [forged] * 999]
        for votes in bad:
            assert_refused(a, b, {"votes": votes})
        assert_refused(a, b, [])
        foreign = sign(GateVote(run=hash_of("another"), commit=chain.tip, rejects=True), c.identity)
        assert_refused(c, b, {"votes": [foreign.to_json()]})
        assert b.agreement.gate_votes.of(chain.tip) == counts[0]

        # Who tells some one thing and some another counts as silent, for all who have heard both.
        bits = [
            sign(GateVote(run=chain.spec.digest, commit=chain.tip, rejects=bit), c.identity)
            for bit in (True, False)
        ]
        c.call(a, "gate_vote", {"votes": [bits[0].to_json()]})
        c.call(b, "gate_vote", {"votes": [bits[1].to_json()]})
        assert a.agreement.gate_votes.of(chain.tip)[c.peer_id]
        a.run(a.agreement.gate_votes.tell_all(chain.tip))
        b.run(b.agreement.gate_votes.tell_all(chain.tip))
        assert [m.agreement.gate_votes.of(chain.tip) for m in (a, b)] == counts[:2]


def test_votes_of_strangers_do_not_crowd_out_those_of_members(tmp_path: Path) -> None:
    """Whoever is here may vote before I know who made the round; what I tell on are members' votes."""
    spec = make_spec(lease_seconds=10.0, created_at=Network.now(), max_peers=2)
    with swarm(2, tmp_path, spec) as members:
        chain = settled_chain(members)
        a, b = members
        for name in "vwxyz":
            heartbeat = make_heartbeat(chain.before(), phase="waiting", **lives())
            signed = json.dumps(sign(heartbeat, identity(name)).to_json()).encode()
            a.agreement.membership.observe(signed, now=Network.now())
            bits = [
                sign(GateVote(run=spec.digest, commit=chain.tip, rejects=bit), identity(name)).to_json()
                for bit in (True, False)
            ]
            b.call(a, "gate_vote", {"votes": bits})
        for member in members:
            member.adopt(chain)
        own = sign(GateVote(run=spec.digest, commit=chain.tip, rejects=True), a.identity).to_json()
        b.call(a, "gate_vote", {"votes": [own]})
        a.run(a.agreement.gate_votes.tell_all(chain.tip))
        assert b.agreement.gate_votes.of(chain.tip) == {a.peer_id: True}


def test_a_vote_of_many_blanks_is_refused(tmp_path: Path) -> None:
    """It would be told on by all, and two of them make a message that nobody takes."""
    with swarm(2, tmp_path) as members:
        chain = settled_chain(members)
        a, b = members
        for member in members:
            member.adopt(chain)
        payload = GateVote(run=chain.spec.digest, commit=chain.tip, rejects=True).canonical() + b" " * 600_000
        padded = Signed(b.peer_id, payload, b.identity.sign(SIGNATURE_DOMAIN + payload)).to_json()
        assert_refused(b, a, {"votes": [padded]})
        assert a.agreement.gate_votes.of(chain.tip) == {}


def lives() -> dict[str, float]:
    now = Network.now()
    return {"issued_at": now, "expires_at": now + 10.0}


def assert_refused(sender: Peer, receiver: Peer, body: Any) -> None:
    with pytest.raises(PeerUnreachable):
        sender.call(receiver, "gate_vote", body)


def test_late_votes_do_not_count_and_no_figure_is_in_one(tmp_path: Path) -> None:
    assert set(GateVote.model_fields) == {"kind", "run", "commit", "rejects"}
    with swarm(2, tmp_path) as members:
        chain = settled_chain(members)
        for member in members:
            member.adopt(chain)
        members[1].agreement.gate_votes.close(chain.tip)
        cast(members[0], chain.tip, rejects=True)
        assert members[1].agreement.gate_votes.of(chain.tip) == {}


def test_nobody_waits_for_who_has_gone_on(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        chain = settled_chain(members)
        a, b, c = members
        for member in members:
            member.adopt(chain)
        for member in (b, c):
            member.run(member.agreement.set_phase("evaluating", entered_at=Network.now()))
        votes = a.agreement.gate_votes
        cast(a, chain.tip, rejects=False)
        assert votes.may_come(Network.now()) == {b.peer_id, c.peer_id}
        cast(b, chain.tip, rejects=False)
        assert votes.may_come(Network.now()) == {c.peer_id}
        c.run(c.agreement.set_phase("finetuning"))
        assert votes.may_come(Network.now()) == frozenset()


def test_a_roll_back_that_names_another_one_is_refused(tmp_path: Path) -> None:
    """The electors verify the choice: two of three expect another name, so there is no majority."""
    with swarm(3, tmp_path) as members:
        chain = settled_chain(members)
        named = (Exclusion(peer=members[2].peer_id, reason="deviant"),)
        for member in members:
            member.adopt(chain)
            member.run(member.agreement.set_phase("finetuning", entered_at=Network.now()))
            member.agreement._wants_rollback = chain.tip.__eq__
        members[0].agreement._leaves_out = lambda: named
        assert members[0].run(members[0].agreement.roll_back("worse")) is None
        members[1].agreement._leaves_out = lambda: named
        committed = members[0].run(members[0].agreement.roll_back("worse"))
        assert committed is not None
        back = committed.chain
        assert (back.state_hash, back.left_out) == (
            chain.before().state_hash,
            {members[2].peer_id: "deviant"},
        )
        assert json.loads(back.commits[-1].commit.canonical())["excluded"][0]["reason"] == "deviant"


# what one peer makes of it


def evaluation(errors: np.ndarray) -> Evaluation:
    return Evaluation(0.5, 0.5, errors)


def keepers(members: list[Peer], chain: Chain) -> list[Gatekeeper]:
    """Of all members, who hold the state of `chain` and were in its all-reduce; the last one deviates."""
    made = []
    gram = gram_of(*ALIKE[: len(members) - 1], [-1.0, 0.0, 0.0])
    for member in members:
        reporter = Reporter(json_lines=True, stream=io.StringIO())
        keeper = Gatekeeper(chain.spec, member.network, member.agreement, reporter, "classification")
        member.adopt(chain)
        member.run(member.agreement.set_phase("evaluating", entered_at=Network.now()))
        keeper.begin(chain, was_there=True, gram=gram)
        made.append(keeper)
    return made


def test_a_peer_votes_waits_for_the_others_and_lets_go_in_the_end(tmp_path: Path) -> None:
    spec = make_spec(lease_seconds=10.0, created_at=Network.now(), gate_max_rollbacks=1)
    worse, same = rows(lost=20, gained=2), rows(lost=3, gained=3)
    with swarm(4, tmp_path, spec) as members:
        chain = settled_chain(members)
        kept = keepers(members, chain)
        first = kept[0]
        for num_votes, (keeper, (before, after)) in enumerate(
            zip(kept, (worse, worse, worse, same), strict=True)
        ):
            assert first.is_rejected(chain) == (num_votes == 3)  # of 4: the last one cannot change it
            keeper.vote(evaluation(before), evaluation(after))
        assert all(keeper.is_settled(chain) and keeper.is_rejected(chain) for keeper in kept)
        assert [keeper.told()["rejects"] for keeper in kept] == [True, True, True, False]
        assert {keeper.leaves_out(chain) for keeper in kept} == {first.leaves_out(chain)}
        assert [named.peer for named in first.leaves_out(chain)] == [members[3].peer_id]
        assert first.reason(chain).startswith("the gate: 3 of ")
        assert not first.is_rejected(Chain(spec))  # another tip

        stranger = Gatekeeper(
            spec, members[0].network, members[0].agreement, Reporter(json_lines=False), "classification"
        )
        stranger.begin(chain)  # got the state from others: it cannot check whom to leave out
        assert not stranger.is_rejected(chain)

        # After one roll-back in a row the next round stands, whatever the votes say.
        back = undone_by(members, chain)
        again = settled_chain(members, back)
        for keeper, member in zip(keepers(members, again), members, strict=True):
            keeper.vote(evaluation(worse[0]), evaluation(worse[1]))
            assert member.agreement.gate_votes.of(again.tip)[member.peer_id]
            assert not keeper.is_rejected(again)


@pytest.mark.parametrize("has_gate", [True, False])
def test_the_last_round_is_judged_like_any_other_and_no_gate_asks_nobody(
    tmp_path: Path, has_gate: bool
) -> None:
    before, after = rows(lost=20, gained=0)
    spec = make_spec(lease_seconds=10.0, created_at=Network.now(), num_rounds=1, gate=has_gate)
    with swarm(2, tmp_path, spec) as members:
        chain = settled_chain(members)
        kept = keepers(members, chain)
        assert kept[0].is_settled(chain) == (not has_gate)
        for keeper in kept:
            keeper.vote(evaluation(before), evaluation(after))
        assert bool(members[0].agreement.gate_votes.of(chain.tip)) == has_gate
        assert kept[0].is_settled(chain)
        assert kept[0].is_rejected(chain) == has_gate


# inner products, told with the results


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_all_members_get_the_same_inner_products_without_a_second_phase(codec: str) -> None:
    """Against float64, on what arrives; the reducers' sums are rounded apart, so not the same bits."""
    with exchanges.running_swarm() as members:
        outgoing = members.prepare(exchanges.deltas(), codec)
        group = members.group()
        rules = Rules("mean", "none", exchanges.LIMIT_SECONDS, has_gram=True)
        futures = [
            network.submit(service.reduce(group, own, rules, residuals={}))
            for network, service, own in zip(members.networks, members.services, outgoing, strict=True)
        ]
        results = [future.result(CALL_SECONDS) for future in futures]
        grams = [result.gram for result in results]
        rows_ = exchanges.decoded_rows(outgoing)
        assert grams[0] is not None
        np.testing.assert_allclose(grams[0], rows_ @ rows_.T, rtol=1e-9, atol=1e-9)
        for gram in grams[1:]:
            assert gram is not None
            assert gram.tobytes() == grams[0].tobytes()
        plain = members.reduce(members.group(), outgoing)
        assert plain[0].gram is None
        assert torch.equal(plain[0].flat, results[0].flat)  # the result is what it is without


def test_who_keeps_back_a_part_is_measured_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last part at each reducer does not fit its manifest, so it is out of that part only."""
    with exchanges.running_swarm() as members:
        honest = exchanges.deltas()[1:]
        common = torch.randn(exchanges.SIZE, generator=torch.Generator().manual_seed(1)) * 0.05
        deltas = [-common, *(common + delta * 0.5 for delta in honest)]
        outgoing = members.prepare(deltas)
        group, liar = members.group(), members.peer_ids[0]
        last = {parts[-1] for parts in members.owned(group).values()}

        async def send(original: Any, self: Any, stream: Any, part: int) -> None:
            if part in last:
                await stream.send(PART_FRAME, bytes(len(self.outgoing.parts[part])))
            else:
                await original(self, stream, part)

        exchanges.on_member(monkeypatch, _Exchange, "_send_part", liar, send)
        rules = Rules("mean", "none", exchanges.LIMIT_SECONDS, has_gram=True)
        futures = [
            network.submit(service.reduce(group, own, rules, residuals={}))
            for network, service, own in zip(members.networks, members.services, outgoing, strict=True)
        ]
        results = [future.result(CALL_SECONDS) for future in futures]
        for result in results:
            assert result.contributions[0].missing
            assert result.gram is not None
            assert np.isfinite(result.gram).all()
            named = most_deviant(result.contributions, result.gram, min_left=2)
            assert named is not None
            assert named.peer == liar


# real processes: one of five does harm


def write_examples(path: Path, num_examples: int, seed: int) -> Path:
    texts, labels = make_texts(num_examples, seed=seed)
    lines = [
        json.dumps({"text": text, "label": f"label {label}"})
        for text, label in zip(texts, labels, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


HONEST = ("a", "b", "c", "d")


def run_with_a_liar(
    directory: Path, *flags: str, lie: str = "flipped-labels", num_rounds: int = 6
) -> dict[str, SwarmProcess]:
    """Five real peers that have all ended. Plain mean, no screening, weights by examples: the claim of the
    last one, which lies from round 2 on (`tests/faults.py`), makes its delta nearly the mean.
    """
    model = make_model_dir(directory / "pretrained")
    run = ["--rounds", str(num_rounds), "--round-examples", "600", "--min-peers", "4", *flags]
    run += ["--lease-seconds", "15", "--weights", "examples", "--max-weight", "1000"]
    training = ["--batch-size", "8", "--learning-rate", "3e-3", "--max-length", "16"]
    training += ["--linger-seconds", "20"]
    entry = ["--model", str(model), *run]
    peers_: dict[str, SwarmProcess] = {}
    with LocalSwarm(directory / "logs") as swarm_:
        for seed, name in enumerate((*HONEST, "liar")):
            data = write_examples(directory / f"{name}.jsonl", 500, seed)
            held_out = write_examples(directory / f"{name}-held-out.jsonl", 1000, 100 + seed)
            own = ["--data", str(data), "--validation-data", str(held_out)]
            kind = lie if name == "liar" else "none"
            fault = [kind, "ready", "--dump", str(directory / "dump"), "--", "peer.join"]
            joined = [*fault, "--output-dir", str(directory / name), *own, *LOOPBACK, *training, *entry]
            peers_[name] = swarm_.start(name, "tests.faults", joined)
            if name == "a":
                started = swarm_.wait_for(peers_[name], "started", timeout_seconds=2 * START_SECONDS)
                entry = ["--run", started["spec_digest"], "--initial-peers", *started["initial_peers"]]
        swarm_.wait_until_ended(list(peers_.values()), timeout_seconds=400.0)
    assert len({final_state(directory / name) for name in peers_}) == 1
    for name in HONEST:
        for entry_ in rounds_of(directory / name):
            print(name, entry_["round"], entry_["accuracy"], entry_["gate"])  # pytest -s: for the diary
    return peers_


def rounds_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_harmful_round_is_undone_and_the_next_one_leaves_its_author_out(tmp_path: Path) -> None:
    peers_ = run_with_a_liar(tmp_path)
    liar = peers_["liar"].of_kind("joined")[0]["peer_id"]
    for name in HONEST:
        check_what_an_honest_peer_saw(tmp_path / name, peers_[name], liar)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_harmful_last_round_is_undone_before_anybody_leaves(tmp_path: Path) -> None:
    """Its state is the one that people will use: they get that of the round before it."""
    peers_ = run_with_a_liar(tmp_path, lie="reversed", num_rounds=2)
    for name in HONEST:
        (back,) = peers_[name].of_kind("rolled_back")
        first, _last = peers_[name].of_kind("committed")
        assert back["round"] == 3
        assert back["state_hash"] == first["state_hash"]
        assert final_state(tmp_path / name) == (3, first["state_hash"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_the_gate_the_harm_stands(tmp_path: Path) -> None:
    """What the other test would see if the gate did nothing."""
    peers_ = run_with_a_liar(tmp_path, "--no-gate")
    liar = peers_["liar"].of_kind("joined")[0]["peer_id"]
    for name in HONEST:
        assert not peers_[name].of_kind("verdict")
        assert not peers_[name].of_kind("rolled_back")
        rounds = rounds_of(tmp_path / name)
        assert [entry["round"] for entry in rounds] == [1, 2, 3, 4, 5, 6]
        assert sum(liar in entry["peers"] for entry in rounds) >= 3
        best, last = max(entry["accuracy"]["own"] for entry in rounds), rounds[-1]["accuracy"]["fused"]
        assert last < best - 0.1  # its members' own models are far better than what they make together


def check_what_an_honest_peer_saw(directory: Path, process: SwarmProcess, liar: str) -> None:
    (back,) = process.of_kind("rolled_back")
    (undone_,) = [event for event in process.of_kind("verdict") if event["rejected"]]
    assert undone_["round"] == back["round"] - 1
    assert undone_["num_rejections"] >= 3
    assert list(back["left_out"]) == [liar]
    assert "median cosine" in back["left_out"][liar]
    (following,) = [e for e in process.of_kind("committed") if e["round"] == back["round"] + 1]
    assert following["num_peers"] == 4
    rounds = rounds_of(directory)
    after = next(entry for entry in rounds if entry["round"] == following["round"])
    assert liar not in after["peers"]
    kept = json.loads((directory / "task_model" / "kept.json").read_text())
    assert kept["score"] >= max(entry["accuracy"]["base"] for entry in rounds) - 0.1
