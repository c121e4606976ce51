"""Does a credential let in exactly its peer, for its time, into its run, as long as it is not revoked?"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.credentials import (
    INVITE_PREFIX,
    MAX_CREDENTIAL_BYTES,
    CredentialError,
    Invite,
    RevokedError,
    _checksum,
    check_credential,
    instant_text,
    make_invite,
    make_revocations,
    open_revocations,
    parse_credential,
    parse_invite,
)
from coordinator.errors import AccessError
from coordinator.records import (
    MAX_RECORD_BYTES,
    MAX_REVOKED,
    Credential,
    PeerRecord,
    RecordError,
    open_signed,
    sign,
)
from tests.fakes import NOW, hash_of, identity, make_spec, peer
from tests.private_runs import DAY, ORGANIZER, bad_credentials, credential, invite, private_spec, revocations

RUN = private_spec().digest
ADDRESS = "/ip4/203.0.113.5/tcp/4001/p2p/" + peer("a")


def check(shown: Credential | None, peer_id: str, *, revoked: Any = (), now: float = NOW) -> None:
    check_credential(shown, peer_id, run=RUN, organizer=ORGANIZER.peer_id, revoked=revoked, now=now)


def test_the_digest_of_a_spec_binds_the_organizer_and_that_of_a_public_run_is_as_it_was() -> None:
    assert private_spec().digest != make_spec().digest
    assert private_spec().digest != make_spec(organizer=peer("mallory")).digest
    assert b"organizer" not in make_spec().canonical()


@pytest.mark.parametrize("for_peer", [False, True])
def test_a_good_credential_is_good_until_it_expires(for_peer: bool) -> None:
    good = credential(RUN, peer("a"), now=NOW, for_peer=for_peer)
    check(good, peer("a"))
    check(good, peer("a"), now=NOW + DAY - 0.001)
    with pytest.raises(CredentialError, match="expired, at 1970-01-13 13:46 UTC"):  # 1,000,000 s + a day
        check(good, peer("a"), now=NOW + DAY)


@pytest.mark.parametrize("kind", bad_credentials(RUN, peer("outsider"), now=NOW))
def test_a_bad_one_is_refused_and_the_reason_said(kind: str) -> None:
    shown, why = bad_credentials(RUN, peer("outsider"), now=NOW)[kind]
    with pytest.raises(CredentialError, match=why):
        check(shown, peer("outsider"))


def test_one_invite_lets_in_many_and_all_of_them_go_with_it() -> None:
    made = invite(RUN, expires_at=NOW + DAY)
    shown = {name: made.credential_for(peer(name), NOW) for name in "abc"}
    for name, one in shown.items():
        check(one, peer(name))
        with pytest.raises(RevokedError):
            check(one, peer(name), revoked={made.certificate.key})
    with pytest.raises(RevokedError):
        check(shown["a"], peer("a"), revoked={peer("a")})
    check(shown["b"], peer("b"), revoked={peer("a")})


def test_a_holder_cannot_pass_on_what_was_made_for_one_peer() -> None:
    made = invite(RUN, expires_at=NOW + DAY, for_peer=peer("a"))
    assert (made.secret, made.for_peer) == ("", peer("a"))
    with pytest.raises(AccessError, match="another peer's; ask the organizer"):
        made.credential_for(peer("b"), NOW)


def test_what_invited_peers_show_fits_beside_a_heartbeat() -> None:
    shown = credential(RUN, peer("a"), now=NOW)
    assert len(shown.canonical()) < 600 < MAX_CREDENTIAL_BYTES
    values = {
        "run": RUN,
        "phase": "ready",
        "round": 1,
        "state_hash": hash_of("s"),
        "commit": hash_of("c"),
        "addresses": ["/ip4/203.0.113.5/tcp/4001/p2p/" + "x" * 200] * 8,
        "issued_at": NOW,
        "expires_at": NOW + 10,
        "credential": shown,
    }
    data = sign(PeerRecord.model_validate(values), identity("a")).to_bytes()
    assert len(data) <= MAX_RECORD_BYTES
    assert open_signed(data, PeerRecord)[1].credential == shown


# ---- the string -----------------------------------------------------------------------------------


@pytest.mark.parametrize("for_peer", [None, peer("a")])
def test_a_string_is_one_word_and_comes_back_as_it_was(for_peer: str | None) -> None:
    made = make_invite(
        ORGANIZER, RUN, (ADDRESS,) * 3, expires_at=NOW + DAY, for_peer=for_peer, name="Station 3, Zürich"
    )
    text = made.to_text()
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    assert len(text) < 1400
    assert parse_invite(f"  {text}\n") == made
    check(parse_invite(text).credential_for(peer("a"), NOW), peer("a"))


def test_a_string_that_was_cut_or_mistyped_says_so() -> None:
    text = invite(RUN, expires_at=NOW + DAY, entry=(ADDRESS,)).to_text()
    for bad, why in {
        text[:-1]: "cut off",
        text[: len(text) // 2]: "cut off",
        text.replace("A", "B"): "cut off or mistyped",
        text.replace(INVITE_PREFIX, "cold-invite-9."): "not an invite",
        "": "not an invite",
        ADDRESS: "not an invite",
        "x" * 9000: "at most 8192 characters, this has 9000",
    }.items():
        with pytest.raises(AccessError, match=why):
            parse_invite(bad)


def test_a_string_that_somebody_changed_is_forged() -> None:
    made = invite(RUN, expires_at=NOW + DAY, entry=(ADDRESS,))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"certificate": {"expires_at": NOW + 400 * DAY}}, "forged"),
        ({"organizer": peer("mallory")}, "forged"),
        ({"certificate": {"role": "peer"}}, "the key is missing, or is one too many"),
        ({"secret": ""}, "the key is missing, or is one too many"),
        ({"secret": base64.b64encode(b"k" * 32).decode()}, "its key is not the certified one"),
        ({"secret": base64.b64encode(b"k" * 31).decode()}, "malformed"),
        ({"secret": "?"}, "malformed"),
        ({"run": hash_of("another")}, "its certificate is of another run"),
        ({"entry_points": ["/ip4/1.2.3.4/tcp/1"] * 9}, "malformed"),
        ({"more": 1}, "malformed"),
    ]
    for change, why in changes:
        with pytest.raises(AccessError, match=why):
            parse_invite(changed_text(made, change))


def changed_text(made: Invite, change: dict[str, Any]) -> str:
    """With a checksum that fits."""
    body = made.to_text().removeprefix(INVITE_PREFIX).rpartition(".")[0]
    values = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    text = base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")
    return f"{INVITE_PREFIX}{text}.{_checksum(text)}"


@given(st.integers(0, 10_000), st.characters())
def test_no_single_changed_character_gives_a_valid_string(index: int, character: str) -> None:
    text = TEXT
    index %= len(text)
    mistyped = text[:index] + character + text[index + 1 :]
    if mistyped.strip() != text:
        with pytest.raises(AccessError):
            parse_invite(mistyped)


TEXT = invite(RUN, expires_at=NOW + DAY, entry=(ADDRESS,)).to_text()


# ---- revocations ----------------------------------------------------------------------------------


def test_a_list_grows_by_versions_and_is_the_organizers() -> None:
    first = revocations(RUN, {peer("a")})
    second = revocations(RUN, {peer("a"), peer("b")}, before=first)
    opened = open_revocations(second.to_bytes(), run=RUN, organizer=ORGANIZER.peer_id)
    assert (opened.version, opened.keys) == (2, [peer("a"), peer("b")])
    with pytest.raises(RecordError, match="not the organizer's"):
        open_revocations(
            make_revocations(identity("mallory"), RUN, {peer("a")}, None).to_bytes(),
            run=RUN,
            organizer=ORGANIZER.peer_id,
        )
    with pytest.raises(RecordError, match="another run"):
        open_revocations(first.to_bytes(), run=hash_of("another"), organizer=ORGANIZER.peer_id)


def test_the_longest_list_fits_into_one_record_of_the_dht() -> None:
    names = {peer(f"revoked {index}") for index in range(MAX_REVOKED)}
    full = revocations(RUN, names)
    assert len(full.to_bytes()) <= MAX_RECORD_BYTES
    assert len(open_revocations(full.to_bytes(), run=RUN, organizer=ORGANIZER.peer_id).keys) == 128
    with pytest.raises(AccessError, match="at most 128 keys"):
        revocations(RUN, {peer("one more")}, before=full)


def test_what_another_peer_shows_is_bounded() -> None:
    assert parse_credential(None) is None
    good = credential(RUN, peer("a"), now=NOW).model_dump(mode="json")
    assert parse_credential(good) == Credential.model_validate(good)
    with pytest.raises(RecordError, match="too large"):
        parse_credential({**good, "signature": "A" * MAX_CREDENTIAL_BYTES})
    bad_ones: list[object] = [1, "x", [], {}, {**good, "more": 1}, {**good, "certificate": None}]
    for bad in bad_ones:
        with pytest.raises(RecordError):
            parse_credential(bad)


def test_an_instant_beyond_the_calendar_is_only_said_so() -> None:
    assert instant_text(1e300) == "an instant beyond the calendar"
