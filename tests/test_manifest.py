"""Does a manifest say what is sent, and is everything else that calls itself one refused?"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.records import Record, RecordError, parse_record, sign
from peer.compression import CODECS
from peer.manifest import (
    MAX_SIGNED_BYTES,
    Manifest,
    Outgoing,
    SenderReport,
    Statement,
    figures_hash,
    figures_of,
    figures_to_json,
    join_hashes,
    norms_agree,
    open_manifest,
    open_statement,
    prepare,
    split_hashes,
    squared_norm,
)
from peer.parts import PartGrid
from tests.fakes import hash_of, identity, peer

RUN, PREVIOUS, GROUP = hash_of("run"), hash_of("previous"), hash_of("group")
SIZE = 2500  # parts of 1024, 1024 and 452 values
PARTS = range(3, 5)


def make_outgoing(codec: str = "fp32", name: str = "a") -> Outgoing:
    """Values of 3 and -3: every codec but int4 and top-k has them exactly."""
    delta = torch.full((SIZE,), 3.0)
    delta[::2] = -3.0
    return prepare(delta, CODECS[codec], identity(name), run=RUN, round=4, previous=PREVIOUS)


def opened(data: bytes, **changes: Any) -> Manifest:
    expected: dict[str, Any] = {
        "sender": peer("a"),
        "run": RUN,
        "round": 4,
        "previous": PREVIOUS,
        "codec": "fp32",
        "grid": PartGrid(SIZE),
    }
    return open_manifest(data, **{**expected, **changes})


def test_a_manifest_by_hand() -> None:
    outgoing = make_outgoing()
    manifest = opened(outgoing.signed)
    assert manifest == outgoing.manifest
    assert manifest.squared_norms == [9.0 * 1024, 9.0 * 1024, 9.0 * 452]
    assert manifest.norm == 150.0  # the root of 9 times 2500
    raw = np.tile(np.array([-3.0, 3.0], "<f4"), SIZE // 2).tobytes()
    expected = [hashlib.sha256(raw[start : start + 4096]).digest() for start in (0, 4096, 8192)]
    assert manifest.part_hashes() == expected
    assert b"".join(outgoing.parts) == raw


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_norms_are_of_what_arrives(codec: str) -> None:
    outgoing = make_outgoing(codec)
    for part, declared in enumerate(outgoing.manifest.squared_norms):
        arrives = outgoing.decoded(part).double()
        assert declared == pytest.approx(float(arrives @ arrives), rel=1e-5)
    if codec == "topk":  # 64 of 1024 values
        assert outgoing.manifest.squared_norms[0] == 9.0 * 64


def test_the_digest_is_of_the_content_alone() -> None:
    one, again, other = make_outgoing(), make_outgoing(name="b"), make_outgoing("fp16")
    assert one.manifest.digest == again.manifest.digest != other.manifest.digest
    assert one.signed != again.signed


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_delta_that_is_not_finite_or_too_long(value: float) -> None:
    """The square of 1e30 is beyond float32: so would sums be."""
    with pytest.raises(ValueError, match="not finite"):
        prepare(torch.tensor([1.0, value]), CODECS["fp32"], identity("a"), run=RUN, round=1, previous=RUN)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sender": peer("b")}, "somebody else"),
        ({"run": hash_of("other")}, "another round"),
        ({"round": 5}, "another round"),
        ({"previous": hash_of("other")}, "another round"),
        ({"codec": "fp16"}, "as 'fp32'"),
        ({"grid": PartGrid(SIZE + 1)}, "2500 values"),
    ],
)
def test_a_manifest_for_something_else(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(RecordError, match=why):
        opened(make_outgoing().signed, **changes)


class _AnyManifest(Record):
    """What somebody may sign who does not care for the schema."""

    fields: dict[str, Any]

    def canonical(self) -> bytes:
        return json.dumps(self.fields, sort_keys=True).encode()


def signed_fields(**changes: Any) -> bytes:
    fields = {**make_outgoing().manifest.model_dump(mode="json"), **changes}
    return sign(_AnyManifest(fields=fields), identity("a")).to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "statement"},
        {"squared_norms": [1.0, 1.0]},
        {"squared_norms": [1.0, 1.0, 1.0, 1.0]},
        {"squared_norms": [1.0, 1.0, -1.0]},
        {"squared_norms": [1.0, 1.0, math.nan]},
        {"squared_norms": [1.0, 1.0, math.inf]},
        {"squared_norms": [1e308, 1e308, 1e308]},
        {"squared_norms": [10**400, 1.0, 1.0]},
        {"squared_norms": ["1", 1.0, 1.0]},
        {"squared_norms": [1.0] * 5000},
        {"hashes": "nonsense!"},
        {"hashes": join_hashes(bytes(64))},
        {"hashes": join_hashes(bytes(95))},
        {"hashes": join_hashes(bytes(128))},
        {"hashes": "A" * 400_000},
        {"num_values": 2**33},
        {"num_values": 0},
        {"round": 0},
        {"codec": "x" * 17},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_with_a_wrong_field(changes: dict[str, Any]) -> None:
    assert opened(signed_fields()) == make_outgoing().manifest
    with pytest.raises(RecordError):
        opened(signed_fields(**changes))


def test_a_manifest_that_is_too_large_is_not_parsed() -> None:
    with pytest.raises(RecordError, match="at most"):
        opened(b" " * (MAX_SIGNED_BYTES + 1))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(RecordError):
        opened(data)


def test_a_changed_byte_breaks_the_signature() -> None:
    signed = make_outgoing().signed
    with pytest.raises(RecordError, match="signature"):
        opened(signed.replace(b'\\"round\\":4', b'\\"round\\":5'))


# Statements.


def make_report(name: str, **changes: Any) -> SenderReport:
    values: dict[str, Any] = {
        "peer": peer(name),
        "manifest": hash_of(name),
        "declared": 1.0,
        "is_planned": True,
        "norm": 2.0,
        "num_parts": 2,
        "weight": 1.0,
    }
    return SenderReport.model_validate({**values, **changes})


def make_statement(**changes: Any) -> Statement:
    values: dict[str, Any] = {
        "run": RUN,
        "group": GROUP,
        "round": 4,
        "previous": PREVIOUS,
        "first_part": 3,
        "senders": [make_report("a"), make_report("b")],
        "results": join_hashes(bytes(64)),
    }
    return Statement.model_validate({**values, **changes})


def opened_statement(statement: Statement, author: str = "a") -> Statement:
    signed = sign(statement, identity(author)).to_bytes()
    return open_statement(
        signed, reducer=peer("a"), run=RUN, group=GROUP, round=4, previous=PREVIOUS, parts=PARTS
    )


def test_a_statement_comes_back_as_it_was() -> None:
    figures = (1.0, None, None, -0.0)
    statement = make_statement(figures=figures, told=join_hashes(bytes(32)))
    assert opened_statement(statement) == statement
    assert opened_statement(statement).digest == statement.digest


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"run": hash_of("other")}, "another group"),
        ({"group": hash_of("other")}, "another group"),
        ({"round": 5}, "another round"),
        ({"previous": RUN}, "another round"),
        ({"residuals_before": join_hashes(bytes(32))}, "error feedback of each"),
        ({"residuals_after": join_hashes(bytes(96))}, "error feedback of each"),
        ({"first_part": 2}, "not about parts 3 to 5"),
        ({"results": join_hashes(bytes(32))}, "not about parts"),
        ({"results": join_hashes(bytes(96))}, "not about parts"),
        ({"results": "nonsense!"}, "base64"),
        ({"results": join_hashes(bytes(63))}, "cut short"),
        ({"told": "!!!"}, "base64"),
        ({"told": join_hashes(bytes(33))}, "cut short"),
        ({"figures": (1.0, 2.0)}, "square matrix"),
        ({"senders": [make_report("a", num_parts=3)]}, "more parts than there are"),
        ({"senders": [make_report("a", weight=0.0)]}, "left out"),
        ({"senders": [make_report("a", manifest=None, num_parts=0)]}, "without a manifest"),
    ],
)
def test_a_statement_that_does_not_fit(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(RecordError, match=why):
        opened_statement(make_statement(**changes))


def test_a_statement_of_another_reducer() -> None:
    with pytest.raises(RecordError, match="another reducer"):
        opened_statement(make_statement(), author="b")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(senders=[]),
        lambda s: s.update(senders=s["senders"] * 600),
        lambda s: s.update(first_part=-1),
        lambda s: s.update(figures=[1.0] * (128 * 128 + 1)),
        lambda s: s.update(figures=[math.inf]),
        lambda s: s["senders"][0].update(weight=-1.0),
        lambda s: s["senders"][0].update(weight=math.nan),
        lambda s: s["senders"][0].update(factor=1.5),
        lambda s: s["senders"][0].update(norm=-1.0),
        lambda s: s["senders"][0].update(reason="x" * 201),
        lambda s: s["senders"][0].update(peer="nobody"),
        lambda s: s["senders"][0].update(num_parts=-1),
    ],
)
def test_a_statement_with_a_wrong_field(change: Callable[[dict[str, Any]], Any]) -> None:
    fields = make_statement().model_dump(mode="json")
    assert parse_record(fields, Statement) == make_statement()
    change(fields)
    with pytest.raises(RecordError):
        parse_record(fields, Statement)


# Figures, hashes, norms.


def test_figures_there_and_back() -> None:
    """What is not known travels as null; the rest bit for bit."""
    figures = np.array([[0.1 + 0.2, math.nan], [math.inf, -1e-300]])
    told = figures_to_json(figures)
    assert told == (0.30000000000000004, None, None, -1e-300)
    statement = make_statement(figures=json.loads(json.dumps(told)))
    back = figures_of(statement)
    assert back is not None
    assert np.array_equal(back, [[0.1 + 0.2, math.nan], [math.nan, -1e-300]], equal_nan=True)
    assert figures_of(make_statement()) is None
    assert figures_to_json(None) == ()
    assert figures_hash(statement.figures) == figures_hash(told) != figures_hash(told[::-1])
    with pytest.raises(RecordError, match="square"):
        figures_of(make_statement(figures=(1.0, 2.0)))


def test_hashes_are_32_bytes_each() -> None:
    assert split_hashes("") == []
    assert split_hashes(join_hashes(bytes(range(64)))) == [bytes(range(32)), bytes(range(32, 64))]


@pytest.mark.parametrize("size", [1, 3, 65_536])
def test_squared_norms(size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    exact = float(values.double() @ values.double())
    assert squared_norm(values) == pytest.approx(exact, rel=1e-5)
    for value in (math.nan, math.inf, -math.inf):
        values[size // 2] = value
        assert not math.isfinite(squared_norm(values))


def test_norms_agree_to_a_thousandth() -> None:
    assert norms_agree(1.0, 1.0009)
    assert not norms_agree(1.0, 1.0012)
    assert norms_agree(0.0, 0.0)
    assert not norms_agree(0.0, 1e-20)
