"""What do tests of the protocol build again and again? Specs, identities, signed heartbeats and commits."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.chain import Chain
from coordinator.identity import Identity, load_identity, peer_id_of
from coordinator.membership import Member
from coordinator.network import Network, NetworkConfig
from coordinator.records import Commit, Contribution, PeerRecord, SignedCommit, sign, signature_text
from coordinator.spec import RunSpec

NOW = 1_000_000.0  # of the fake clock, DHT time
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
CALL_SECONDS = 20.0  # for what takes milliseconds, on a machine that does other things, too


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def make_spec(**changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "run_name": "test",
        "created_at": NOW - 100.0,
        "model": "tiny",
        "backbone_hash": hash_of("round 0"),
        "num_parameters": 10,
        "files": {"config.json": {"sha256": hash_of("config"), "size_bytes": 6}},
        "num_rounds": 5,
        "round_examples": 100,
        "min_peers": 2,
    }
    return RunSpec.model_validate({**values, **changes})


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def identity(name: str) -> Identity:
    """A key that follows from `name`, without a file."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    return Identity(private_key=key, path=Path("/nonexistent"), peer_id=peer_id_of(key.public_key()))


def peer(name: str) -> str:
    return identity(name).peer_id


def peers(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(peer(name) for name in names)


def make_heartbeat(chain: Chain, **changes: Any) -> PeerRecord:
    """Of a peer that trains on the tip of `chain`."""
    values: dict[str, Any] = {
        "run": chain.spec.digest,
        "phase": "finetuning",
        "round": chain.round,
        "state_hash": chain.state_hash,
        "commit": chain.tip,
        "entered_at": NOW - 10.0,
        "issued_at": NOW - 1.0,
        "expires_at": NOW - 1.0 + chain.spec.lease_seconds,
    }
    return PeerRecord.model_validate({**values, **changes})


def make_member(chain: Chain, name: str, **changes: Any) -> Member:
    record = make_heartbeat(chain, **changes)
    return Member(peer(name), record, sign(record, identity(name)).to_json())


def make_commit(chain: Chain, contributors: Sequence[str], **changes: Any) -> Commit:
    """The next commit of `chain`, by peers of these names; all of them vote, unless told otherwise."""
    num_examples = changes.pop("num_examples", {})
    examples = {name: num_examples.get(name, 100) for name in contributors}
    values: dict[str, Any] = {
        "run": chain.spec.digest,
        "round": chain.round + 1,
        "attempt": 0,
        "previous": chain.tip,
        "state_hash": hash_of(f"round {chain.round + 1}"),
        "contributors": [
            Contribution(
                peer=peer(name), num_examples=count, weight=chain.spec.contribution_weight(count)
            ).model_dump()
            for name, count in examples.items()
        ],
        "electorate": list(peers(contributors)),
        "committed_at": chain.committed_at + 60.0,
    }
    return Commit.model_validate({**values, **changes})


def signed_by(commit: Commit, names: Iterable[str]) -> SignedCommit:
    return SignedCommit(
        commit=commit, signatures={peer(name): signature_text(commit, identity(name)) for name in names}
    )


def extend(chain: Chain, contributors: Sequence[str], signers: Sequence[str] = (), **changes: Any) -> Chain:
    """`chain` with one round more; signed by its contributors, unless told otherwise."""
    return chain.extended(signed_by(make_commit(chain, contributors, **changes), signers or contributors))


@contextmanager
def running_networks(
    num_networks: int, directory: Path, before_start: Callable[[Network], None] = lambda _: None
) -> Iterator[list[Network]]:
    """Real ones on loopback; the first is the entry point of the others."""
    with ExitStack() as stack:
        networks: list[Network] = []
        for index in range(num_networks):
            entry = tuple(addresses(networks[0])[:1]) if networks else ()
            network = Network(network_config(directory / f"{index}.key", initial_peers=entry))
            before_start(network)
            networks.append(stack.enter_context(network))
        yield networks


def network_config(key: Path, **changes: Any) -> NetworkConfig:
    return NetworkConfig(**{"identity": load_identity(key), "host_maddrs": LOOPBACK, **changes})


def addresses(network: Network) -> list[str]:
    return network.run(network.addresses(), timeout_seconds=CALL_SECONDS)


def new_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="cold-test-"))
