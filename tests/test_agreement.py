"""Do peers agree on a round? Real networks and agreements, in one process; only the all-reduce is faked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator import chain_exchange, pace, presence
from coordinator.agreement import (
    Agreement,
    Committed,
    Fused,
    Group,
    GroupFailed,
    LeftAlone,
    Overtaken,
    Reduce,
)
from coordinator.ballot import Ballot
from coordinator.board import BoardValidator
from coordinator.chain import Chain, build_chain, is_better
from coordinator.errors import RoundError
from coordinator.identity import load_identity
from coordinator.network import Network, PeerUnreachable
from coordinator.records import (
    Acceptance,
    Commit,
    Promise,
    Proposal,
    RecordError,
    SignedCommit,
    sign,
    signature_text,
)
from coordinator.rounds import CatchUp, Fuse
from coordinator.spec import RunSpec
from tests.fakes import (
    CALL_SECONDS,
    NOW,
    addresses,
    extend,
    hash_of,
    identity,
    make_heartbeat,
    make_spec,
    network_config,
    peer,
    signed_by,
)

Outcome = Committed | Overtaken | LeftAlone


class Peer:
    """A network with an agreement, driven from the test's thread as a session drives it."""

    def __init__(self, network: Network, key: Path, chain: Chain) -> None:
        self.network, self.identity = network, load_identity(key)
        self.agreement = Agreement(network, self.identity, chain)
        self.run(network.start_dht(BoardValidator(chain.spec.digest)))
        self.run(self.agreement.start())

    @property
    def peer_id(self) -> str:
        return self.network.peer_id

    def run(self, coroutine: Any) -> Any:
        return self.network.run(coroutine, timeout_seconds=2 * CALL_SECONDS)

    def get_ready(self, num_examples: int = 100) -> None:
        self.run(self.agreement.set_phase("finetuning", entered_at=Network.now()))
        self.run(self.agreement.set_phase("ready", num_examples=num_examples))

    def fuse(self, reduce: Reduce) -> concurrent.futures.Future[Outcome]:
        return self.network.submit(self.agreement.fuse(reduce))

    def call(self, other: Peer, method: str, body: object) -> Any:
        return json.loads(
            self.run(self.network.call(other.peer_id, method, body, timeout_seconds=CALL_SECONDS))
        )

    def adopt(self, chain: Chain) -> None:
        async def adopt() -> None:
            self.agreement.adopt(chain)

        self.run(adopt())


async def same_state(group: Group) -> Fused:
    """Of an all-reduce that succeeds: the hash follows from the group."""
    return fused(group, hashlib.sha256(group.group_id).hexdigest())


def fused(group: Group, state_hash: str) -> Fused:
    """The first contribution has the norm 1, lost half of it to the rule; its parts 2 and 3 are missing."""
    first, *rest = group.contributions
    changed = first.model_copy(update={"norm": 1.0, "factor": 0.5, "missing": ((2, 4),)})
    return Fused(state_hash, (changed, *rest))


def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For silent leaders and missing votes; on loopback an answer takes 0.02 s."""
    monkeypatch.setattr(pace, "UNMEASURED_SECONDS", 1.0)
    monkeypatch.setattr(pace, "MIN_VOTE_SECONDS", 1.5)
    monkeypatch.setattr(pace, "MIN_BYTES_PER_SECOND", 1e7)


@contextmanager
def swarm(num_peers: int, directory: Path, spec: RunSpec | None = None) -> Iterator[list[Peer]]:
    chain = Chain(spec or make_spec(lease_seconds=10.0, created_at=Network.now()))
    with ExitStack() as stack:
        members: list[Peer] = []
        for index in range(num_peers):
            key = directory / f"{index}.key"
            entry = tuple(addresses(members[0].network)[:1]) if members else ()
            network = stack.enter_context(Network(network_config(key, initial_peers=entry)))
            members.append(Peer(network, key, chain))
        see_each_other(members)
        yield members


def see_each_other(members: list[Peer]) -> None:
    """Each tells all of whom it knows; in a session the board does it within seconds."""
    for member in members:
        for other in members:
            if other is not member:
                member.call(other, "heartbeat", envelope(member))


def outcomes(futures: list[concurrent.futures.Future[Outcome]]) -> list[Outcome]:
    return [future.result(2 * CALL_SECONDS) for future in futures]


def assert_one_chain(members: list[Peer], num_rounds: int) -> Chain:
    chains = [member.agreement.chain for member in members]
    assert {chain.round for chain in chains} == {num_rounds}
    assert len({chain.tip for chain in chains}) == 1
    for chain in chains:
        assert build_chain(chain.spec, chain.commits) == chain  # valid to anybody who asks
    return chains[0]


def leader_of(members: list[Peer], attempt: int = 0) -> Peer:
    action = members[0].agreement.decide()
    assert isinstance(action, Fuse)
    return next(member for member in members if member.peer_id == action.leader(attempt))


def test_three_rounds_by_all(tmp_path: Path) -> None:
    with swarm(4, tmp_path) as members:
        for num_rounds in (1, 2, 3):
            for index, member in enumerate(members):
                member.get_ready(num_examples=100 + index)
            groups = []
            for outcome in outcomes([member.fuse(same_state) for member in members]):
                assert isinstance(outcome, Committed)
                groups.append(outcome.group)
            assert len(set(groups)) == 1
            assert (groups[0].round, groups[0].attempt) == (num_rounds, 0)
            chain = assert_one_chain(members, num_rounds)
            commit = chain.commits[-1].commit
            assert chain.state_hash == hashlib.sha256(groups[0].group_id).hexdigest()
            assert {c.peer: c.num_examples for c in commit.contributors} == {
                member.peer_id: 100 + index for index, member in enumerate(members)
            }
            for member in members:
                assert len(member.agreement.chain.commits[-1].signatures) >= 3
            first, second, *_ = commit.contributors
            assert (first.norm, first.factor, first.missing) == (1.0, 0.5, ((2, 4),))
            assert (second.norm, second.factor, second.missing) == (0.0, 1.0, ())


def test_examples_weigh_and_a_peer_without_any_does_not_stop_the_round(tmp_path: Path) -> None:
    spec = make_spec(weights="examples", lease_seconds=10.0)
    with swarm(3, tmp_path, spec) as members:
        for member, num_examples in zip(members, (0, 100, 10_000), strict=True):
            member.get_ready(num_examples)
        [outcome, *_] = outcomes([member.fuse(same_state) for member in members])
        assert isinstance(outcome, Committed)
        weights = {c.peer: c.weight for c in outcome.group.contributions}
        assert [weights[member.peer_id] for member in members] == [0.01, 1.0, 4.0]


def test_alone_below_the_quorum(tmp_path: Path) -> None:
    with swarm(1, tmp_path) as [member]:
        member.get_ready()
        assert outcomes([member.fuse(same_state)]) == [LeftAlone()]
        assert member.agreement.chain.round == 0


@pytest.mark.slow
def test_a_member_that_refuses_is_left_out(tmp_path: Path) -> None:
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        refuser = next(m for m in members if m is not leader_of(members))

        async def refuse(_peer_id: str, _body: Any) -> bytes:
            return json.dumps({"accept": False, "why": "not today"}).encode()

        refuser.network.on_call("propose", refuse)
        willing = [member for member in members if member is not refuser]
        for outcome in outcomes([member.fuse(same_state) for member in willing]):
            assert isinstance(outcome, Committed)
            assert set(outcome.group.members) == {member.peer_id for member in willing}
        chain = assert_one_chain(willing, 1)
        assert len(chain.commits[0].commit.electorate) == 4  # three of four is still a majority
        see_each_other(members)
        assert isinstance(refuser.agreement.decide(), CatchUp)
        assert outcomes([refuser.fuse(same_state)]) == [Overtaken()]


def test_a_silent_leader_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_waits(monkeypatch)
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        silent = leader_of(members)  # ready, alive, and never proposes
        others = [member for member in members if member is not silent]
        second = leader_of(members, attempt=1)
        for outcome in outcomes([member.fuse(same_state) for member in others]):
            assert isinstance(outcome, Committed)
            assert outcome.group.attempt >= 1
            assert second.peer_id in outcome.group.members
        assert_one_chain(others, 1)


@pytest.mark.slow
def test_a_dead_leader_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_waits(monkeypatch)
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        dead = leader_of(members)
        others = [member for member in members if member is not dead]
        dead.network.close()
        for outcome in outcomes([member.fuse(same_state) for member in others]):
            assert isinstance(outcome, Committed)
            assert dead.peer_id not in outcome.group.members
        assert_one_chain(others, 1)


def test_nobody_waits_for_one_whose_process_ends_while_it_finetunes(tmp_path: Path) -> None:
    """Not for its lease, which is longer than this test waits, nor for the round's limit."""
    spec = make_spec(lease_seconds=300.0, round_limit_seconds=300.0, created_at=Network.now())
    with swarm(4, tmp_path, spec) as members:
        *others, dead = members
        dead.run(dead.agreement.set_phase("finetuning", entered_at=Network.now()))
        for member in others:
            member.get_ready()
        futures = [member.fuse(same_state) for member in others]
        dead.network.close()  # without a goodbye
        for outcome in outcomes(futures):
            assert isinstance(outcome, Committed)
            assert set(outcome.group.members) == {member.peer_id for member in others}
        assert_one_chain(others, 1)


def test_who_gets_a_new_daemon_tells_that_it_is_still_there(tmp_path: Path) -> None:
    """Its next heartbeat would come after 50 s; until then it would be gone for whoever was refused."""
    spec = make_spec(lease_seconds=300.0, created_at=Network.now())
    with swarm(2, tmp_path, spec) as (one, other):
        other.run(other.agreement.set_phase("finetuning", entered_at=Network.now()))
        os.kill(other.network.p2p._child.pid, signal.SIGKILL)
        one.agreement.membership.forget(other.peer_id)
        assert one.agreement.live() == []
        until(one.agreement.live, 2 * CALL_SECONDS)


@pytest.mark.slow
def test_who_proposes_without_end_and_never_begins_does_not_keep_the_others_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its proposals ends the attempt of whoever leads; so it is heard less and less."""
    short_waits(monkeypatch)
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        *others, pest = members

        async def propose_for_ever() -> None:
            attempt = 0
            while True:
                proposal = make_proposal([pest, *others], attempt=attempt, proposed_at=Network.now())
                body = sign(proposal, pest.identity).to_json()
                calls = [
                    pest.network.call(m.peer_id, "propose", body, timeout_seconds=CALL_SECONDS)
                    for m in others
                ]
                answers = await asyncio.gather(*calls, return_exceptions=True)
                told = [json.loads(a).get("attempt", attempt) for a in answers if isinstance(a, bytes)]
                attempt = max([attempt, *told]) + 1

        tormenting = pest.network.submit(propose_for_ever())
        for outcome in outcomes([member.fuse(same_state) for member in others]):
            assert isinstance(outcome, Committed | Overtaken)
        tormenting.cancel()
        assert max(member.agreement.chain.round for member in others) == 1


@pytest.mark.slow
def test_who_ends_what_runs_again_and_again_does_not_keep_the_others_from_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reducer does that gives the others nothing: it has its own result at once, and begins anew."""
    short_waits(monkeypatch)

    async def slow_state(group: Group) -> Fused:
        await asyncio.sleep(8.0)  # longer than anybody waits for votes
        return await same_state(group)

    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        *others, hasty = members
        hasting = hasty.fuse(same_state)
        for outcome in outcomes([member.fuse(slow_state) for member in others]):
            assert isinstance(outcome, Committed | Overtaken)
        hasting.cancel()
        assert_one_chain(others, 1)


def test_a_proposal_that_never_began_is_held_against_its_author_or_against_who_came_too_early() -> None:
    me, early, late = peer("me"), peer("early"), peer("late")
    chain = Chain(make_spec())
    first = Proposal(
        run=chain.spec.digest,
        round=1,
        attempt=0,
        previous=chain.tip,
        members=[sign(make_heartbeat(chain), identity("a")).to_json()],
        electorate=[peer("a")],
        proposed_at=NOW,
    )
    second = first.model_copy(update={"attempt": 1})

    def held_against(author: str, newer_author: str, *, age: float, **changes: Any) -> list[str]:
        charged: list[str] = []
        agreement = SimpleNamespace(
            _proposal=(author, first),
            _last_begun="",
            _charged="",
            _accepted_at=time.monotonic() - age,
            _attempt_seconds=lambda _: 3.0,
            _count_costly=lambda costly, *_: charged.append(costly),
            chain=chain,
        )
        newer = second.model_copy(update={"purpose": changes.pop("purpose", "fuse")})
        vars(agreement).update(changes)
        Agreement._count_unbegun(cast(Agreement, agreement), newer_author, newer)
        return charged

    assert held_against(late, me, age=4.0) == [late]  # it had time to begin
    assert held_against(late, early, age=1.0) == [early]  # it had not: who came too early ended it
    assert held_against(me, early, age=1.0) == [early]  # mine as well
    assert held_against(early, early, age=1.0) == [early]
    assert held_against(late, early, age=4.0, _last_begun=first.hash) == []
    assert held_against(late, early, age=4.0, _charged=first.hash) == []  # it has cost an attempt already
    assert held_against(late, early, age=4.0, purpose="rollback") == []


def test_who_never_signs_is_waited_for_as_its_round_trips_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody waits for themselves: a peer has no round trip to itself, which counted as a long one."""
    asked: list[set[str]] = []
    grace_seconds = pace.Pace.grace_seconds

    def grace_and_note(self: pace.Pace, peer_ids: Collection[str]) -> float:
        asked.append(set(peer_ids))
        return grace_seconds(self, peer_ids)

    monkeypatch.setattr(pace.Pace, "grace_seconds", grace_and_note)
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        outcomes([member.fuse(same_state) for member in members])
        everybody = {member.peer_id for member in members}
        assert {frozenset(others) for others in asked} <= {frozenset(everybody - {p}) for p in everybody}
        assert asked


def test_one_differing_state_is_outvoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_waits(monkeypatch)

    async def other_state(group: Group) -> Fused:
        return fused(group, hash_of("something else"))

    with swarm(3, tmp_path) as members:
        for member in members:
            member.get_ready()
        *honest, odd = members
        futures = [member.fuse(same_state) for member in honest]
        odd_future = odd.fuse(other_state)
        assert all(isinstance(outcome, Committed) for outcome in outcomes(futures))
        chain = assert_one_chain(honest, 1)
        assert odd.peer_id not in chain.commits[0].signatures
        see_each_other(members)
        assert outcomes([odd_future]) == [Overtaken()]  # it catches up; its own state is committed nowhere
        assert odd.agreement.chain.round == 0


@pytest.mark.slow
def test_without_a_majority_for_one_state_nothing_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two states, two signatures each, of four: not the first to come wins. The next attempt agrees."""
    short_waits(monkeypatch)
    attempts: list[int] = []
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()

        def reduce_of(index: int) -> Reduce:
            async def reduce(group: Group) -> Fused:
                attempts.append(group.attempt)
                if group.attempt == 0:
                    return fused(group, hash_of(f"state {index % 2}"))
                return await same_state(group)

            return reduce

        futures = [member.fuse(reduce_of(index)) for index, member in enumerate(members)]
        ended = outcomes(futures)  # who still waits for votes when the others go on may be left out
        committed = [m for m, outcome in zip(members, ended, strict=True) if isinstance(outcome, Committed)]
        assert len(committed) >= 3
        assert all(isinstance(outcome, Committed | Overtaken) for outcome in ended)
        chain = assert_one_chain(committed, 1)
        assert chain.commits[0].commit.attempt >= 1
        assert attempts.count(0) == 4
        assert chain.state_hash not in (hash_of("state 0"), hash_of("state 1"))


def test_who_fails_an_attempt_is_left_out_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_waits(monkeypatch)
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        liar = members[2]

        async def reduce(group: Group) -> Fused:
            if liar.peer_id in group.members:
                raise GroupFailed(liar.peer_id, "sent values that are not finite")
            return await same_state(group)

        honest = [member for member in members if member is not liar]
        for outcome in outcomes([member.fuse(reduce) for member in honest]):
            assert isinstance(outcome, Committed)
            assert set(outcome.group.members) == {member.peer_id for member in honest}
        assert_one_chain(honest, 1)


def test_an_attempt_that_breaks_off_is_tried_again_by_all(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        for member in members:
            member.get_ready()

        async def reduce(group: Group) -> Fused:
            if group.attempt == 0:
                raise RoundError("the exchange ended early")
            return await same_state(group)

        for outcome in outcomes([member.fuse(reduce) for member in members]):
            assert isinstance(outcome, Committed)
            assert outcome.group.attempt >= 1
        assert_one_chain(members, 1)


def test_a_member_that_hangs_in_the_all_reduce_joins_the_next_attempt(tmp_path: Path) -> None:
    cancelled: list[str] = []
    hangs = threading.Event()
    with swarm(3, tmp_path) as members:
        for member in members:
            member.get_ready()
        hanging = next(m for m in members if m is not leader_of(members, 1))

        def reduce_of(member: Peer) -> Reduce:
            async def reduce(group: Group) -> Fused:
                if group.attempt == 0 and member is hanging:
                    hangs.set()
                    try:
                        await asyncio.Event().wait()
                    finally:
                        cancelled.append(member.peer_id)
                if group.attempt == 0:
                    await asyncio.to_thread(hangs.wait, CALL_SECONDS)
                    raise RoundError("the exchange ended early")
                return await same_state(group)

            return reduce

        for outcome in outcomes([member.fuse(reduce_of(member)) for member in members]):
            assert isinstance(outcome, Committed)
        assert_one_chain(members, 1)
        assert cancelled == [hanging.peer_id]


def test_a_newcomer_catches_up_from_the_longest_verified_chain(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    with swarm(3, tmp_path) as [old, ahead, newcomer]:
        chain = old.agreement.chain
        one = extend(chain, names)
        three = extend(extend(one, names), names)
        old.adopt(one)
        ahead.adopt(three)
        see_each_other([old, ahead, newcomer])
        found = newcomer.run(newcomer.agreement.better_chain())
        assert found is not None
        assert found[0] == three
        assert found[1] == (ahead.peer_id,)  # who holds the state
        newcomer.adopt(three)
        assert newcomer.run(newcomer.agreement.better_chain()) is None
        found = old.run(old.agreement.better_chain())  # from where it stands: one round known, two new
        assert found is not None
        assert found[0] == three


def test_a_long_chain_comes_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_exchange, "MAX_CHAIN_REPLY_COMMITS", 2)
    with swarm(2, tmp_path) as [ahead, newcomer]:
        chain = newcomer.agreement.chain
        for _ in range(5):
            chain = extend(chain, ["a", "b"])
        ahead.adopt(chain)
        see_each_other([ahead, newcomer])
        found = newcomer.run(newcomer.agreement.better_chain())
        assert found is not None
        assert found[0] == chain


def test_a_chain_that_was_handed_out_once_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 commits of 32 peers took 9.5 ms of the network's thread, for every call of a stranger."""
    with swarm(2, tmp_path) as [holder, stranger]:
        chain = holder.agreement.chain
        for _ in range(5):
            chain = extend(chain, ["a", "b"])
        holder.adopt(chain)
        body = {"run": chain.spec.digest, "after": 1}

        def ask() -> bytes:
            call = stranger.network.call(holder.peer_id, "chain", body, timeout_seconds=CALL_SECONDS)
            return stranger.run(call)

        first = ask()
        assert [SignedCommit.model_validate(entry) for entry in json.loads(first)] == list(chain.commits[1:])

        def never(_: object) -> bytes:
            raise AssertionError("written again")

        monkeypatch.setattr(SignedCommit, "canonical", never)
        assert ask() == first


def test_strangers_neither_vote_nor_propose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with swarm(2, tmp_path) as [me, stranger]:
        agreement = me.agreement
        agreement.membership._heard.clear()
        body = {"run": agreement.chain.spec.digest, "commit": hash_of("x"), "signature": "y"}
        with pytest.raises(RecordError, match="does not count"):
            me.run(agreement._on_vote(stranger.peer_id, body))
        assert not agreement._voting._box._votes
        proposal = Proposal(
            run=agreement.chain.spec.digest,
            round=1,
            attempt=0,
            previous=agreement.chain.tip,
            members=[{}],
            electorate=[stranger.peer_id],
            proposed_at=Network.now(),
        )
        signed = sign(proposal, stranger.identity).to_json()
        answer = json.loads(me.run(agreement._on_propose(stranger.peer_id, signed)))
        assert answer["why"] == "the proposer is not known here"
        agreement.chain = extend(agreement.chain, ["a", "b"])
        me.run(agreement._on_vote(peer("a"), body))
        assert set(agreement._voting._box._votes) == {peer("a")}


def test_of_a_fork_the_heavier_side_wins_on_both(tmp_path: Path) -> None:
    with swarm(2, tmp_path) as [light, heavy]:
        common = extend(light.agreement.chain, ["a", "b", "c", "d", "e"])
        few = extend(common, ["a", "b"], electorate=[peer("a"), peer("b")], state_hash=hash_of("few"))
        many = extend(
            common, ["c", "d", "e"], electorate=[peer(n) for n in "cde"], state_hash=hash_of("many")
        )
        light.adopt(few)
        heavy.adopt(many)
        see_each_other([light, heavy])
        found = light.run(light.agreement.better_chain())
        assert found is not None
        assert found[0] == many
        assert heavy.run(heavy.agreement.better_chain()) is None
        assert not isinstance(heavy.agreement.decide(), CatchUp)  # it has lost, and is not asked again


@pytest.mark.parametrize("num_rounds", [0, 1])
def test_made_up_keys_that_follow_each_commit_at_once_interrupt_nobody(
    tmp_path: Path, num_rounds: int
) -> None:
    """They claim that all are gone; who hears the others train stays, and the next round is theirs."""
    with swarm(4, tmp_path) as [*members, liar]:
        for _ in range(num_rounds):
            for member in members:
                member.get_ready()
            outcomes([member.fuse(same_state) for member in members])
        common = assert_one_chain(members, num_rounds)
        for member in members:
            member.run(member.agreement.set_phase("finetuning", entered_at=Network.now()))
        see_each_other(members)
        evil = extend(common, ["t", "u"], state_hash=hash_of("evil"))
        liar.adopt(evil)
        for member in members:
            liar.call(member, "heartbeat", envelope(liar))
            assert member.run(member.agreement.better_chain()) is None
            assert not isinstance(member.agreement.decide(), CatchUp)  # for a while it is not looked at
            assert not member.agreement.is_overtaken
        for member in members:
            member.get_ready()
        outcomes([member.fuse(same_state) for member in members])
        chain = assert_one_chain(members, num_rounds + 1)
        assert chain.commits[:-1] == common.commits
        see_each_other([members[0], liar])
        assert is_better(chain, evil)


def test_who_is_left_alone_follows_those_who_went_on(tmp_path: Path) -> None:
    """Also where they say that all were gone: it may have been so."""
    with swarm(2, tmp_path) as [me, other]:
        common = extend(me.agreement.chain, ["a", "b", "c"], committed_at=Network.now())
        on = extend(common, ["x", "y"], state_hash=hash_of("on"))
        me.adopt(common)
        other.adopt(on)
        see_each_other([other, me])
        found = me.run(me.agreement.better_chain())
        assert found is not None
        assert found[0] == on


def test_claims_without_signatures_cost_a_look_and_nothing_more(tmp_path: Path) -> None:
    """A liar claims a tip and serves something unsigned, stale or garbage. The honest tip still counts."""
    with swarm(3, tmp_path) as [me, honest, liar]:
        chain = me.agreement.chain
        one = extend(chain, ["a", "b"])
        two = extend(one, ["a", "b"])
        me.adopt(one)
        honest.adopt(two)
        unsigned = signed_by(two.commits[-1].commit, []).model_dump(mode="json")
        replies: list[object] = [
            [unsigned],
            [],
            {"no": "list"},
            [1],
            [one.commits[0].model_dump(mode="json")],
        ]
        see_each_other([me, honest])
        for reply in replies:

            async def serve(_peer_id: str, _body: Any, reply: object = reply) -> bytes:
                return json.dumps(reply).encode()

            liar.network.on_call("chain", serve)
            now = Network.now()
            claim = make_heartbeat(two, issued_at=now, expires_at=now + 10.0)
            me.agreement.membership.forget(honest.peer_id)
            me.agreement._chains._doubts.clear()
            liar.call(me, "heartbeat", sign(claim, liar.identity).to_json())
            assert isinstance(me.agreement.decide(), CatchUp)
            assert me.run(me.agreement.better_chain()) is None
            assert not isinstance(me.agreement.decide(), CatchUp)
        see_each_other([honest, me])
        found = me.run(me.agreement.better_chain())
        assert found is not None
        assert found[0] == two


def claim_of(liar: Peer, round_: int = 7) -> dict[str, str]:
    """A heartbeat, validly signed, of a peer at a commit that nobody has."""
    now = Network.now()
    changes = {"round": round_, "commit": hash_of(f"{now}"), "issued_at": now, "expires_at": now + 10.0}
    return sign(liar.agreement._heartbeat().model_copy(update=changes), liar.identity).to_json()


def until(condition: Callable[[], object], seconds: float = CALL_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


async def deaf(_peer_id: str, _body: Any) -> bytes:
    await asyncio.sleep(1000.0)
    return b""


def test_who_claims_again_and_again_what_it_does_not_have_keeps_nobody_from_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 0.2 s another commit, and no answer to who asks for it."""
    short_waits(monkeypatch)
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        *honest, liar = members
        liar.network.on_call("chain", deaf)

        async def claim() -> None:
            while True:
                body = claim_of(liar)
                calls = [liar.network.call(m.peer_id, "heartbeat", body, timeout_seconds=5.0) for m in honest]
                await asyncio.gather(*calls, return_exceptions=True)
                await asyncio.sleep(0.2)

        claiming = liar.network.submit(claim())
        try:
            until(lambda: isinstance(honest[0].agreement.decide(), CatchUp))
            looking = [member.network.submit(member.agreement.better_chain()) for member in honest]
            assert [look.result(2 * CALL_SECONDS) for look in looking] == [None] * 3
            for member in honest:  # it has claimed something else since: not worth a look for as long again
                until(partial(member.agreement.membership.get, liar.peer_id))
                assert not isinstance(member.agreement.decide(), CatchUp)
                assert member.run(member.agreement.better_chain()) is None
            outcomes([member.fuse(same_state) for member in honest])
            assert_one_chain(honest, 1)
        finally:
            claiming.cancel()


def test_an_honest_claim_is_looked_at_beside_an_empty_one_to_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else who is in doubt could hide what is true by claiming it, too."""
    short_waits(monkeypatch)
    with swarm(3, tmp_path) as [me, honest, liar]:
        two = extend(extend(me.agreement.chain, ["a", "b"]), ["a", "b"])
        liar.network.on_call("chain", deaf)
        liar.call(me, "heartbeat", claim_of(liar))
        assert me.run(me.agreement.better_chain()) is None
        honest.adopt(two)
        now = Network.now()
        true_claim = make_heartbeat(two, issued_at=now, expires_at=now + 10.0)
        liar.call(me, "heartbeat", sign(true_claim, liar.identity).to_json())
        assert not isinstance(me.agreement.decide(), CatchUp)  # it alone says so
        see_each_other([honest, me])
        assert isinstance(me.agreement.decide(), CatchUp)
        found = me.run(me.agreement.better_chain())
        assert found is not None
        assert found[0] == two


def test_a_chain_that_comes_one_commit_at_a_time_is_refused(tmp_path: Path) -> None:
    with swarm(2, tmp_path) as [me, liar]:
        chain = me.agreement.chain
        for _ in range(4):
            chain = extend(chain, ["a", "b"])
        liar.adopt(chain)
        served: list[int] = []

        async def one_at_a_time(_peer_id: str, body: Any) -> bytes:
            served.append(body["after"])
            page = chain.commits[body["after"] : body["after"] + 1]
            return json.dumps([signed.model_dump(mode="json") for signed in page]).encode()

        liar.network.on_call("chain", one_at_a_time)
        see_each_other([liar, me])
        assert me.run(me.agreement.better_chain()) is None
        assert served == [0]


def test_a_peer_that_hears_nobody_holds_up_nobody(tmp_path: Path) -> None:
    """It publishes its heartbeat as all do, and does not answer when others tell it theirs."""
    spec = make_spec(lease_seconds=30.0, created_at=Network.now())
    with swarm(3, tmp_path, spec) as [me, other, silent]:
        silent.network.on_call("heartbeat", deaf)
        for phase in ("finetuning", "ready", "evaluating"):  # each call waits longer than the one before
            me.network.run(me.agreement.set_phase(phase), timeout_seconds=2 * presence.TELLING_SECONDS)
            assert phase == other.agreement.membership.get(me.peer_id).record.phase  # type: ignore[union-attr]


def envelope(member: Peer) -> dict[str, str]:
    return sign(member.agreement._heartbeat(), member.identity).to_json()


def make_proposal(group: list[Peer], **changes: Any) -> Proposal:
    chain = group[0].agreement.chain
    values: dict[str, Any] = {
        "run": chain.spec.digest,
        "round": chain.round + 1,
        "attempt": 0,
        "previous": chain.tip,
        "members": [envelope(member) for member in group],
        "electorate": [member.peer_id for member in group],
        "proposed_at": Network.now(),
    }
    return Proposal.model_validate({**values, **changes})


def acceptance_of(proposal: Proposal, member: Peer) -> dict[str, str]:
    return sign(Acceptance(run=proposal.run, proposal=proposal.hash), member.identity).to_json()


def test_what_a_member_refuses(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        me, leader, third = members
        for member in members:
            member.get_ready()

        def ask(proposal: Proposal, author: Peer = leader) -> Any:
            return leader.call(me, "propose", sign(proposal, author.identity).to_json())

        now = Network.now()
        stale = sign(make_heartbeat(extend(me.agreement.chain, ["a", "b"])), third.identity).to_json()
        everybody = make_proposal(members).members
        for proposal, reason in [
            (make_proposal(members, run=hash_of("other")), "on another commit"),
            (make_proposal(members, previous=hash_of("other")), "on another commit"),
            (make_proposal(members, round=2), "not ready for round 2"),
            (make_proposal(members, attempt=10**9), "far ahead"),
            (make_proposal(members, proposed_at=now + 3600.0), "a clock"),
            (make_proposal(members, proposed_at=0.0), "a clock"),
            (make_proposal(members, members=[*everybody, stale]), "twice"),
            (make_proposal([me, leader], members=[everybody[0], everybody[1], stale]), "not ready"),
            (make_proposal([leader, third]), "not in the group as I am"),
            (make_proposal([me, third]), "proposer is not in the group"),
            (make_proposal(members, electorate=[leader.peer_id]), "left out of the vote"),
        ]:
            answer = ask(proposal)
            assert answer["accept"] is False
            assert reason in answer["why"]
        assert (
            ask(make_proposal(members), author=third)["accept"] is False
        )  # signed by another than its sender
        assert leader.call(me, "propose", {"peer_id": "x"})["accept"] is False
        assert leader.call(me, "propose", None)["accept"] is False

        first = make_proposal(members)
        assert ask(first)["accept"] is True
        assert "another proposal of attempt 0" in ask(make_proposal(members, proposed_at=now - 1.0))["why"]
        second = make_proposal(members, attempt=1)
        assert ask(second)["accept"] is True
        assert ask(first)["accept"] is False  # a lower ballot
        assert ask(first)["attempt"] == 1

        everyone = [member.peer_id for member in members]
        acceptances = [acceptance_of(second, member) for member in members]
        good = {"proposal": second.hash, "members": everyone, "acceptances": acceptances, "lock": None}
        stranger = {**good, "members": [*everyone[:2], peer("x")]}
        for sender, body in [
            (leader, {**good, "proposal": first.hash}),  # no longer the accepted one
            (third, good),  # not by who proposed it
            (leader, {**good, "members": everyone[1:], "acceptances": acceptances[1:]}),  # without me
            (leader, stranger),
            (leader, {**good, "members": everyone[:2]}),
            (leader, {**good, "acceptances": [acceptance_of(first, m) for m in members]}),
            (leader, {**good, "acceptances": acceptances[:1], "members": everyone[:1]}),  # no majority
            (leader, {**good, "members": [*everyone, third.peer_id]}),
            (leader, {**good, "members": [[me.peer_id]]}),
            (leader, {"proposal": second.hash}),
            (leader, None),
        ]:
            with pytest.raises(PeerUnreachable):
                sender.call(me, "begin", body)
        assert me.agreement._begun is None
        assert leader.call(me, "begin", good) == {}
        begun: Ballot | None = me.agreement._begun
        assert begun is not None
        assert begun.members == tuple(everyone)


def test_a_begin_that_comes_late_does_not_start_the_next_fuse(tmp_path: Path) -> None:
    with swarm(2, tmp_path) as members:
        me, leader = members
        for member in members:
            member.get_ready()
        proposal = make_proposal(members)
        body = {
            "proposal": proposal.hash,
            "members": [member.peer_id for member in members],
            "acceptances": [acceptance_of(proposal, member) for member in members],
            "lock": None,
        }
        assert leader.call(me, "propose", sign(proposal, leader.identity).to_json())["accept"] is True
        me.run(me.agreement.set_phase("finetuning"))
        with pytest.raises(PeerUnreachable):
            leader.call(me, "begin", body)
        assert me.agreement._begun is None


def test_forged_votes_do_not_count_and_a_failed_round_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_waits(monkeypatch)
    with swarm(3, tmp_path) as members:
        me, other, third = members
        for member in members:
            member.get_ready()

        async def lonely(group: Group) -> Fused:
            """The others compute nothing in the first attempt, and forge each other's votes."""
            if group.attempt > 0:
                return await same_state(group)
            commit = Commit.model_validate(
                {
                    "run": me.agreement.chain.spec.digest,
                    "round": 1,
                    "attempt": 0,
                    "previous": me.agreement.chain.tip,
                    "state_hash": hash_of("mine"),
                    "contributors": [c.model_dump() for c in group.contributions],
                    "electorate": list(group.electorate),
                    "committed_at": group.proposed_at,
                }
            )
            for sender in (other, third):
                signature = signature_text(commit, identity("x"))
                body = {"run": commit.run, "commit": commit.digest, "signature": signature}
                await sender.network.call(me.peer_id, "vote", body, timeout_seconds=CALL_SECONDS)
            return Fused(commit.state_hash, group.contributions)

        async def broken(group: Group) -> Fused:
            if group.attempt == 0:
                raise RoundError("the exchange ended early")
            return await same_state(group)

        futures = [me.fuse(lonely), other.fuse(broken), third.fuse(broken)]
        committed = [outcome for outcome in outcomes(futures) if isinstance(outcome, Committed)]
        assert committed
        assert all(outcome.group.attempt > 0 for outcome in committed)
        assert all(outcome.chain.state_hash != hash_of("mine") for outcome in committed)


def test_goodbye_is_heard_at_once(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as [first, second, third]:
        assert len(third.agreement.live()) == 2
        first.run(first.agreement.leave())
        assert [member.peer_id for member in third.agreement.live()] == [second.peer_id]


def test_the_board_brings_peers_together_that_never_spoke(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        fresh = Agreement(members[2].network, members[2].identity, members[2].agreement.chain)
        deadline = time.monotonic() + CALL_SECONDS
        while len(fresh.live()) < 2 and time.monotonic() < deadline:
            members[2].run(fresh._presence.read_board())
        assert {m.peer_id for m in fresh.live()} == {members[0].peer_id, members[1].peer_id}


def test_a_promise_is_remembered_before_anything_leaves(tmp_path: Path) -> None:
    """Each member stores its acceptance, and the commit that it signs, in this order."""
    stored: list[Promise] = []

    async def remember(promise: Promise) -> None:
        stored.append(promise)

    with swarm(2, tmp_path) as members:
        me = members[0]
        me.agreement._remember = remember
        for member in members:
            member.get_ready()
        [outcome, _] = outcomes([member.fuse(same_state) for member in members])
        assert isinstance(outcome, Committed)
        accepted, *_, signed = stored
        assert (accepted.attempt, accepted.lock) == (0, None)
        assert signed.lock is not None
        assert signed.lock.hash == outcome.chain.tip

        async def fails(_promise: Promise) -> None:
            raise RoundError("the disk is full")

        me.agreement._remember = fails
        for member in members:
            member.get_ready()
        proposal = make_proposal([members[1], me])
        with pytest.raises(PeerUnreachable):
            members[1].call(me, "propose", sign(proposal, members[1].identity).to_json())


def test_a_value_that_may_be_committed_is_signed_again_by_those_who_lack_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four signed in attempt 0, and the fourth is gone: it may have had a majority."""
    short_waits(monkeypatch)
    obtained: list[tuple[str, tuple[str, ...]]] = []

    async def obtain(state_hash: str, donors: tuple[str, ...]) -> bool:
        obtained.append((state_hash, donors))
        return True

    with swarm(4, tmp_path) as members:
        *here, gone = members
        for member in members:
            member.get_ready()
            member.agreement._obtain = obtain
        group_of_all = make_proposal(members)
        first = Commit.model_validate(
            {
                "run": group_of_all.run,
                "round": 1,
                "attempt": 0,
                "previous": group_of_all.previous,
                "state_hash": hash_of("attempt 0"),
                "contributors": [
                    {"peer": member.peer_id, "num_examples": 100, "weight": 1.0} for member in members
                ],
                "electorate": group_of_all.electorate,
                "committed_at": group_of_all.proposed_at,
            }
        )
        for member in here[:2]:
            promise = Promise(
                run=first.run,
                round=1,
                previous=first.previous,
                attempt=0,
                proposal=group_of_all.hash,
                lock=first,
                signs_until=Network.now() + 60.0,
                lock_until=Network.now() + 60.0,
            )
            member.agreement._voter.promise = promise
            member.agreement._holds = lambda state: state == first.state_hash
        gone.network.close()
        for outcome in outcomes([member.fuse(same_state) for member in here]):
            assert isinstance(outcome, Committed)
            assert outcome.chain.tip == first.hash  # the value of attempt 0
            assert outcome.chain.commits[0].commit.attempt > 0  # signed in a later one
            assert set(outcome.group.members) == {member.peer_id for member in members}
        holders = {member.peer_id for member in here[:2]}
        assert [(state, set(donors)) for state, donors in obtained] == [(first.state_hash, holders)]


def test_a_roll_back_is_committed_by_those_who_want_it(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        for member in members:
            member.get_ready()
        outcomes([member.fuse(same_state) for member in members])
        chain = assert_one_chain(members, 1)
        for member in members:
            member.run(member.agreement.set_phase("finetuning"))
        see_each_other(members)
        assert members[0].run(members[0].agreement.roll_back("worse")) is None  # nobody agrees
        for member in members[:2]:
            member.agreement._wants_rollback = chain.tip.__eq__
        committed = members[0].run(members[0].agreement.roll_back("worse"))
        assert isinstance(committed, Committed)
        assert (committed.kind, committed.group.members) == ("rollback", ())
        back = committed.chain
        assert (back.round, back.state_hash, back.cohort) == (2, chain.spec.backbone_hash, chain.cohort)
        assert back.commits[-1].commit.reason == "worse"
        assert members[0].agreement.chain == chain  # until its state is here
        assert isinstance(members[0].agreement.decide(), CatchUp)
        until(lambda: members[1].agreement.is_overtaken)
        found = members[1].run(members[1].agreement.better_chain())
        assert found is not None
        assert found[0].tip == back.tip
        assert found[1]  # the state before is at those who were there
        for member in members[:2]:
            member.adopt(back)
        see_each_other(members)
        found = members[2].run(members[2].agreement.better_chain())  # who did not agree follows all the same
        assert found is not None
        assert found[0] == back


def test_a_roll_back_ends_a_running_fusion(tmp_path: Path) -> None:
    """Two are ready, the third finetunes; `fuse` returns the roll-back, and the delta is worthless."""
    with swarm(3, tmp_path) as members:
        for member in members:
            member.get_ready()
        outcomes([member.fuse(same_state) for member in members])
        tip = assert_one_chain(members, 1).tip
        for member in members:
            member.agreement._wants_rollback = tip.__eq__
            member.run(member.agreement.set_phase("finetuning"))
        see_each_other(members)
        ready = members[:2]
        for member in ready:
            member.get_ready()
        futures = [member.fuse(same_state) for member in ready]
        third = members[2]
        committed = third.run(third.agreement.roll_back("worse"))
        assert isinstance(committed, Committed)
        for outcome in outcomes(futures):
            assert isinstance(outcome, Committed | Overtaken)
            if isinstance(outcome, Committed):
                assert outcome.kind == "rollback"
                assert outcome.chain.tip == committed.chain.tip


def test_a_proven_culprit_is_named_in_the_commit_and_cannot_come_back_within_the_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with swarm(4, tmp_path) as members:
        for member in members:
            member.get_ready()
        *honest, liar = members

        async def reduce(group: Group) -> Fused:
            if liar.peer_id in group.members:
                raise GroupFailed(liar.peer_id, "sent values that are not finite", is_proven=True)
            for member in honest:
                await liar.network.call(
                    member.peer_id, "heartbeat", envelope(liar), timeout_seconds=CALL_SECONDS
                )
            return await same_state(group)

        results = outcomes([member.fuse(reduce) for member in honest])
        committed = [m for m, outcome in zip(honest, results, strict=True) if isinstance(outcome, Committed)]
        assert len(committed) >= 2  # on a busy machine the third may be overtaken by their commit
        for outcome in results:
            assert isinstance(outcome, Committed | Overtaken)
            if isinstance(outcome, Committed):
                assert [(e.peer, e.reason) for e in outcome.group.excluded] == [
                    (liar.peer_id, "sent values that are not finite")
                ]
        commit = assert_one_chain(committed, 1).commits[0].commit
        assert [e.peer for e in commit.excluded] == [liar.peer_id]
        assert liar.peer_id not in commit.cohort
        named = [r for r in caplog.records if f"{liar.peer_id[-8:]} is left out" in r.getMessage()]
        assert len(named) >= len(committed)


def test_who_is_banned_is_in_no_group_and_not_counted(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        *honest, liar = members
        for member in honest:
            member.agreement.ban(liar.peer_id, "lied as a reducer")
        for member in members:
            member.get_ready()
        for outcome in outcomes([member.fuse(same_state) for member in honest]):
            assert isinstance(outcome, Committed)
            assert set(outcome.group.electorate) == {member.peer_id for member in honest}
        assert liar.peer_id not in assert_one_chain(honest, 1).cohort


def test_who_waits_resigns_its_vote_but_not_after_it_has_signed(tmp_path: Path) -> None:
    with swarm(3, tmp_path) as members:
        for member in members:
            member.get_ready()
        outcomes([member.fuse(same_state) for member in members])
        tip = assert_one_chain(members, 1).tip
        first, second, third = members
        first.run(first.agreement.set_phase("waiting"))
        assert first.agreement._heartbeat().resigned == tip
        assert second.agreement._roster.absent(second.agreement.chain) == {first.peer_id}
        first.run(first.agreement.set_phase("finetuning"))
        assert first.agreement._heartbeat().resigned == tip  # for the rest of the round
        lock = second.agreement.chain.commits[0].commit
        signed = third.agreement._voter.promise.model_copy(update={"lock": lock})
        third.agreement._voter.promise = signed
        third.run(third.agreement.leave())
        assert third.agreement._heartbeat().resigned == ""
        assert second.agreement._roster.absent(second.agreement.chain) == {first.peer_id}
