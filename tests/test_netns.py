"""Do peers find each other and agree over slow, cut and parted links, and when they cannot be dialled?

Each test has a network of its own made of namespaces (`tests.netns`), with real daemons in it; the slow
ones have real peers that train. Figures of time are bounds of DESIGN.md's promises, not measurements.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, BertConfig

from coordinator import network as network_module
from coordinator.board import Board, BoardValidator
from coordinator.chain import Chain
from coordinator.errors import NetworkError
from coordinator.membership import Membership
from coordinator.network import Network, PeerUnreachable
from coordinator.records import sign
from scripts.swarm_processes import LocalSwarm, SwarmProcess
from tests.fakes import addresses, make_heartbeat, make_spec, network_config, peer
from tests.netns import (
    PEER_PORT,
    Host,
    NetworkLab,
    announced_address,
    listening_address,
    skip_unless_possible,
)
from tests.test_swarm import write_task
from tests.tiny_models import make_tokenizer

CALL_SECONDS = 20.0
START_SECONDS = 240.0  # importing torch and transformers on a loaded machine: no promise of the protocol
CHAIN = Chain(make_spec())
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def lab() -> Iterator[NetworkLab]:
    skip_unless_possible()
    with NetworkLab() as made:
        yield made


def send(lab: NetworkLab, sender: str, receiver: str, num_bytes: int, port: int = 7000) -> float:
    """Seconds until all of it is there, over one connection."""
    with ExitStack() as stack:
        with lab.inside(receiver) as host:
            server = stack.enter_context(socket.create_server((host.address, port)))
        with lab.inside(sender):
            out = stack.enter_context(socket.create_connection((host.address, port), timeout=5.0))
        incoming, _ = server.accept()
        stack.enter_context(incoming)
        incoming.settimeout(CALL_SECONDS)
        started, num_left = time.monotonic(), num_bytes
        out.setblocking(False)
        unsent = memoryview(bytes(num_bytes))
        while num_left:
            with suppress(BlockingIOError):
                unsent = unsent[out.send(unsent[: 1 << 16]) :] if unsent else unsent
            incoming.settimeout(0.001 if unsent else CALL_SECONDS)
            try:
                num_left -= len(incoming.recv(1 << 20))
            except TimeoutError:
                if not unsent:
                    raise
        return time.monotonic() - started


# --- the harness itself


def test_hosts_reach_each_other_and_a_cut_or_split_parts_them(lab: NetworkLab) -> None:
    for name in "abc":
        lab.add_host(name)
    assert send(lab, "a", "b", 100_000) < 1.0
    lab.split("c")
    with pytest.raises(OSError, match=r"No route|timed out"):
        send(lab, "a", "c", 1)
    assert send(lab, "a", "b", 1) < 1.0
    lab.heal()
    assert send(lab, "a", "c", 1) < 5.0
    lab.cut("b")
    with pytest.raises(OSError, match=r"No route|timed out"):
        send(lab, "a", "b", 1)
    lab.heal()
    assert send(lab, "a", "b", 1) < 5.0


def test_rates_are_those_asked_for(lab: NetworkLab) -> None:
    for name in "ab":
        lab.add_host(name)
    lab.limit_rate("a", upload_mbit=8.0, download_mbit=80.0)
    num_bytes = 2_000_000  # 2 s at 8 Mbit/s, with headers 2.1
    upload, download = send(lab, "a", "b", num_bytes), send(lab, "b", "a", num_bytes, port=7001)
    assert 1.8 < upload < 3.5
    assert download < 1.0


def test_a_proxy_delays_and_breaks_connections(lab: NetworkLab) -> None:
    for name in "ab":
        lab.add_host(name)
    lab.add_proxy("b", delay_seconds=0.1, cut_every_seconds=2.0)
    with ExitStack() as stack:
        with lab.inside("b") as host:
            server = stack.enter_context(socket.create_server(("127.0.0.1", PEER_PORT)))
        with lab.inside("a"):
            out = stack.enter_context(socket.create_connection((host.address, 5000), timeout=CALL_SECONDS))
        incoming = stack.enter_context(server.accept()[0])
        incoming.settimeout(CALL_SECONDS)
        started = time.monotonic()
        out.sendall(b"ping")
        assert incoming.recv(10) == b"ping"
        incoming.sendall(b"pong")
        assert out.recv(10) == b"pong"
        assert 0.2 <= time.monotonic() - started < 0.6
        with pytest.raises(ConnectionError):
            out.recv(10)


def test_nothing_is_left_of_a_lab_even_if_a_test_in_it_fails() -> None:
    skip_unless_possible()
    processes: list[subprocess.Popen[bytes]] = []

    def fail() -> None:
        with NetworkLab() as lab:
            lab.add_host("a")
            processes.append(lab.add_proxy("a"))
            with lab.inside("a"):
                processes.append(subprocess.Popen(["sleep", "1000"]))
            raise KeyError("the test failed")

    with pytest.raises(KeyError):
        fail()
    assert [process.wait(CALL_SECONDS) for process in processes] == [-signal.SIGKILL, -signal.SIGKILL]
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"cold-{os.getpid()}-" not in names
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "br0" not in links


# --- networks


async def echo(peer_id: str, body: Any) -> bytes:
    return json.dumps([peer_id, body]).encode()


def start_network(
    stack: ExitStack, lab: NetworkLab, name: str, folder: Path, entry: Sequence[str] = (), **changes: Any
) -> Network:
    with lab.inside(name) as host:
        options: dict[str, Any] = {"host_maddrs": (f"/ip4/{host.address}/tcp/{PEER_PORT}",)}
        config = network_config(folder / f"{name}.key", initial_peers=tuple(entry), **{**options, **changes})
        network = Network(config)
        network.on_call("echo", echo)
        stack.enter_context(network)
    network.run(network.start_dht(BoardValidator(CHAIN.spec.digest)), timeout_seconds=CALL_SECONDS)
    return network


def answers(asking: Network, answering: Network, seconds: float = 5.0) -> bool:
    try:
        reply = asking.run(
            asking.call(answering.peer_id, "echo", 1, timeout_seconds=seconds), timeout_seconds=2 * seconds
        )
    except PeerUnreachable:
        return False
    return bool(json.loads(reply) == [asking.peer_id, 1])


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    ends_at = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends_at:
            return False
        time.sleep(0.2)
    return True


def publish(network: Network) -> None:
    now = Network.now()
    record = make_heartbeat(
        CHAIN, issued_at=now, expires_at=now + CHAIN.spec.lease_seconds, addresses=addresses(network)[:1]
    )
    signed = sign(record, network._config.identity)
    board = Board(network, CHAIN.spec.digest)
    network.run(board.publish(signed, expires_at=record.expires_at), timeout_seconds=CALL_SECONDS)


def seen_by(network: Network) -> set[str]:
    membership = Membership(CHAIN.spec, peer("reader"))
    network.run(Board(network, CHAIN.spec.digest).read_into(membership), timeout_seconds=CALL_SECONDS)
    return {member.peer_id for member in membership.live(Network.now())}


@pytest.mark.slow
def test_two_halves_of_a_dht_find_each_other_again_after_a_partition(
    lab: NetworkLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "REACH_SECONDS", 1.0)
    for name in "abcd":
        lab.add_host(name)
    with ExitStack() as stack:
        networks = [start_network(stack, lab, "a", tmp_path)]
        entry = addresses(networks[0])[:1]
        networks += [start_network(stack, lab, name, tmp_path, entry) for name in "bcd"]
        everybody = {network.peer_id for network in networks}

        def all_see(expected: set[str], among: list[Network]) -> bool:
            for network in among:
                publish(network)
            return all(seen_by(network) >= expected for network in among)

        assert wait_until(lambda: all_see(everybody, networks), CALL_SECONDS)
        lab.split("c", "d")
        halves = networks[:2], networks[2:]
        for half in halves:
            assert wait_until(lambda half=half: all_see({n.peer_id for n in half}, half), CALL_SECONDS)  # type: ignore[misc]
        # Until each half has dropped the other from its routing tables, as in a long partition.
        assert wait_until(lambda: [all_see(set(), networks), are_parted(*halves)][1], 60.0)
        lab.heal()
        assert wait_until(lambda: all_see(everybody, networks), 60.0)
        pairs = [(one, other) for one in networks for other in networks if one is not other]
        assert wait_until(lambda: all(answers(*pair) for pair in pairs), 60.0)


def are_parted(first: list[Network], second: list[Network]) -> bool:
    return not any(one._is_in_dht(other.peer_id) for one in first for other in second)


def test_a_peer_that_takes_no_connections_calls_and_is_called(lab: NetworkLab, tmp_path: Path) -> None:
    for name in "ab":
        lab.add_host(name)
    with ExitStack() as stack:
        entry = start_network(stack, lab, "a", tmp_path, reachability="public")
        hidden = start_network(
            stack, lab, "b", tmp_path, addresses(entry), listens=False, host_maddrs=(), reachability="private"
        )
        assert answers(hidden, entry)
        assert answers(entry, hidden)  # over the connection that the hidden one made


def test_two_peers_that_cannot_be_dialled_reach_each_other_through_relays_only(
    lab: NetworkLab, tmp_path: Path
) -> None:
    """With four relays to choose from; with fewer, libp2p waits for three minutes whether more turn up."""
    hidden: dict[str, Any] = {"listens": False, "host_maddrs": ()}
    for name in ("r1", "r2", "r3", "r4", "a", "b"):
        lab.add_host(name)
    with ExitStack() as stack:
        entry = start_network(stack, lab, "r1", tmp_path, reachability="public")
        without = [start_network(stack, lab, name, tmp_path, addresses(entry), **hidden) for name in "ab"]
        assert not answers(without[0], without[1])
    with ExitStack() as stack:
        relays = [start_network(stack, lab, "r1", tmp_path, reachability="public")]
        for name in ("r2", "r3", "r4"):
            relay = start_network(stack, lab, name, tmp_path, addresses(relays[0]), reachability="public")
            relays.append(relay)
        entries = [addresses(relay)[0] for relay in relays]
        hidden["reachability"] = "private"
        peers = [start_network(stack, lab, name, tmp_path, entries, **hidden) for name in "ab"]
        assert wait_until(lambda: all(has_circuit(peer) for peer in peers), 60.0)
        circuit = addresses(peers[1])[0]
        assert peers[0].run(peers[0]._dial(circuit), timeout_seconds=CALL_SECONDS) is None
        assert answers(peers[0], peers[1])
        assert answers(peers[1], peers[0])


def has_circuit(network: Network) -> bool:
    try:
        return any("p2p-circuit" in address for address in addresses(network))
    except NetworkError:
        return False


# --- swarms that train


def make_model(directory: Path) -> Path:
    """1.4 million parameters, 5.5 MB: what takes seconds on the links of these tests."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=768,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class LabSwarm:
    """Real peers, one on each host of a lab, behind proxies; the first begins the run."""

    def __init__(self, lab: NetworkLab, swarm: LocalSwarm, folder: Path) -> None:
        self.peers: dict[str, SwarmProcess] = {}
        self._lab, self._swarm, self.folder = lab, swarm, folder

    def start(self, names: Sequence[str], *flags: str, hidden: str = "", relays: bool = False) -> None:
        """`hidden`: of the names, those that cannot be dialled; `relays`: the others relay for them."""
        model = make_model(self.folder / "pretrained")
        public = ("--reachability", "public") if relays else ()
        first = self._start(names[0], "--model", str(model), *flags, *public)
        started = self._swarm.wait_for(first, "started", timeout_seconds=START_SECONDS)
        entries = list(started["initial_peers"])
        entry = ("--run", started["spec_digest"], "--initial-peers")
        for name in [name for name in names[1:] if name not in hidden]:
            process = self._start(name, *entry, *entries[:1], *public)
            if relays:
                joined = self._swarm.wait_for(process, "joined", timeout_seconds=START_SECONDS)
                entries.append(f"{announced_address(self._lab.hosts[name])}/p2p/{joined['peer_id']}")
        for name in hidden:
            self._start(name, *entry, *entries, is_hidden=True)
        for process in self.peers.values():
            self._swarm.wait_for(process, "joined", timeout_seconds=START_SECONDS)

    def _start(self, name: str, *flags: str, is_hidden: bool = False) -> SwarmProcess:
        data = write_task(self.folder / f"{name}.jsonl", seed=len(self.peers))
        with self._lab.inside(name) as host:
            where = ["--host-maddrs", listening_address(), "--announce-maddrs", announced_address(host)]
            if is_hidden:
                where = ["--no-listen", "--reachability", "private"]
            training = ["--batch-size", "8", "--max-length", "16", "--linger-seconds", "60"]
            output = ["--data", str(data), "--output-dir", str(self.folder / name)]
            process = self._swarm.start(name, "peer.join", [*where, *training, *output, *flags])
        self.peers[name] = process
        return process

    def rounds(self, name: str) -> dict[int, str]:
        """The states that a peer has held, by round: fused with the others, or downloaded from them."""
        events = self.peers[name].of_kind("committed") + self.peers[name].of_kind("caught_up")
        return {event["round"]: event["state_hash"] for event in events}

    def last_round(self) -> int:
        """That all peers have committed or taken over with one hash; 0 at the beginning."""
        rounds = [set(self.rounds(name).items()) for name in self.peers]
        return max((number for number, _ in set.intersection(*rounds)), default=0)

    def wait_for_round(self, number: int, seconds: float) -> None:
        reached = wait_until(lambda: self.last_round() >= number, seconds)
        histories = {name: sorted(self.rounds(name)) for name in self.peers}
        assert reached, f"no common round {number} within {seconds:.0f} s: {histories}"

    def all_agree(self) -> bool:
        """One hash per round on all that have it."""
        hashes: dict[int, set[str]] = {}
        for name in self.peers:
            for number, state_hash in self.rounds(name).items():
                hashes.setdefault(number, set()).add(state_hash)
        return all(len(found) == 1 for found in hashes.values())


@pytest.fixture
def lab_swarm(lab: NetworkLab, tmp_path: Path) -> Iterator[LabSwarm]:
    with LocalSwarm(tmp_path / "logs") as swarm:
        yield LabSwarm(lab, swarm, tmp_path)


def add_hosts(
    lab: NetworkLab, names: str, *, delay_seconds: float = 0.025, cut_every_seconds: float = 0.0
) -> list[Host]:
    hosts = []
    for seed, name in enumerate(names):
        hosts.append(lab.add_host(name))
        lab.add_proxy(name, delay_seconds=delay_seconds, cut_every_seconds=cut_every_seconds, seed=seed)
    return hosts


RUN_FLAGS = ("--rounds", "2", "--round-examples", "32", "--min-peers", "4", "--run-name", "lab")


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_four_peers_with_50_ms_and_20_mbit(lab: NetworkLab, lab_swarm: LabSwarm) -> None:
    for host in add_hosts(lab, "abcd"):
        lab.limit_rate(host.name, upload_mbit=20.0, download_mbit=20.0)
    lab_swarm.start("abcd", *RUN_FLAGS)
    lab_swarm.wait_for_round(2, 240.0)
    assert lab_swarm.all_agree()


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize(("upload_mbit", "download_mbit"), [(4.0, 40.0), (2.0, 2.0)])
def test_one_peer_with_a_tenth_of_the_bandwidth(
    lab: NetworkLab, lab_swarm: LabSwarm, upload_mbit: float, download_mbit: float
) -> None:
    """Of its upload, as at home, or of both directions."""
    for host in add_hosts(lab, "abcd"):
        lab.limit_rate(host.name, upload_mbit=20.0, download_mbit=20.0)
    lab.limit_rate("d", upload_mbit=upload_mbit, download_mbit=download_mbit)
    lab_swarm.start("abcd", *RUN_FLAGS)
    lab_swarm.wait_for_round(2, 300.0)
    assert lab_swarm.all_agree()


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_connections_that_are_cut_now_and_then(lab: NetworkLab, lab_swarm: LabSwarm) -> None:
    add_hosts(lab, "abcd", cut_every_seconds=8.0)
    flags = ("--rounds", "4", "--round-seconds", "3", "--min-peers", "3", "--run-name", "lab")
    lab_swarm.start("abcd", *flags)
    lab_swarm.wait_for_round(4, 300.0)
    assert lab_swarm.all_agree()


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize(("lease_seconds", "partition_seconds"), [(30.0, 8.0), (5.0, 25.0)])
def test_a_partition_shorter_or_longer_than_the_lease_heals(
    lab: NetworkLab, lab_swarm: LabSwarm, lease_seconds: float, partition_seconds: float
) -> None:
    """Afterwards all hold one hash and go on, whatever the halves did."""
    add_hosts(lab, "abcd")
    flags = ("--rounds", "1000", "--round-seconds", "3", "--min-peers", "2", "--run-name", "lab")
    lab_swarm.start("abcd", *flags, "--lease-seconds", str(lease_seconds))
    lab_swarm.wait_for_round(1, 200.0)
    lab.split("c", "d")
    time.sleep(partition_seconds)
    lab.heal()
    highest = max(max(lab_swarm.rounds(name)) for name in "abcd")
    lab_swarm.wait_for_round(highest + 2, 200.0)
    if partition_seconds < lease_seconds:
        assert lab_swarm.all_agree()


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_a_peer_whose_line_stalls_costs_the_others_a_bounded_time(
    lab: NetworkLab, lab_swarm: LabSwarm
) -> None:
    """All connections to it stand still for longer than the lease, without being closed."""
    add_hosts(lab, "abc")
    lab.add_host("d")
    proxy = lab.add_proxy("d", delay_seconds=0.025)
    flags = ("--rounds", "1000", "--round-seconds", "3", "--min-peers", "3", "--run-name", "lab")
    lab_swarm.start("abcd", *flags, "--lease-seconds", "10")
    lab_swarm.wait_for_round(1, 200.0)
    proxy.send_signal(signal.SIGSTOP)
    lab.cut("d")
    before = max(lab_swarm.rounds("a"))
    others = LabSwarm(lab, lab_swarm._swarm, Path())
    others.peers = {name: lab_swarm.peers[name] for name in "abc"}
    others.wait_for_round(before + 2, 120.0)
    lab.heal()
    proxy.send_signal(signal.SIGCONT)
    lab_swarm.wait_for_round(others.last_round() + 1, 120.0)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_two_peers_that_cannot_be_dialled_train_with_the_others_through_relays(
    lab: NetworkLab, lab_swarm: LabSwarm
) -> None:
    """What they send to one another as well: each reduces a slice of all."""
    add_hosts(lab, "rstu", delay_seconds=0.005)
    for name in "ab":
        lab.add_host(name)
    flags = ("--rounds", "3", "--round-examples", "32", "--min-peers", "6", "--run-name", "lab")
    lab_swarm.start("rstuab", *flags, hidden="ab", relays=True)
    lab_swarm.wait_for_round(3, 400.0)
    assert lab_swarm.all_agree()
    lines = (lab_swarm.folder / "a" / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert [(r["num_peers"], r["partial"]) for r in rounds] == [(6, {})] * 3
