"""What does the swarm look like from here? Its entry points, run, clocks, and a piece of its state.

Only measures; `peer/checkup.py` judges. Nothing is published: others see a peer that asks and leaves.
Every wait is bounded. A `ProbeNetwork` has an identity of its own, in a directory that the caller removes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.admission import admission_of
from coordinator.board import BoardValidator, board_key
from coordinator.departures import tcp_endpoint
from coordinator.dial_back import DialledBack, ask_dial_back
from coordinator.errors import AccessError, NetworkError, SpecError
from coordinator.identity import Identity, load_identity
from coordinator.membership import CLOCK_DIFFERENCE_SECONDS, TRAINING_PHASES
from coordinator.network import Network, NetworkConfig, PeerRefuses, PeerUnreachable, is_entry_address
from coordinator.outgoing import Recorder, ignore
from coordinator.records import PeerRecord, RecordError, open_signed, parse_json
from coordinator.spec import MAX_SPEC_BYTES, RunSpec, parse_spec
from coordinator.transfer import Piece, fetch_blob
from peer.checkup import (
    ClockSample,
    EntryPoint,
    Reach,
    Scope,
    SwarmFigures,
    heartbeat_sample,
    is_from_outside,
    scope_of,
)
from peer.config import PeerConfig
from peer.genesis import ask_spec, get_state, kept_spec
from peer.layout import TensorLayout

logger = logging.getLogger(__name__)

DAEMON_SECONDS = 15.0  # p2pd needs up to that on a loaded machine, and a second on a quiet one
DIAL_SECONDS = 5.0
CALL_SECONDS = 5.0
ASK_SECONDS = 8.0  # for the run spec, or to be dialled back; a peer may be busy with finetuning
MAX_ASKED_TO_DIAL = 4
FIRST_HEARTBEATS_SECONDS = 4.0
CLOCK_SECONDS = 10.0  # waiting for heartbeats that are new; they come six times in a lease
LOOK_SECONDS = 0.25
RELAY_SECONDS = 8.0  # until an entry point has given a relayed address
RATE_BYTES = 4_000_000
RATE_SECONDS = 8.0
_BEST_FIRST: tuple[Scope, ...] = ("relay", "public", "private", "loopback")


class ProbeNetwork(Network):
    """Says of each entry point why it does not answer, and starts even when none does."""

    def __init__(self, config: NetworkConfig, record: Recorder = ignore) -> None:
        super().__init__(config, record)
        self.answers: dict[str, str | None] = {}  # of entry points, by address; None: it answers
        self.remembered: dict[str, str | None] = {}  # the same of peers met before

    def __enter__(self) -> ProbeNetwork:
        super().__enter__()
        return self

    async def _dial_entry_points(self) -> list[str]:
        given = self._config.initial_peers
        met = [a for a in self._config.remembered_peers if a not in given and is_entry_address(a)]
        reasons = await asyncio.gather(*(self._dial(address, DIAL_SECONDS) for address in (*given, *met)))
        self.answers = dict(zip(given, reasons, strict=False))
        self.remembered = dict(zip(met, reasons[len(given) :], strict=True))
        return [a for a, why in (*self.answers.items(), *self.remembered.items()) if why is None]


def make_network(
    config: PeerConfig,
    folder: Path,
    record: Recorder = ignore,
    *,
    kept: RunSpec | None = None,
    remembered: tuple[str, ...] = (),
) -> ProbeNetwork:
    """As the peer would have it. Entering it raises NetworkError.

    It has an identity of its own, unless a private run lets in nobody but the peer itself. `kept`: the run
    that the peer would resume; `remembered`: addresses of peers met before. Raises StateError, and
    AccessError when neither invite nor kept credential lets in.
    """
    identity = _probe_identity(config, folder, kept)
    output_dir = None if kept is None else config.output_dir  # of an invite alone nothing is there yet
    return ProbeNetwork(
        NetworkConfig(
            identity=identity,
            admission=admission_of(
                kept, config.invite, identity, output_dir, config.organizer_key, keeps=False
            ),
            host_maddrs=config.host_maddrs,
            announce_maddrs=config.announce_maddrs,
            initial_peers=config.initial_peers,
            remembered_peers=remembered,
            listens=config.listens,
            reachability=config.reachability,
            startup_timeout_seconds=DAEMON_SECONDS,
        ),
        record,
    )


def _probe_identity(config: PeerConfig, folder: Path, kept: RunSpec | None) -> Identity:
    """The peer's own where an invite, or what is kept of one, lets in nobody else; it is not made here."""
    for_peer = config.invite.for_peer if config.invite is not None else None
    is_member = config.invite is None and kept is not None and kept.organizer is not None
    if (for_peer is not None or is_member) and config.identity_file.is_file():
        return load_identity(config.identity_file)
    if for_peer is not None:
        raise AccessError(f"the invite is for the peer {for_peer}: its key is not at {config.identity_file}")
    return load_identity(folder / "probe.key")


# ---- the run and its members ----------------------------------------------------------------------


@dataclass(frozen=True)
class Heartbeat:
    peer_id: str
    record: PeerRecord
    sample: ClockSample  # of its author's clock
    is_fresh: bool  # it was not there at the look before: its author lives, and it is a moment old


class HeartbeatLog:
    """Reads the board again and again; a record that was not there at the last look is at most so old."""

    def __init__(self, network: Network, spec: RunSpec) -> None:
        self._network, self._spec = network, spec
        self._key = board_key(spec.digest)
        self._newest: dict[str, Heartbeat] = {}

    async def start(self) -> None:
        validator = BoardValidator(self._spec.digest, admission=self._network.admission)
        await self._network.start_dht(validator)

    async def read_first(self) -> None:
        """Until somebody is seen, for a few seconds. Raises NetworkError."""
        ends_at = time.monotonic() + FIRST_HEARTBEATS_SECONDS
        await self._look(self._first_age_seconds)
        while not self._newest and time.monotonic() < ends_at:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look(self._first_age_seconds)

    async def watch(self) -> None:
        """Until each peer has said something new, for `CLOCK_SECONDS` at most. Raises NetworkError."""
        ends_at = time.monotonic() + CLOCK_SECONDS
        looked_at = time.monotonic()
        while not self._is_settled() and time.monotonic() < ends_at:
            await asyncio.sleep(LOOK_SECONDS)
            since, looked_at = looked_at, time.monotonic()
            await self._look(time.monotonic() - since + LOOK_SECONDS)

    def _is_settled(self) -> bool:
        return bool(self._newest) and all(h.is_fresh for h in self._newest.values())

    @property
    def heartbeats(self) -> list[Heartbeat]:
        """Live ones of others."""
        return [h for h in self._newest.values() if h.record.phase != "leaving"]

    def newest_state(self, entry_points: Sequence[str]) -> tuple[str, list[str]]:
        """Hash of the state of the highest round, and who says to hold it; else round 0's."""
        newest = max((h.record.round for h in self.heartbeats), default=0)
        holders = [h for h in self.heartbeats if h.record.round == newest > 0]
        if not holders:
            return self._spec.backbone_hash, list(entry_points)
        state_hash = holders[0].record.state_hash
        return state_hash, [h.peer_id for h in holders if h.record.state_hash == state_hash]

    @property
    def _first_age_seconds(self) -> float:
        """Of a heartbeat at the first look: they are a sixth of a lease apart, and take their time."""
        return self._spec.lease_seconds / 6 + CLOCK_DIFFERENCE_SECONDS

    async def _look(self, max_age_seconds: float) -> None:
        for peer_id, value in (await self._network.dht_get(self._key)).items():
            try:
                author, record = open_signed(value, PeerRecord)
            except RecordError:
                continue  # the validator let only its owner write it; it costs this entry
            known = self._newest.get(peer_id)
            if author != peer_id or (known and record.issued_at <= known.record.issued_at):
                continue
            sample = heartbeat_sample(record.issued_at, self._network.now(), max_age_seconds)
            self._newest[peer_id] = Heartbeat(peer_id, record, sample, is_fresh=known is not None)


def find_spec(network: ProbeNetwork, digest: str | None) -> RunSpec:
    """Of the first entry point that gives one, `digest` if that is known. Raises SpecError, NetworkError."""
    return ask_spec(network, network.entry_points, digest)


@dataclass(frozen=True)
class Asked:
    """What entry points said when each was asked for its run."""

    specs: Mapping[str, RunSpec]  # by peer id
    refusing: frozenset[str]  # peers of a private run that do not let this one in

    def find(self, network: ProbeNetwork, digest: str | None) -> RunSpec:
        """The run to look at: as `join` finds it, but nobody is waited for who was silent just now.

        Raises SpecError, AccessError, NetworkError.
        """
        for peer_id in network.entry_points:
            spec = self.specs.get(peer_id)
            if spec is not None and digest in (None, spec.digest):
                return spec
        answered = [p for p in network.entry_points if p in self.specs or p in self.refusing]
        return ask_spec(network, answered, digest)  # which says what is wrong

    def entries(self, answers: Mapping[str, str | None]) -> list[EntryPoint]:
        """`answers`: by address, why it was not reached."""
        found = []
        for address, why_not in answers.items():
            peer_id = address.rpartition("/p2p/")[2]
            spec = self.specs.get(peer_id)
            run = None if spec is None else spec.digest
            found.append(EntryPoint(address, why_not, run, peer_id in self.refusing))
        return found

    def of_run(self, network: ProbeNetwork, digest: str) -> list[str]:
        """Entry points that are in it."""
        specs = self.specs
        return [p for p in network.entry_points if p in specs and specs[p].digest == digest]


def ask_entry_points(network: ProbeNetwork) -> Asked:
    """All of those that were reached, at one time: a connection is their daemon's, an answer their own."""
    specs: dict[str, RunSpec] = {}
    refusing: set[str] = set()

    async def ask(peer_id: str) -> None:
        try:
            reply = await network.call(peer_id, "spec", None, timeout_seconds=ASK_SECONDS)
            specs[peer_id] = parse_spec(reply[: MAX_SPEC_BYTES + 1], source=f"the run spec of {peer_id[-8:]}")
        except PeerRefuses:
            refusing.add(peer_id)
        except (PeerUnreachable, SpecError) as error:
            logger.info("no run spec from an entry point: %s", error)

    async def ask_all() -> None:
        await asyncio.gather(*map(ask, network.entry_points))

    network.run(ask_all(), timeout_seconds=2 * ASK_SECONDS)
    return Asked(specs, frozenset(refusing))


def glance(
    config: PeerConfig, check: Callable[[], None] = lambda: None, record: Recorder = ignore
) -> tuple[RunSpec | None, list[ClockSample] | None]:
    """What `join` looks at before it starts: the run, and the clocks of the entry points.

    (None, None) where nobody answers: the session tries longer, and knows more addresses. No clocks where
    there is not one heartbeat; None where there are, but whose authors may be dead. `check` is called while
    waiting and may raise; `record` is told what is sent. Raises AccessError, StateError.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            kept = kept_spec(config.output_dir)
            with make_network(config, Path(folder), record, kept=kept) as network:
                check()
                spec = find_spec(network, kept.digest if kept is not None else config.run_digest)
                log = HeartbeatLog(network, spec)
                network.run(log.start(), timeout_seconds=DAEMON_SECONDS, check=check)
                network.run(log.read_first(), timeout_seconds=2 * FIRST_HEARTBEATS_SECONDS, check=check)
                samples = clock_samples(log.heartbeats, answering(network))
                return spec, samples if samples or not log.heartbeats else None
        except (NetworkError, SpecError) as error:
            logger.info("no look at the swarm before joining: %s", error)
            return None, None


def clock_samples(heartbeats: Sequence[Heartbeat], alive: Collection[str]) -> list[ClockSample]:
    """Of those whose heartbeat is new, or that are known to live: a dead peer's heartbeat is only old."""
    return [h.sample for h in heartbeats if h.is_fresh or h.peer_id in alive]


def answering(network: ProbeNetwork) -> set[str]:
    """Entry points whose process answers, not only their daemon."""
    return set(ask_entry_points(network).specs)


def swarm_figures(spec: RunSpec, heartbeats: Sequence[Heartbeat], round_: int = 0) -> SwarmFigures:
    """`round_`: of which this peer knows itself."""
    return SwarmFigures(
        run_name=spec.run_name,
        digest=spec.digest,
        round=max((h.record.round for h in heartbeats), default=round_),
        num_rounds=spec.num_rounds,
        num_trainers=sum(h.record.phase in TRAINING_PHASES for h in heartbeats),
        min_peers=spec.min_peers,
    )


# ---- can others dial me ---------------------------------------------------------------------------


def find_reach(
    network: ProbeNetwork, config: PeerConfig, folder: Path, *, run: str, donors: Sequence[str]
) -> Reach:
    """Peers of the run, `donors`, are asked to dial this one back.

    Where none of them can tell, a second p2p daemon on this machine dials each own address, the widest first,
    until one answers.
    """
    own = _own_addresses(network, config)
    dialled_back = _ask_to_be_dialled(network, config, own, run, donors)
    answered: list[str] = []
    refused: list[str] = []
    for scope in () if any(is_from_outside(d) for d in dialled_back) else _BEST_FIRST:
        some = tuple(address for address in own if scope_of(address) == scope)
        if not some or answered:
            continue
        found = _dial_from_outside(some, folder)
        answered += [address for address, why in found.items() if why is None]
        refused += [address for address, why in found.items() if why is not None]
    dialled = {**network.answers, **network.remembered}
    reached = [address for address, why in dialled.items() if why is None]
    return Reach(
        listens=config.listens,
        reachability=config.reachability,
        answered=frozenset(map(scope_of, answered)),
        unanswered=tuple(refused),
        entry_scopes=frozenset(map(scope_of, reached)),
        dialled_back=dialled_back,
    )


def _ask_to_be_dialled(
    network: ProbeNetwork, config: PeerConfig, own: Sequence[str], run: str, donors: Sequence[str]
) -> tuple[DialledBack, ...]:
    """At the port that others are told; not where that is of another host than the one that they see."""
    announced = [end for a in config.announce_maddrs if (end := tcp_endpoint(a)) is not None]
    listening = [end for a in own if (end := tcp_endpoint(a)) is not None]
    port = next((port for _, port in announced or listening), None)
    if port is None or not config.listens:
        return ()

    async def ask(peer_id: str) -> DialledBack | None:
        try:
            return await ask_dial_back(network, peer_id, run, port, timeout_seconds=ASK_SECONDS)
        except (PeerUnreachable, RecordError) as error:  # an older peer does not know the question
            logger.info("not dialled back by %s: %s", peer_id[-8:], error)
            return None

    async def ask_all() -> list[DialledBack | None]:
        return await asyncio.gather(*map(ask, donors[:MAX_ASKED_TO_DIAL]))

    hosts = {host for host, _ in announced}
    said = network.run(ask_all(), timeout_seconds=2 * ASK_SECONDS)
    return tuple(d for d in said if d is not None and (not hosts or d.host in hosts))


def _own_addresses(network: ProbeNetwork, config: PeerConfig) -> list[str]:
    """A relayed address comes a moment after the relay was found."""
    ends_at = time.monotonic() + (RELAY_SECONDS if config.reachability == "private" else 0.0)
    while True:
        try:
            own = network.run(network.addresses(), timeout_seconds=CALL_SECONDS)
        except NetworkError:
            own = []
        if any(scope_of(address) == "relay" for address in own) or time.monotonic() >= ends_at:
            return own if config.listens else [a for a in own if scope_of(a) == "relay"]
        time.sleep(LOOK_SECONDS)


def _dial_from_outside(addresses: tuple[str, ...], folder: Path) -> dict[str, str | None]:
    """By address, why nobody answers there. By a daemon of its own, which is not connected yet."""
    on_loopback = ("/ip4/127.0.0.1/tcp/0",)
    config = NetworkConfig(
        load_identity(folder / "dialler.key"),
        host_maddrs=on_loopback,
        initial_peers=addresses,
        listens=False,
        startup_timeout_seconds=DAEMON_SECONDS,
    )
    with ProbeNetwork(config) as other:
        return other.answers


# ---- files and pieces of the state ----------------------------------------------------------------


def fetch_files(
    network: Network,
    spec: RunSpec,
    donors: Sequence[str],
    directory: Path,
    names: Collection[str] | None = None,
    *,
    timeout_seconds: float = 4 * CALL_SECONDS,
) -> None:
    """Config and tokenizer of the run, or some of `names`, each checked against the spec.

    `timeout_seconds`: for each. Raises NetworkError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in spec.files.items():
        if names is not None and name not in names:
            continue
        piece = Piece(0, file.size_bytes, file.sha256)
        fetch = fetch_blob(network, spec.digest, f"file/{name}", [piece], donors)
        (directory / name).write_bytes(network.run(fetch, timeout_seconds=timeout_seconds))


def fetch_layout(network: Network, spec: RunSpec, state_hash: str, donors: Sequence[str]) -> TensorLayout:
    """Names and shapes of the backbone. Raises NetworkError."""
    for donor in donors:
        try:
            call = network.call(donor, "manifest", {"state": state_hash}, timeout_seconds=CALL_SECONDS)
            reply = network.run(call, timeout_seconds=2 * CALL_SECONDS)
            layout = _parse_layout(reply)
        except (PeerUnreachable, RecordError, ValueError):
            continue
        if layout.num_values == spec.num_parameters:
            return layout
    raise NetworkError("no peer gave the layout of the model")


def _parse_layout(reply: bytes) -> TensorLayout:
    value: Any = parse_json(reply, max_bytes=len(reply))
    if not isinstance(value, dict) or "layout" not in value:
        raise RecordError("a manifest holds a layout")
    return TensorLayout.from_json(value["layout"]).backbone


class _Enough(Exception):
    """Ends a download of which only the rate is of interest."""


def download_rate(network: Network, spec: RunSpec, state_hash: str, donors: Sequence[str]) -> float | None:
    """Bytes/s with which pieces of the state come, each checked; a few MB at most. None: too few to tell."""
    started = time.monotonic()
    num_bytes, seconds = 0, 0.0

    def on_progress(done: int, _total: int) -> None:
        nonlocal num_bytes, seconds
        num_bytes, seconds = done, time.monotonic() - started
        if num_bytes >= RATE_BYTES:
            raise _Enough

    def check() -> None:
        if time.monotonic() - started > RATE_SECONDS:
            raise _Enough

    with contextlib.suppress(_Enough, NetworkError):
        get_state(network, spec, state_hash, donors, on_progress, check=check)
    return num_bytes / seconds if seconds > 0 and num_bytes >= 100_000 else None
