"""Is the peer id of a key file the one that the transport authenticates, and does a signature prove it?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hivemind.p2p import PeerID
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import StateError
from coordinator.identity import is_signed_by, load_identity
from tests.fakes import CALL_SECONDS, identity, running_networks


def test_peer_id_is_the_one_of_the_running_p2p(tmp_path: Path) -> None:
    with running_networks(1, tmp_path) as [network]:
        assert str(network.p2p.peer_id) == load_identity(tmp_path / "0.key").peer_id == network.peer_id
        [address, *_] = network.run(network.addresses(), timeout_seconds=CALL_SECONDS)
        assert address.endswith(f"/p2p/{network.peer_id}")


def test_a_new_identity_is_private_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "identity.key"
    first = load_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["identity.key"]
    assert load_identity(path).peer_id == first.peer_id
    assert load_identity(tmp_path / "other.key").peer_id != first.peer_id
    assert str(PeerID.from_base58(first.peer_id)) == first.peer_id


@pytest.mark.parametrize("content", [b"", b"x" * 68, b"\x08\x00\x12\x40" + b"x" * 64])
def test_a_file_that_is_no_identity_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StateError, match="not an Ed25519 identity file"):
        load_identity(path)


def test_an_identity_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_identity(path)
    path.chmod(0o640)
    with pytest.raises(StateError, match="chmod 600"):
        load_identity(path)


def test_an_unusable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="identity"):
        load_identity(tmp_path / "file" / "identity.key")


def test_signatures() -> None:
    alice, bob = identity("alice"), identity("bob")
    signature = alice.sign(b"data")
    assert is_signed_by(alice.peer_id, b"data", signature)
    assert not is_signed_by(alice.peer_id, b"Data", signature)
    assert not is_signed_by(bob.peer_id, b"data", signature)
    assert not is_signed_by(alice.peer_id, b"data", signature[:-1])
    assert not is_signed_by(alice.peer_id, b"data", bytes(64))


@pytest.mark.parametrize("change", ["{} ", " {}", "{}\n", "1{}", "{}" + " " * 12 + "anything"])
def test_a_key_has_one_name_only(change: str) -> None:
    """base58 forgives spaces at the end; a peer with many names could be counted many times."""
    alice = identity("alice")
    assert not is_signed_by(change.format(alice.peer_id), b"data", alice.sign(b"data"))


@given(st.text(max_size=80), st.binary(max_size=70))
def test_malformed_input_is_just_not_signed(peer_id: str, signature: bytes) -> None:
    assert not is_signed_by(peer_id, b"data", signature)
