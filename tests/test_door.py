"""What can an outsider do at peers of a private run? Real networks, and all that a peer serves.

The outsider runs a network without any check of its own: it says what it likes at the door, and calls all
the same. "Everything" is read from what the member has registered, so that nothing new is forgotten.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

from coordinator.admission import NOT_ADMITTED, Admission
from coordinator.agreement import Agreement, Committed
from coordinator.board import BoardValidator, board_key
from coordinator.chain import Chain
from coordinator.door import DOOR_HANDLER, Door
from coordinator.errors import AccessError, NetworkError
from coordinator.guard import DOOR_CALLS, OUTSIDERS, Guard
from coordinator.identity import load_identity
from coordinator.limits import Limiter
from coordinator.network import RPC_NAMESPACE, Network, PeerRefuses, PeerUnreachable
from coordinator.outgoing import Sent, ignore
from coordinator.records import Credential, Proposal, RecordError, sign
from coordinator.spec import RunSpec
from coordinator.streams import FrameStream, StreamError, open_stream, serve_streams
from coordinator.transfer import Piece, fetch_blob
from peer.accusations import RunRules
from peer.allreduce import AllReduceService
from peer.audit import AuditService
from peer.genesis import State, ask_spec, get_state, serve_run
from peer.layout import TensorLayout
from tests.fakes import (
    CALL_SECONDS,
    NOW,
    addresses,
    identity,
    make_heartbeat,
    make_spec,
    network_config,
    new_directory,
    peer,
)
from tests.private_runs import DAY, admission, bad_credentials, credential, invite, private_spec, revocations
from tests.test_agreement import outcomes, same_state

STATE = State.of(TensorLayout.of({"weight": torch.zeros(10)}), torch.arange(10.0))


NO_P2P: Any = None  # for what ends before it is used


class Member:
    """Serves all that a session serves."""

    def __init__(self, network: Network, key: Path, chain: Chain) -> None:
        self.network, self.identity = network, load_identity(key)
        run = chain.spec.digest
        self.agreement = Agreement(network, self.identity, chain)
        self.sent: list[Sent] = []
        serve_run(network, chain.spec, key.parent, {STATE.state_hash: STATE}.get)
        self.run(network.start_dht(BoardValidator(run, admission=network.admission)))
        self.allreduce = AllReduceService(network, self.identity, run)
        self.run(self.allreduce.start())
        self.audit = AuditService(
            network,
            run,
            RunRules.of(chain.spec),
            convict=lambda *_: None,
            live_peers=list,
            phase_of=lambda peer: self.agreement.membership.live_phase(peer, Network.now()),
            chain=lambda: self.agreement.chain,
            slack=self.allreduce.slack_seconds,
        )
        self.audit.start()
        self.run(self.agreement.start())

    @property
    def peer_id(self) -> str:
        return self.network.peer_id

    @property
    def admission(self) -> Admission:
        assert self.network.admission is not None
        return self.network.admission

    def run(self, coroutine: Any) -> Any:
        return self.network.run(coroutine, timeout_seconds=2 * CALL_SECONDS)

    def get_ready(self) -> None:
        self.run(self.agreement.set_phase("finetuning", entered_at=Network.now()))
        self.run(self.agreement.set_phase("ready", num_examples=100))

    def fuse(self) -> concurrent.futures.Future[Any]:
        return self.network.submit(self.agreement.fuse(same_state))

    def methods(self) -> list[str]:
        return sorted(self.network._unary)

    def raw_streams(self) -> list[str]:
        return sorted(self.network._guard.stream_handlers)

    def stored(self) -> list[str]:
        """Whose entries lie in its part of the DHT."""
        node = self.network._node
        assert node is not None
        found = node.protocol.storage.get(DHTID.generate(source=board_key(self.agreement.chain.spec.digest)))
        return [] if found is None else list(found.value.data)


class Outsider:
    """Says what it likes, and goes on whatever it is told."""

    def __init__(self, network: Network) -> None:
        self.network = network

    @property
    def peer_id(self) -> str:
        return self.network.peer_id

    def run(self, coroutine: Any) -> Any:
        return self.network.run(coroutine, timeout_seconds=2 * CALL_SECONDS)

    def present(self, at: Member, shown: Credential | None) -> Any:
        value = None if shown is None else shown.model_dump(mode="json")
        said = json.dumps({"credential": value, "revocations": None}).encode()
        return json.loads(self.run(_present(self.network, at.peer_id, said)))

    def call(self, at: Member, method: str, body: object = None) -> bytes:
        reply = self.network.call(at.peer_id, method, body, timeout_seconds=CALL_SECONDS)
        return bytes(self.run(reply))

    def stream(self, at: Member, method: str, body: object) -> list[bytes]:
        async def read() -> list[bytes]:
            parts = self.network.stream(at.peer_id, method, body, timeout_seconds=CALL_SECONDS)
            try:
                return [part async for part in parts]
            except PeerUnreachable:  # it was closed while the request was on its way
                return []

        return list(self.run(read()))

    def raw_stream(self, at: Member, name: str) -> int:
        """How many bytes come back; 0: it was closed at once."""

        async def read() -> int:
            peer_id = PeerID.from_base58(at.peer_id)
            _, reader, writer = await self.network.p2p.call_binary_stream_handler(peer_id, name)
            async with asyncio.timeout(CALL_SECONDS):
                data = await reader.read(1)
            writer.close()
            return len(data)

        return int(self.run(read()))


async def _present(network: Network, peer_id: str, said: bytes) -> bytes:
    stub = Door.get_stub(network.p2p, PeerID.from_base58(peer_id), namespace=RPC_NAMESPACE)
    return bytes((await asyncio.wait_for(stub.rpc_present(BytesValue(value=said)), CALL_SECONDS)).value)


@dataclass
class Swarm:
    members: list[Member]
    outsider: Outsider
    spec: RunSpec

    @property
    def run(self) -> str:
        return self.spec.digest


def make_spec_now(**changes: Any) -> RunSpec:
    values = {"lease_seconds": 10.0, "created_at": Network.now(), "backbone_hash": STATE.state_hash}
    return private_spec(**{**values, **changes})


def start_member(stack: ExitStack, spec: RunSpec, key: Path, entry: tuple[str, ...], file: Path) -> Member:
    own = admission(spec.digest, load_identity(key).peer_id, now=Network.now, file=file)
    network = stack.enter_context(Network(network_config(key, initial_peers=entry, admission=own)))
    return Member(network, key, Chain(spec))


def start_swarm(stack: ExitStack, directory: Path) -> Swarm:
    spec, members = make_spec_now(), list[Member]()
    (directory / "config.json").write_text("config")
    for index in range(2):
        entry = tuple(addresses(members[0].network)[:1]) if members else ()
        key = directory / f"{index}.key"
        members.append(start_member(stack, spec, key, entry, directory / f"{index}.json"))
    entry = tuple(address for m in members for address in addresses(m.network)[:1])
    network = stack.enter_context(Network(network_config(directory / "outsider.key", initial_peers=entry)))
    return Swarm(members, Outsider(network), spec)


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    """Of which nobody is let in or put out: tests share it."""
    with ExitStack() as stack:
        yield start_swarm(stack, new_directory())


@pytest.fixture(autouse=True)
def _patient_door(monkeypatch: pytest.MonkeyPatch, swarm: Swarm) -> None:
    """One outsider stands for many: each test has the budget of a fresh one."""
    for member in swarm.members:
        guard: Guard = member.network._guard
        monkeypatch.setattr(guard, "_door", Limiter(DOOR_CALLS, guard._now()))
        monkeypatch.setattr(guard, "_outsiders", Limiter(OUTSIDERS, guard._now()))


KINDS = list(bad_credentials("0" * 64, peer("x"), now=NOW))


def shown_by(swarm: Swarm, kind: str) -> tuple[Credential | None, str]:
    if kind == "replayed":  # what a member shows to everybody
        return swarm.members[1].admission.credential, "another peer's"
    return bad_credentials(swarm.run, swarm.outsider.peer_id, now=Network.now())[kind]


def assert_refused(error: Exception) -> None:
    assert NOT_ADMITTED in str(error)


# ---- the outsider ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "replayed"])
def test_an_outsider_is_refused_everything(swarm: Swarm, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    outsider, member = swarm.outsider, swarm.members[0]
    shown, why = shown_by(swarm, kind)
    answer = outsider.present(member, shown)
    assert why in answer["refused"]
    assert "credential" not in answer
    assert {"spec", "manifest", "propose", "begin", "vote", "chain", "heartbeat"} <= set(member.methods())
    assert {"statements", "accuse", "revocations"} <= set(member.methods())
    for method in member.methods():
        with pytest.raises(PeerRefuses) as refusal:
            outsider.call(member, method, {"run": swarm.run})
        assert_refused(refusal.value)
    assert {"blob", "audit"} <= set(member.network._streams)
    for method in member.network._streams:
        assert outsider.stream(member, method, {"run": swarm.run}) == []
    assert len(member.raw_streams()) >= 2  # all-reduce, and the one of `network.stream`
    for name in member.raw_streams():
        assert outsider.raw_stream(member, name) == 0
    assert not member.admission.is_admitted(outsider.peer_id)
    assert outsider.peer_id not in {m.peer_id for m in member.agreement.live()}


def test_a_member_is_served_by_the_same_calls(swarm: Swarm) -> None:
    """Else the test above would show nothing."""
    first, second = swarm.members
    call = second.network.call(first.peer_id, "spec", None, timeout_seconds=CALL_SECONDS)
    assert second.run(call).decode() == swarm.spec.to_toml()
    name = first.allreduce.name
    stream = second.run(open_stream(second.network, first.peer_id, name, b"{}", timeout_seconds=CALL_SECONDS))
    stream.close()
    assert second.admission.is_admitted(first.peer_id)
    assert first.admission.is_admitted(second.peer_id)


def test_an_outsider_cannot_write_to_the_dht_nor_read_it(swarm: Swarm) -> None:
    outsider, member = swarm.outsider, swarm.members[0]
    own = load_identity(outsider.network._config.identity.path)
    now = Network.now()
    values = {"issued_at": now, "expires_at": now + 9.0}
    heartbeat = make_heartbeat(Chain(swarm.spec), **values)

    async def attempts() -> list[Any]:
        await outsider.network.start_dht(BoardValidator(swarm.run))
        node, key = outsider.network._node, DHTID.generate(source=board_key(swarm.run))
        assert node is not None
        at, protocol = PeerID.from_base58(member.peer_id), node.protocol
        value = protocol.serializer.dumps(sign(heartbeat, own).to_bytes())
        return [
            await protocol.call_ping(at),
            await protocol.call_store(at, [key], [value], now + 9.0, subkeys=[own.peer_id]),
            await protocol.call_find(at, [key]),
        ]

    assert outsider.run(attempts()) == [None, None, None]
    store = outsider.network.dht_store(
        board_key(swarm.run), own.peer_id, sign(heartbeat, own).to_bytes(), expires_at=now + 9.0
    )
    outsider.run(store)  # in its own memory, where nobody looks
    assert outsider.run(outsider.network.dht_get(board_key(swarm.run))).keys() <= {own.peer_id}
    assert any(one.stored() for one in swarm.members)
    for one in swarm.members:
        assert own.peer_id not in one.stored()
        assert set(one.stored()) <= {m.peer_id for m in swarm.members}
        node = one.network._node
        assert node is not None
        assert node.protocol.routing_table.get(peer_id=PeerID.from_base58(own.peer_id)) is None
        one.run(one.agreement._presence.read_board())
        assert own.peer_id not in {m.peer_id for m in one.agreement.live()}


def test_an_outsider_gets_neither_state_nor_spec(swarm: Swarm) -> None:
    outsider, donors = swarm.outsider, [m.peer_id for m in swarm.members]
    with pytest.raises(AccessError, match=r"no credential; ask the organizer of the run for an invite"):
        ask_spec(outsider.network, donors, swarm.run)
    with pytest.raises(NetworkError):
        get_state(outsider.network, swarm.spec, STATE.state_hash, donors, lambda *_: None)
    chunk = Piece(0, STATE.manifest.layout.size_bytes, STATE.manifest.chunk_hashes[0])
    fetch = fetch_blob(outsider.network, swarm.run, f"state/{STATE.state_hash}", [chunk], donors)
    with pytest.raises(NetworkError):
        outsider.run(fetch)
    member = swarm.members[1]
    got = get_state(member.network, swarm.spec, STATE.state_hash, donors[:1], lambda *_: None)
    assert torch.equal(got.flat, STATE.flat)


def test_a_member_says_nothing_to_an_outsider_but_its_credential(swarm: Swarm) -> None:
    member, outsider = swarm.members[0], swarm.outsider
    sent: list[Sent] = []
    member.network._door._record = member.network.record = sent.append  # type: ignore[union-attr]
    try:
        call = member.network.call(outsider.peer_id, "heartbeat", {}, timeout_seconds=CALL_SECONDS)
        with pytest.raises(PeerUnreachable):
            member.run(call)
        with pytest.raises(StreamError):
            member.run(
                open_stream(
                    member.network,
                    outsider.peer_id,
                    member.allreduce.name,
                    b"{}",
                    timeout_seconds=CALL_SECONDS,
                )
            )
    finally:
        member.network._door._record = member.network.record = ignore  # type: ignore[union-attr]
    said = [(s.kind, s.name) for s in sent if s.peer_id == outsider.peer_id]
    # The heartbeat is reported, as what is handed over before it is known that nobody takes it.
    assert set(said) <= {("call", "present"), ("call", "heartbeat")}
    assert ("call", "present") in said


def test_bytes_that_are_no_message_at_the_door_are_a_refusal(tmp_path: Path) -> None:
    """A peer that speaks the transport, but not the protocol: no call and no stream to it ends otherwise."""
    with ExitStack() as stack:
        swarm = start_swarm(stack, tmp_path)
        member, outsider = swarm.members[0], swarm.outsider

        async def garbage(_request: bytes, _remote_id: object) -> bytes:
            return b"\xff\xff\xff"

        handler = f"{RPC_NAMESPACE}::{DOOR_HANDLER}"
        outsider.run(outsider.network.p2p._client.add_unary_handler(handler, garbage))
        stream = open_stream(
            member.network, outsider.peer_id, member.allreduce.name, b"{}", timeout_seconds=CALL_SECONDS
        )
        with pytest.raises(StreamError, match=NOT_ADMITTED):
            member.run(stream)
        call = member.network.call(outsider.peer_id, "heartbeat", {}, timeout_seconds=CALL_SECONDS)
        with pytest.raises(PeerRefuses, match=NOT_ADMITTED):
            member.run(call)


def test_a_member_cannot_bring_in_an_outsider(swarm: Swarm) -> None:
    """Neither by its own proposal, nor by passing on a heartbeat."""
    first, second = swarm.members
    chain, now = Chain(swarm.spec), Network.now()
    common = {"phase": "ready", "num_examples": 100, "issued_at": now, "expires_at": now + 9.0}
    sybil = identity("outsider")
    for kind in KINDS:
        shown, why = bad_credentials(swarm.run, sybil.peer_id, now=now)[kind]
        guest = make_heartbeat(chain, **common, credential=shown)
        own = make_heartbeat(chain, **common, credential=second.admission.credential)
        proposal = Proposal(
            run=swarm.run,
            round=1,
            attempt=0,
            previous=chain.tip,
            members=[sign(own, second.identity).to_json(), sign(guest, sybil).to_json()],
            electorate=[second.peer_id, sybil.peer_id],
            proposed_at=now,
        )
        body = sign(proposal, second.identity).to_json()
        call = second.network.call(first.peer_id, "propose", body, timeout_seconds=CALL_SECONDS)
        answer = json.loads(second.run(call))
        assert answer["accept"] is False
        assert why in answer["why"]
        assert first.agreement.membership.observe(sign(guest, sybil).to_bytes(), now=now) is None


def test_the_only_call_for_strangers_is_the_door(swarm: Swarm) -> None:
    member, outsider = swarm.members[0], swarm.outsider
    control = member.network.p2p._client.control
    handlers = {name.rpartition("::")[2] for name in control.unary_handlers}
    assert handlers == {
        *(DOOR_HANDLER, "_PeerRpc.rpc_call"),
        *(f"DHTProtocol.{h.method_name}" for h in DHTProtocol._rpc_handlers or ()),
    }
    for said in (b"", b"x" * 30_000, b"{}", b"\xff" * 100):
        answer = json.loads(outsider.run(_present(outsider.network, member.peer_id, said)))
        assert "refused" in answer


def test_who_knocks_too_often_is_not_heard(swarm: Swarm) -> None:
    member, outsider = swarm.members[0], swarm.outsider

    async def knock() -> list[bytes | BaseException]:
        said = json.dumps({"credential": None, "revocations": None}).encode()
        one = [_present(outsider.network, member.peer_id, said) for _ in range(100)]
        return await asyncio.gather(*one, return_exceptions=True)

    results = outsider.run(knock())
    heard = [r for r in results if isinstance(r, bytes)]
    assert len(heard) < 60  # a burst of 20, two a second, and one second of waiting
    assert all(isinstance(r, bytes | P2PHandlerError | P2PDaemonError) for r in results)


def test_what_outsiders_ask_in_vain_does_not_cost_the_members_their_budget() -> None:
    member = admission("0" * 64, peer("me"), now=lambda: NOW)
    member.admit(peer("a"), credential("0" * 64, peer("a"), now=NOW))
    guard = Guard(now=lambda: NOW, admission=member)

    async def flood() -> None:
        for name in range(200):
            for _ in range(40):  # 8000 in all; a burst of 4000 is served in a public run
                with pytest.raises(RecordError):
                    await guard.pass_call(NO_P2P, peer(f"outsider {name}"), "_PeerRpc.rpc_call", 100)
        for _ in range(100):
            await guard.pass_call(NO_P2P, peer("a"), "_PeerRpc.rpc_call", 100)

    asyncio.run(flood())


# ---- members --------------------------------------------------------------------------------------


def test_two_members_commit_a_round_and_a_third_comes_by_an_invite(tmp_path: Path) -> None:
    with ExitStack() as stack:
        swarm = start_swarm(stack, tmp_path)
        see_each_other(swarm.members)
        for member in swarm.members:
            member.get_ready()
        results = outcomes([member.fuse() for member in swarm.members])
        assert all(isinstance(result, Committed) for result in results)
        made = invite(swarm.run, expires_at=Network.now() + DAY)
        key = tmp_path / "third.key"
        own = load_identity(key)
        third = Admission(
            run=swarm.run,
            organizer=made.organizer,
            peer_id=own.peer_id,
            credential=made.credential_for(own.peer_id, Network.now()),
        )
        entry = tuple(addresses(swarm.members[0].network)[:1])
        config = network_config(key, initial_peers=entry, admission=third)
        network = stack.enter_context(Network(config))
        assert ask_spec(network, network.entry_points, swarm.run) == swarm.spec


def test_a_revoked_member_is_out_everywhere_at_once_and_knows_why(tmp_path: Path) -> None:
    with ExitStack() as stack:
        swarm = start_swarm(stack, tmp_path)
        entry = tuple(addresses(swarm.members[0].network)[:1])
        third = start_member(stack, swarm.spec, tmp_path / "2.key", entry, tmp_path / "2.json")
        members = [*swarm.members, third]
        see_each_other(members)
        assert third.peer_id in {m.peer_id for m in members[1].agreement.live()}
        first = members[0]
        first.run(serve_streams(first.network, "held", hold))
        open_one = open_stream(third.network, first.peer_id, "held", b"x", timeout_seconds=CALL_SECONDS)
        held = third.network.submit(third.run(open_one).receive({}))
        text = revocations(swarm.run, {third.peer_id}).to_bytes().decode()
        call = members[1].network.call(members[0].peer_id, "revocations", text, timeout_seconds=CALL_SECONDS)
        members[1].run(call)  # anybody may carry it: the organizer has signed it
        for member in members[:2]:
            wait_until(lambda m=member: m.admission.version == 1)  # type: ignore[misc]
            assert third.peer_id not in {m.peer_id for m in member.agreement.live()}
            assert third.peer_id in member.agreement.membership.banned
            assert any("private" in refusal for refusal in refusals(third, member, 5))
        with pytest.raises(StreamError):  # what was under way has ended, too
            held.result(CALL_SECONDS)
        assert third.admission.problem() == "the organizer has revoked it"
        for member in members[:2]:  # the others go on
            member.get_ready()
        assert all(isinstance(r, Committed) for r in outcomes([m.fuse() for m in members[:2]]))


def test_the_dht_tells_of_a_revocation_whom_nobody_told(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = start_swarm(stack, tmp_path).members

        async def learn() -> None:
            first.admission._on_revoked.clear()
            first.admission.learn(revocations(first.admission.run, {peer("a")}).to_bytes())
            await first.agreement._presence._board.publish_revocations(first.admission)

        first.run(learn())
        second.run(second.agreement._presence._board.read_revocations(second.admission))
        assert second.admission.revoked == {peer("a")}


def test_who_was_started_anew_is_met_again(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = start_swarm(stack, tmp_path).members
        see_each_other([first, second])
        sent: list[Sent] = []
        door = second.network._door
        assert door is not None
        door._record = sent.append

        async def ask() -> list[bytes]:
            """Many at one time: they share one meeting."""
            first.admission._admitted.clear()  # as after a restart
            call = second.network.call
            calls = [call(first.peer_id, "spec", None, timeout_seconds=CALL_SECONDS) for _ in range(40)]
            return await asyncio.gather(*calls)

        assert second.run(ask()) == [swarm_spec_text(second)] * 40
        assert 1 <= len([s for s in sent if (s.kind, s.name) == ("call", "present")]) <= 3


def test_a_credential_that_ends_keeps_its_peer_out_from_then_on(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = start_swarm(stack, tmp_path).members
        second.run(second.network.call(first.peer_id, "spec", None, timeout_seconds=CALL_SECONDS))
        first.admission._now = lambda: Network.now() + 2 * DAY
        with pytest.raises(PeerUnreachable, match="expired"):
            second.run(second.network.call(first.peer_id, "spec", None, timeout_seconds=CALL_SECONDS))


def test_a_private_spec_without_an_admission_is_refused(tmp_path: Path) -> None:
    own = load_identity(tmp_path / "0.key")
    network = Network(network_config(own.path))
    with closing(network), pytest.raises(AccessError, match="join with --invite"):
        Agreement(network, own, Chain(private_spec()))


@pytest.mark.parametrize("spec", [make_spec(), private_spec(seed=1), private_spec(organizer=peer("b"))])
def test_an_invite_that_does_not_fit_the_spec_is_refused(tmp_path: Path, spec: RunSpec) -> None:
    own = load_identity(tmp_path / "0.key")
    kept = admission(private_spec().digest, own.peer_id, now=Network.now)
    network = Network(network_config(own.path, admission=kept))
    with closing(network), pytest.raises(AccessError, match="the invite is of another run"):
        Agreement(network, own, Chain(spec))


async def hold(stream: FrameStream) -> None:
    """Until the other side is gone."""
    await stream.receive({})


def swarm_spec_text(member: Member) -> bytes:
    return member.agreement.chain.spec.to_toml().encode()


def see_each_other(members: list[Member]) -> None:
    """In a session the board does it within seconds."""
    for member in members:
        member.run(member.agreement._presence.read_board())
        member.run(member.agreement._presence.tell_everybody())


def refusals(caller: Member, called: Member, num_calls: int) -> list[str]:
    """What each call ends with; the first may meet the connection at the moment in which it is cut."""
    why = []
    for _ in range(num_calls):
        with pytest.raises(PeerUnreachable) as error:
            caller.run(caller.network.call(called.peer_id, "spec", None, timeout_seconds=CALL_SECONDS))
        why.append(str(error.value))
    return why


def wait_until(condition: Callable[[], bool]) -> None:
    """Bounded; what it waits for takes milliseconds."""

    async def wait() -> None:
        async with asyncio.timeout(CALL_SECONDS):
            while not condition():
                await asyncio.sleep(0.02)

    asyncio.run(wait())
