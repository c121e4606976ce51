"""Whom does a peer of a private run let in, what does it remember, and what does it tell a stranger?"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgpack
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord

from coordinator import admission as admission_module
from coordinator.admission import (
    CREDENTIAL_NAME,
    MAX_PRESENTED_BYTES,
    NOT_ADMITTED,
    REVOCATIONS_NAME,
    Admission,
    NotAdmittedError,
    admission_of,
    check_own,
)
from coordinator.board import BoardValidator, board_key, revocations_key
from coordinator.chain import Chain
from coordinator.credentials import CredentialError, make_revocations
from coordinator.errors import AccessError, StateError
from coordinator.identity import load_identity
from coordinator.membership import Membership
from coordinator.records import Credential, RecordError, sign
from tests.fakes import NOW, Clock, hash_of, identity, make_heartbeat, make_spec, peer
from tests.private_runs import (
    DAY,
    ORGANIZER,
    admission,
    bad_credentials,
    credential,
    invite,
    private_spec,
    revocations,
)

SPEC = private_spec()
RUN = SPEC.digest


def entry(value: bytes, *, owner: str, key: str) -> DHTRecord:
    """As it lies in the DHT, for five seconds more."""
    source = DHTID.generate(source=key).to_bytes()
    return DHTRecord(source, msgpack.packb(owner), msgpack.packb(value), NOW + 5.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def member(clock: Clock) -> Admission:
    return admission(RUN, peer("me"), now=clock)


def shown(name: str, **options: bool) -> Credential:
    return credential(RUN, peer(name), now=NOW, **options)


def test_two_members_let_each_other_in(member: Admission, clock: Clock) -> None:
    other = admission(RUN, peer("a"), now=clock)
    other.take(peer("me"), member.answer(peer("a"), other.presented()))
    assert member.is_admitted(peer("a"))
    assert other.is_admitted(peer("me"))
    clock.now += DAY
    assert not member.is_admitted(peer("a"))
    with pytest.raises(NotAdmittedError, match=f"{NOT_ADMITTED}: your credential has expired"):
        member.require(peer("a"))


@pytest.mark.parametrize("kind", bad_credentials(RUN, peer("outsider"), now=NOW))
def test_an_outsider_learns_why_and_nothing_else(
    member: Admission, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    value, why = bad_credentials(RUN, peer("outsider"), now=NOW)[kind]
    said = {"credential": value and value.model_dump(mode="json"), "revocations": None}
    with caplog.at_level(logging.WARNING):
        answers = {member.answer(peer("outsider"), json.dumps(said).encode()) for _ in range(20)}
    answer = json.loads(answers.pop())
    assert not answers
    assert set(answer) == {"refused", "revocations"}
    assert why in answer["refused"]
    assert answer["revocations"] is None
    assert not member.is_admitted(peer("outsider"))
    assert len(caplog.records) == 1  # one line, not twenty
    assert why in caplog.text


def test_the_log_tells_of_a_peer_once_a_minute(
    member: Admission, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with pytest.raises(NotAdmittedError):
            member.require(peer("outsider"))
    clock.now += 61.0
    with pytest.raises(NotAdmittedError):
        member.require(peer("outsider"))
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [f"refused peer {peer('outsider')[-8:]}: it has shown no credential"] * 2


@pytest.mark.parametrize(
    "said",
    [b"", b"[]", b"{}", b"\xff", b'{"credential": null}', b'{"revocations": null, "more": 1}', b"x" * 20_000],
)
def test_what_is_no_greeting_is_refused(member: Admission, said: bytes) -> None:
    assert "refused" in json.loads(member.answer(peer("outsider"), said))
    with pytest.raises(RecordError):
        member.take(peer("outsider"), said)


def test_what_two_members_say_is_bounded(member: Admission) -> None:
    member.learn(revocations(RUN, {peer(f"revoked {index}") for index in range(128)}).to_bytes())
    assert len(member.presented()) <= MAX_PRESENTED_BYTES


def test_as_many_peers_are_remembered_as_there_is_room(
    member: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "MAX_ADMITTED", 2)
    for name in "abc":
        member.admit(peer(name), shown(name))
    assert [member.is_admitted(peer(name)) for name in "abc"] == [False, True, True]


# ---- revocations ----------------------------------------------------------------------------------


def test_a_revoked_peer_is_out_at_once_and_sees_that_it_was_the_organizer(
    member: Admission, clock: Clock
) -> None:
    out: list[frozenset[str]] = []
    member.on_revoked(out.append)
    revoked = admission(RUN, peer("a"), now=clock)
    member.admit(peer("a"), revoked.credential)
    member.admit(peer("b"), shown("b"))
    assert member.learn(revocations(RUN, {peer("a")}).to_bytes())
    assert [member.is_admitted(peer(name)) for name in "ab"] == [False, True]
    assert out == [frozenset({peer("a")})]
    assert revoked.problem() is None
    with pytest.raises(CredentialError, match="it refuses me: the organizer has revoked it"):
        revoked.take(peer("me"), member.answer(peer("a"), revoked.presented()))
    assert revoked.problem() == "the organizer has revoked it"
    with pytest.raises(AccessError, match="revoked it; ask the organizer for a new invite"):
        check_own(revoked)


def test_who_came_in_by_a_revoked_invite_is_out(member: Admission) -> None:
    made = invite(RUN, expires_at=NOW + DAY)
    out: list[frozenset[str]] = []
    member.on_revoked(out.append)
    for name in "ab":
        member.admit(peer(name), made.credential_for(peer(name), NOW))
    member.admit(peer("c"), shown("c"))
    member.learn(revocations(RUN, {made.certificate.key}).to_bytes())
    assert [member.is_admitted(peer(name)) for name in "abc"] == [False, False, True]
    assert out[0] >= {peer("a"), peer("b")}
    assert peer("c") not in out[0]


def test_the_highest_version_counts_and_only_the_organizers(member: Admission) -> None:
    first = revocations(RUN, {peer("a")})
    second = revocations(RUN, {peer("b")}, before=first)
    assert member.learn(second.to_bytes())
    assert not member.learn(first.to_bytes())
    assert not member.learn(second.to_bytes())
    assert member.revoked == {peer("a"), peer("b")}
    for forged in (
        make_revocations(identity("mallory"), RUN, {peer("c")}, member.revocations),
        make_revocations(ORGANIZER, hash_of("another"), {peer("c")}, member.revocations),
    ):
        with pytest.raises(RecordError):
            member.learn(forged.to_bytes())
    assert peer("c") not in member.revoked


def test_members_tell_each_other_when_they_meet(member: Admission, clock: Clock) -> None:
    other = admission(RUN, peer("a"), now=clock)
    member.learn(revocations(RUN, {peer("b")}).to_bytes())
    other.take(peer("me"), member.answer(peer("a"), other.presented()))
    assert other.revoked == {peer("b")}


def test_a_restart_forgets_nobody(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / REVOCATIONS_NAME
    admission(RUN, peer("me"), now=clock, file=file).learn(revocations(RUN, {peer("a")}).to_bytes())
    assert file.stat().st_mode & 0o777 == 0o600
    again = admission(RUN, peer("me"), now=clock, file=file)
    assert again.version == 1
    assert again.revoked == {peer("a")}
    with pytest.raises(CredentialError, match="revoked"):
        again.admit(peer("a"), shown("a"))
    file.write_text("x")
    with pytest.raises(StateError, match="cannot read the revocations"):
        admission(RUN, peer("me"), now=clock, file=file)


# ---- membership and the board ---------------------------------------------------------------------


def test_membership_holds_only_those_with_a_credential(member: Admission) -> None:
    chain = Chain(SPEC)
    membership = Membership(SPEC, peer("me"), member)
    record = make_heartbeat(chain, credential=shown("a"))
    assert membership.observe(sign(record, identity("a")).to_bytes(), now=NOW) is not None
    assert member.is_admitted(peer("a"))  # it need not present itself any more
    for value, _ in bad_credentials(RUN, peer("outsider"), now=NOW).values():
        record = make_heartbeat(chain, credential=value)
        assert membership.observe(sign(record, identity("outsider")).to_bytes(), now=NOW) is None
    assert [m.peer_id for m in membership.live(NOW)] == [peer("a")]


@pytest.mark.parametrize("kind", [*bad_credentials(RUN, peer("outsider"), now=NOW), "good"])
def test_the_board_takes_no_heartbeat_without_a_credential(member: Admission, kind: str) -> None:
    good = {"good": (shown("outsider"), "")}
    value, _ = {**bad_credentials(RUN, peer("outsider"), now=NOW), **good}[kind]
    record = make_heartbeat(Chain(SPEC), credential=value)
    stored = entry(sign(record, identity("outsider")).to_bytes(), owner=peer("outsider"), key=board_key(RUN))
    assert BoardValidator(RUN, lambda: NOW, member).validate(stored) == (kind == "good")


def test_the_board_forgets_what_was_good_before_a_revocation(member: Admission) -> None:
    validator = BoardValidator(RUN, lambda: NOW, member)
    record = make_heartbeat(Chain(SPEC), credential=shown("a"))
    stored = entry(sign(record, identity("a")).to_bytes(), owner=peer("a"), key=board_key(RUN))
    assert validator.validate(stored)
    member.learn(revocations(RUN, {peer("a")}).to_bytes())
    assert not validator.validate(stored)


def test_the_board_takes_the_organizers_lists_of_a_private_run_only(member: Admission) -> None:
    first = revocations(RUN, {peer("a")})
    forged = make_revocations(identity("mallory"), RUN, {peer("a")}, None)
    validator, key = BoardValidator(RUN, lambda: NOW, member), revocations_key(RUN)
    assert validator.validate(entry(first.to_bytes(), owner="1", key=key))
    assert not validator.validate(entry(first.to_bytes(), owner="2", key=key))  # not under its version
    assert not validator.validate(entry(forged.to_bytes(), owner="1", key=key))
    assert not validator.validate(entry(b"x" * 20_000, owner="1", key=key))
    assert not BoardValidator(RUN, lambda: NOW).validate(entry(first.to_bytes(), owner="1", key=key))


# ---- where an Admission comes from ----------------------------------------------------------------


def test_a_public_run_has_none(tmp_path: Path) -> None:
    me = load_identity(tmp_path / "me.key")
    assert admission_of(make_spec(), None, me, tmp_path) is None
    assert admission_of(None, None, me, tmp_path) is None
    assert not (tmp_path / CREDENTIAL_NAME).exists()


def test_who_came_by_an_invite_comes_back_without_it(tmp_path: Path) -> None:
    me = load_identity(tmp_path / "me.key")
    made = invite(RUN, expires_at=2e9)
    first = admission_of(None, made, me, tmp_path)
    again = admission_of(SPEC, None, me, tmp_path)
    assert first is not None
    assert again is not None
    assert again.credential == first.credential
    assert (again.run, again.organizer) == (RUN, ORGANIZER.peer_id)
    other = load_identity(tmp_path / "other.key")
    with pytest.raises(AccessError, match="another peer's"):
        admission_of(SPEC, None, other, tmp_path)


def test_looking_writes_nothing_and_finds_the_same(tmp_path: Path) -> None:
    me, out = load_identity(tmp_path / "me.key"), tmp_path / "out"
    made = invite(RUN, expires_at=2e9)
    assert admission_of(None, made, me, out, keeps=False) is not None
    assert not out.exists()
    kept = admission_of(None, made, me, out)
    looked = admission_of(SPEC, None, me, out, keeps=False)
    assert kept is not None
    assert looked is not None
    assert looked.credential == kept.credential
    assert looked.learn(revocations(RUN, {peer("gone")}).to_bytes())
    assert looked.version == 1
    assert sorted(path.name for path in out.iterdir()) == [CREDENTIAL_NAME]
    with pytest.raises(AccessError, match="the run test is private"):
        admission_of(SPEC, None, me, tmp_path / "elsewhere", keeps=False)
    assert admission_of(make_spec(), None, me, out, keeps=False) is None


def test_without_an_invite_a_private_run_says_what_to_do(tmp_path: Path) -> None:
    me = load_identity(tmp_path / "me.key")
    with pytest.raises(AccessError, match="the run test is private: join with --invite STRING"):
        admission_of(SPEC, None, me, tmp_path)
    assert AccessError.exit_code == 7


def test_an_invite_that_has_ended_or_is_of_another_run_says_so(tmp_path: Path) -> None:
    me = load_identity(tmp_path / "me.key")
    with pytest.raises(AccessError, match="has expired, at 1970-01-12 13:46 UTC; ask the organizer"):
        admission_of(None, invite(RUN, expires_at=NOW), me, tmp_path)
    with pytest.raises(AccessError, match="the invite is for the run"):
        admission_of(make_spec(), invite(RUN, expires_at=2e9), me, tmp_path)


def test_the_organizers_own_peer_lets_itself_in(tmp_path: Path) -> None:
    key = tmp_path / "organizer.key"
    spec = private_spec(organizer=load_identity(key).peer_id)
    me = load_identity(tmp_path / "me.key")
    own = admission_of(spec, None, me, tmp_path, key)
    assert own is not None
    own.admit(me.peer_id, own.credential)  # by the check that all peers make
    with pytest.raises(AccessError):
        admission_of(private_spec(), None, me, tmp_path / "elsewhere", key)  # another organizer's run


def test_a_credential_that_ends_soon_is_told_before_it_has(member: Admission, clock: Clock) -> None:
    clock.now = NOW + DAY - 10.0
    assert member.problem() is None
    assert member.problem(within_seconds=30.0) == "it ends at 1970-01-13 13:46 UTC"
    with pytest.raises(AccessError, match="the checkpoint is kept"):
        check_own(member, within_seconds=30.0)
