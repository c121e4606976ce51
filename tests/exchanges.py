"""What do tests of the all-reduce build again and again? Real networks, groups, and tiny contributions."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.agreement import Group
from coordinator.identity import Identity, load_identity
from coordinator.network import Network
from coordinator.records import Contribution, sign
from peer.allreduce import AllReduceService, Reduced, Rules, _Exchange
from peer.compression import CODECS
from peer.manifest import Manifest, Outgoing, join_hashes, part_hash, prepare
from peer.parts import PartGrid
from tests.fakes import CALL_SECONDS, hash_of, new_directory, running_networks

NUM_PEERS = 4
SIZE = 10_000  # ten parts of 1024 values, the last one of 784; slices of 2, 3, 2 and 3 parts
RUN, PREVIOUS = hash_of("run"), hash_of("previous")
LIMIT_SECONDS = 15.0
NO_RESIDUALS: Mapping[int, torch.Tensor] = {}

Future = concurrent.futures.Future[Reduced]


@dataclass
class Swarm:
    """Some peers of one process; their order is that of every group."""

    networks: list[Network]
    services: list[AllReduceService]
    identities: list[Identity]
    num_groups: int = 0

    @property
    def peer_ids(self) -> list[str]:
        return [network.peer_id for network in self.networks]

    def owned(self, group: Group, size: int = SIZE) -> dict[str, range]:
        return PartGrid(size).owned(group.members)

    def group(
        self, num_peers: int = NUM_PEERS, weights: Sequence[float] | None = None, round: int | None = None
    ) -> Group:
        """The first attempt of a round of its own, unless told otherwise."""
        self.num_groups += 1
        members = tuple(self.peer_ids[:num_peers])
        contributions = tuple(
            Contribution(peer=member, num_examples=1, weight=weight)
            for member, weight in zip(members, weights or [1.0] * num_peers, strict=True)
        )
        group_id = hashlib.sha256(f"{members} {self.num_groups}".encode()).digest()
        return Group(
            round or 1000 + self.num_groups, self.num_groups, members, contributions, members, 0.0, group_id
        )

    def prepare(
        self, deltas: Sequence[torch.Tensor], codec: str = "fp32", round: int = 1, previous: str = PREVIOUS
    ) -> list[Outgoing]:
        return [
            prepare(delta, CODECS[codec], identity, run=RUN, round=round, previous=previous)
            for delta, identity in zip(deltas, self.identities, strict=False)
        ]

    def start(
        self,
        group: Group,
        outgoing: Sequence[Outgoing | None],
        *,
        aggregation: str = "mean",
        screening: str = "none",
        limit_seconds: float = LIMIT_SECONDS,
        residuals: Sequence[Mapping[int, torch.Tensor]] | None = None,
    ) -> list[Future]:
        """One all-reduce for each contribution; None: that member never starts."""
        rules = Rules(aggregation, screening, limit_seconds)
        residuals = residuals or [NO_RESIDUALS] * len(outgoing)
        return [
            network.submit(service.reduce(group, own, rules, residuals=feedback))
            for network, service, own, feedback in zip(
                self.networks, self.services, outgoing, residuals, strict=False
            )
            if own is not None
        ]

    def reduce(self, group: Group, outgoing: Sequence[Outgoing], **options: Any) -> list[Reduced]:
        futures = self.start(group, outgoing, **options)
        return [future.result(_ends_within(**options)) for future in futures]

    def errors(
        self, group: Group, outgoing: Sequence[Outgoing | None], **options: Any
    ) -> list[BaseException | None]:
        futures = self.start(group, outgoing, **options)
        return [future.exception(_ends_within(**options)) for future in futures]

    def settle(self) -> None:
        """Until nobody serves an exchange any more."""
        for network, service in zip(self.networks, self.services, strict=True):
            network.run(_ended(service), timeout_seconds=CALL_SECONDS)


def _ends_within(*, limit_seconds: float = LIMIT_SECONDS, **_options: Any) -> float:
    """On a busy machine an exchange may use all of its limit before it fails."""
    return limit_seconds + CALL_SECONDS


@contextmanager
def running_swarm(num_peers: int = NUM_PEERS) -> Iterator[Swarm]:
    directory = new_directory()
    with running_networks(num_peers, directory) as networks:
        identities = [load_identity(directory / f"{index}.key") for index in range(num_peers)]
        services = [
            AllReduceService(network, identity, RUN)
            for network, identity in zip(networks, identities, strict=True)
        ]
        for network, service in zip(networks, services, strict=True):
            network.run(service.start(), timeout_seconds=CALL_SECONDS)
        yield Swarm(networks, services, identities)


async def _ended(service: AllReduceService) -> None:
    while service._exchanges:
        await asyncio.sleep(0.01)


def deltas(num_peers: int = NUM_PEERS, size: int = SIZE, seed: int = 7) -> list[torch.Tensor]:
    """Of at most 0.3, so that float32 is exact to 2e-8."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * 0.05).clamp(-0.3, 0.3) for _ in range(num_peers)]


def decoded_rows(outgoing: Sequence[Outgoing]) -> np.ndarray:
    """(num_peers, num_values) float64: what the reducers see."""
    return np.stack(
        [np.concatenate([own.decoded(p).numpy() for p in range(own.grid.num_parts)]) for own in outgoing]
    ).astype(np.float64)


def forged(
    outgoing: Outgoing,
    identity: Identity,
    *,
    parts: Mapping[int, bytes] | None = None,
    squared_norms: Mapping[int, float] | None = None,
    **changes: Any,
) -> Outgoing:
    """With other parts and norms, under a manifest that names them, signed again."""
    encoded = [(parts or {}).get(part, data) for part, data in enumerate(outgoing.parts)]
    norms = [
        (squared_norms or {}).get(part, norm) for part, norm in enumerate(outgoing.manifest.squared_norms)
    ]
    hashes = join_hashes(b"".join(map(part_hash, encoded)))
    manifest = Manifest.model_validate(
        {**outgoing.manifest.model_dump(), "hashes": hashes, "squared_norms": norms, **changes}
    )
    return Outgoing(outgoing.grid, outgoing.codec, encoded, manifest, sign(manifest, identity).to_bytes())


def on_member(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, peer_id: str, replacement: Callable[..., Any]
) -> None:
    """On one member `replacement(original, self, *args)` instead of a method; others run the real one."""
    original = getattr(owner, method)

    def replaced(self: Any, *args: Any) -> Any:
        exchange = self if isinstance(self, _Exchange) else self._exchange
        if exchange.own != peer_id:
            return original(self, *args)
        return replacement(original, self, *args)

    monkeypatch.setattr(owner, method, replaced)
