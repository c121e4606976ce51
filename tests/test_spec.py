"""Does a run spec say the same to all peers, and is a wrong key named?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import SpecError
from coordinator.spec import MAX_SPEC_BYTES, load_spec, parse_spec, validate_spec
from tests.fakes import hash_of, make_spec

FILE = {"sha256": hash_of("config"), "size_bytes": 6}


def test_toml_round_trip_keeps_the_digest() -> None:
    spec = make_spec(round_seconds=12.5, weights="examples", revision="v1")
    again = parse_spec(spec.to_toml(), source="the test")
    assert again == spec
    assert again.digest == spec.digest == hashlib.sha256(spec.canonical()).hexdigest()


def test_canonical_form_is_pinned() -> None:
    """Every release must give this digest to this spec: it names the run."""
    assert make_spec().digest == "6f8b8e44f1ed9202a2a422eb2e72ad39ee23ee4f2002fb2777033e6fde443e93"


@pytest.mark.parametrize(
    "change",
    [{"num_rounds": 6}, {"seed": 1}, {"compression": "fp16"}, {"created_at": 5.0}, {"revision": "x"}],
)
def test_any_change_gives_another_digest(change: dict[str, Any]) -> None:
    assert make_spec(**change).digest != make_spec().digest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_round": 3}, "unknown key 'num_round'"),
        ({"num_rounds": 0}, "key 'num_rounds'"),
        ({"num_rounds": "5"}, "key 'num_rounds'"),
        ({"num_rounds": True}, "key 'num_rounds'"),
        ({"aggregation": "krum"}, "key 'aggregation'"),
        ({"backbone_hash": "ab"}, "key 'backbone_hash'"),
        ({"created_at": 1e300}, "key 'created_at'"),  # no date: nothing could show it
        ({"created_at": 4.1e10}, "key 'created_at'"),
        ({"lease_seconds": float("nan")}, "key 'lease_seconds'"),
        ({"round_limit_seconds": float("inf")}, "key 'round_limit_seconds'"),
        ({"run_name": "../x"}, "key 'run_name'"),
        ({"format": 1}, "key 'format'"),
        ({"gate": "on"}, "key 'gate'"),
        ({"gate_level": 0.0}, "key 'gate_level'"),
        ({"gate_share": 0.49}, "key 'gate_share'"),  # a minority must not undo rounds
        ({"gate_share": 1.0}, "key 'gate_share'"),
        ({"gate_min_voters": 1}, "key 'gate_min_voters'"),  # nor a single voice
        ({"gate_vote_seconds": 0.0}, "key 'gate_vote_seconds'"),
        ({"gate_leaves_out": "everybody"}, "key 'gate_leaves_out'"),
        ({"gate_left_out_rounds": 0}, "key 'gate_left_out_rounds'"),
        ({"gate_max_rollbacks": 0}, "key 'gate_max_rollbacks'"),
        ({"round_examples": 10**400}, "key 'round_examples'"),
        ({"min_peers": 9, "max_peers": 8}, "min_peers (9) is larger than max_peers (8)"),
        ({"outer_optimizer": "adam"}, "outer_lr 1 is too large for adam"),
        ({"round_examples": None}, "set round_examples or round_seconds"),
        ({"round_seconds": 2000.0}, "round_seconds is longer than round_limit_seconds"),
        ({"files": {"tokenizer.json": FILE}}, "config.json is missing"),
        ({"files": {"config.json": {**FILE, "sha256": "x"}}}, "key 'files.config.json.sha256'"),
    ],
)
def test_wrong_keys_are_named(change: dict[str, Any], named: str) -> None:
    values = {**make_spec().model_dump(mode="json"), **change}
    with pytest.raises(SpecError) as caught:
        validate_spec(values, source="run.toml")
    assert str(caught.value).startswith("run.toml: the run spec is not valid: ")
    assert named in str(caught.value)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(SpecError) as caught:
        validate_spec({}, source="run.toml")
    for key in ("run_name", "model", "backbone_hash", "files", "num_rounds"):
        assert f"key '{key}' is missing" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("../config.json", "/etc/x.json", "a/b.json", "a.json/", "./a.json", ".hidden.json", "..json"),
        *(
            "model.py",
            "pytorch_model.bin",
            "weights.pkl",
            "a\\b.json",
            "a\0.json",
            "a\n.json",
            "a" * 200 + ".json",
        ),
    ],
)
def test_only_plain_data_files_are_taken(name: str) -> None:
    with pytest.raises(SpecError, match="plain name"):
        validate_spec(
            {**make_spec().model_dump(mode="json"), "files": {"config.json": FILE, name: FILE}}, source="x"
        )


@pytest.mark.parametrize(
    "text",
    ["", "not toml", b"\xff\xfe", "a = " + "[" * 60_000, "a = " + "9" * 5000, "a = 1\na = 2"],
    ids=["empty", "no toml", "undecodable", "deeply nested", "huge number", "twice"],
)
def test_a_strangers_text_gives_a_named_error(text: str | bytes) -> None:
    with pytest.raises(SpecError, match="the entry point"):
        parse_spec(text, source="the entry point")


def test_too_long_a_spec_is_not_parsed() -> None:
    with pytest.raises(SpecError, match=f"at most {MAX_SPEC_BYTES} bytes"):
        parse_spec(b" " * (MAX_SPEC_BYTES + 1), source="x")


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes_give_a_spec_error(text: str | bytes) -> None:
    with pytest.raises(SpecError):
        parse_spec(text, source="x")


def test_load_spec(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(make_spec().to_toml())
    assert load_spec(tmp_path / "run.toml") == make_spec()
    with pytest.raises(SpecError, match=r"missing\.toml: cannot read the run spec: No such file"):
        load_spec(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("weights", "num_examples", "expected"),
    [
        ("uniform", 0, 1.0),
        ("uniform", 10**9, 1.0),
        ("examples", 50, 0.5),
        ("examples", 100, 1.0),
        ("examples", 10**9, 4.0),  # the cap
        ("examples", 0, 0.01),  # as one example: a weight of zero would make the round impossible
        ("examples", 2**53, 4.0),
    ],
)
def test_contribution_weight(weights: str, num_examples: int, expected: float) -> None:
    assert make_spec(weights=weights, max_weight=4.0).contribution_weight(num_examples) == expected


def test_contribution_weight_without_a_budget_of_examples_counts_thousands() -> None:
    spec = make_spec(weights="examples", round_examples=None, round_seconds=60.0)
    assert spec.contribution_weight(1500) == 1.5
