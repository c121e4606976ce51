"""Does the fusion without a network compute what the all-reduce computes, rule by rule and bit by bit?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from coordinator.agreement import Group
from coordinator.identity import Identity, load_identity
from coordinator.network import Network
from coordinator.records import Contribution
from peer.allreduce import AllReduceService, Reduced, Rules
from peer.compression import CODECS
from peer.fusion import Member, fuse
from peer.manifest import Outgoing, prepare
from peer.outer import outer_step
from scripts.local_peers import identity_of
from tests.fakes import CALL_SECONDS, running_networks

ZEROS = "0" * 64
SIZE = 3000  # three parts: 1024, 1024, 952


def members_of(
    deltas: Sequence[torch.Tensor], codec: str = "fp32", weights: Sequence[float] | None = None
) -> list[Member]:
    weights = weights or [1.0] * len(deltas)
    members = []
    for index, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        identity = identity_of(str(index), 0)
        outgoing = prepare(delta, CODECS[codec], identity, run=ZEROS, round=1, previous=ZEROS)
        members.append(Member(identity.peer_id, weight, outgoing))
    return members


def fused(members: Sequence[Member], aggregation: str, screening: str = "none") -> torch.Tensor:
    outgoing = members[0].outgoing
    return fuse(members, aggregation=aggregation, screening=screening).delta(outgoing.grid, outgoing.codec)


def vectors(num: int, size: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(size, generator=generator) for _ in range(num)]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("mean", 4.0),  # (1 + 2 + 9) / 3
        ("median", 2.0),
        ("trimmed_mean", 4.0),  # of three nobody is cut
        ("clipped_mean", 5.0 / 3.0),  # norms 1, 2, 9 times sqrt(3000): 9 is cut to 2
        ("centered_clipping", 2.0 - (1.0 / 3.0) * (2.0 / 3.0) ** 4),  # see below
    ],
)
def test_by_hand(aggregation: str, expected: float) -> None:
    """Deltas that are 1, 2 and 9 everywhere.

    Centered clipping, in units of one coordinate: from v = 0 with limit 2 to (1 + 2 + 2) / 3 = 5/3; there the
    distances are 2/3, 1/3, 22/3, the limit 2/3, so v moves by (-2/3 + 1/3 + 2/3) / 3 = 1/9 to 16/9; then
    distances 7/9, 2/9: by (2/9) / 3 to 50/27, and on towards 2 by a third of what is left each time:
    2 - (1/3)(2/3)^4 after five steps.
    """
    deltas = [torch.full((SIZE,), value) for value in (1.0, 2.0, 9.0)]
    assert fused(members_of(deltas), aggregation).tolist() == pytest.approx([expected] * SIZE, rel=1e-6)


def test_the_weights_of_the_spec_count() -> None:
    deltas = [torch.full((SIZE,), value) for value in (1.0, 4.0)]
    assert fused(members_of(deltas, weights=[2.0, 1.0]), "mean").tolist() == [2.0] * SIZE


def test_a_screened_member_counts_nothing_and_is_named() -> None:
    deltas = [*vectors(4), 100.0 * vectors(5)[4]]
    fusion = fuse(members_of(deltas), aggregation="mean", screening="norm")
    assert fusion.plan.factors == (1.0, 1.0, 1.0, 1.0, 0.0)
    assert "norm" in fusion.plan.reasons[4]
    assert torch.equal(fused(members_of(deltas), "mean", "norm"), fused(members_of(deltas[:4]), "mean"))


def test_feedback_of_the_reducers_is_added_and_what_is_cut_off_goes_on() -> None:
    """fp16 has steps of 2 above 2048: 2049 becomes 2048, and the 1 left over makes it 2050 next time."""
    members = members_of([torch.full((SIZE,), 2048.0), torch.full((SIZE,), 2050.0)], "fp16")
    grid, codec = members[0].outgoing.grid, members[0].outgoing.codec
    first = fuse(members, aggregation="mean")
    assert first.delta(grid, codec).unique().tolist() == [2048.0]
    assert [values.unique().tolist() for values in first.residuals.values()] == [[1.0]] * 3
    second = fuse(members, aggregation="mean", residuals=first.residuals)
    assert second.delta(grid, codec).unique().tolist() == [2050.0]
    assert [values.unique().tolist() for values in second.residuals.values()] == [[0.0]] * 3
    assert first.residuals[0].unique().tolist() == [1.0]  # what came in is left as it was


def test_contributions_must_fit_together() -> None:
    one, other = vectors(1), vectors(1, size=10)
    with pytest.raises(ValueError, match="differ"):
        fuse([*members_of(one), *members_of(other)], aggregation="mean")
    with pytest.raises(ValueError, match="nobody"):
        fuse([], aggregation="mean")


def test_two_rounds_are_the_rule_on_the_deltas() -> None:
    state = torch.zeros(SIZE)
    reference = torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(2):
        deltas = vectors(3)
        state = outer_step("plain", state, fused(members_of(deltas), "median"), lr=1.0, momentum=0.0)
        reference += torch.stack(deltas).double().median(dim=0).values
    assert torch.equal(state.double(), reference)  # a median of three is one of them; doubling is exact


@dataclass(frozen=True)
class RealSwarm:
    identities: Sequence[Identity]
    networks: Sequence[Network]
    services: Sequence[AllReduceService]

    def reduce(self, outgoing: Sequence[Outgoing], rules: Rules) -> list[Reduced]:
        names = tuple(identity.peer_id for identity in self.identities)
        contributions = tuple(Contribution(peer=name, num_examples=1, weight=1.0) for name in names)
        group_id = hashlib.sha256(repr(rules).encode()).digest()
        group = Group(1, 1, names, contributions, names, 0.0, group_id)
        futures = [
            network.submit(service.reduce(group, sent, rules, residuals={}))
            for network, service, sent in zip(self.networks, self.services, outgoing, strict=True)
        ]
        return [future.result(CALL_SECONDS) for future in futures]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSwarm]:
    directory = tmp_path_factory.mktemp("keys")
    with running_networks(3, directory) as networks:
        identities = [load_identity(directory / f"{index}.key") for index in range(3)]
        services = [
            AllReduceService(network, identity, ZEROS)
            for network, identity in zip(networks, identities, strict=True)
        ]
        for network, service in zip(networks, services, strict=True):
            network.run(service.start(), timeout_seconds=CALL_SECONDS)
        yield RealSwarm(identities, networks, services)


@pytest.mark.parametrize(
    ("codec", "aggregation", "screening"),
    [
        ("fp32", "mean", "none"),
        ("int4", "clipped_mean", "norm"),
        ("int8", "centered_clipping", "norm_cosine"),
    ],
)
def test_the_same_bytes_as_the_all_reduce(
    swarm: RealSwarm, codec: str, aggregation: str, screening: str
) -> None:
    outgoing = [
        prepare(delta, CODECS[codec], identity, run=ZEROS, round=1, previous=ZEROS)
        for delta, identity in zip(vectors(3), swarm.identities, strict=True)
    ]
    reduced = swarm.reduce(outgoing, Rules(aggregation, screening, CALL_SECONDS))
    members = [
        Member(identity.peer_id, 1.0, sent) for identity, sent in zip(swarm.identities, outgoing, strict=True)
    ]
    fusion = fuse(members, aggregation=aggregation, screening=screening)
    delta = fusion.delta(outgoing[0].grid, outgoing[0].codec)
    assert all(torch.equal(one.flat, delta) for one in reduced)
    assert [c.factor for c in reduced[0].contributions] == list(fusion.plan.factors)
    residuals = {part: values for one in reduced for part, values in one.residuals.items()}
    assert residuals.keys() == fusion.residuals.keys()
    assert all(torch.equal(values, fusion.residuals[part]) for part, values in residuals.items())
