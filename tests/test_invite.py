"""Does the command make invites that let in, keep its key safe, and say what is wrong, with the exit code?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.admission import REVOCATIONS_NAME, Admission
from coordinator.cli import Parser, add_invite_argument, with_invite
from coordinator.credentials import Invite, make_invite, open_revocations, parse_invite
from coordinator.errors import AccessError, StateError, UsageError
from coordinator.identity import load_identity
from coordinator.invite import main
from coordinator.network import Network
from coordinator.organizer import default_key_path, first_invite, load_organizer
from peer.doctor import parse as parse_doctor
from peer.join import _parse as parse_join
from peer.join import check_private, make_config
from peer.ledger import read_chain
from peer.ledger_file import LEDGER_NAME, Ledger
from tests.fakes import addresses, make_spec, network_config, peer
from tests.private_runs import DAY, invite, private_spec

ADDRESS = "/ip4/127.0.0.1/tcp/4001/p2p/" + peer("a")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a private run, with its organizer's key beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    organizer = load_identity(tmp_path / "organizer.key")
    (folder / "run.toml").write_text(private_spec(organizer=organizer.peer_id).to_toml())
    return folder


def command(run_dir: Path, *args: str) -> list[str]:
    return [*args, "--output-dir", str(run_dir), "--organizer-key", str(run_dir.parent / "organizer.key")]


def exit_code(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as ended:  # argparse
        return ended.code


def test_it_prints_one_string_that_lets_in(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(run_dir, "--initial-peers", ADDRESS, "--days", "2", "--name", "ward 3")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    made = parse_invite(out)
    now = Network.now()
    assert made.credential_for(peer("anybody"), now).vouching
    assert (made.entry_points, made.certificate.name) == ((ADDRESS,), "ward 3")
    assert now + 1.9 * DAY < made.certificate.expires_at < now + 2.1 * DAY
    assert made.secret not in err  # what a terminal shows beside the string is no secret
    assert made.certificate.key in err
    assert "a secret" in err
    assert main(["show", out.strip()]) == 0
    assert made.secret not in capsys.readouterr().out


def test_for_one_peer_it_is_no_secret(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["peer-id", "--identity-path", str(tmp_path / "mine" / "identity.key")]) == 0
    peer_id = capsys.readouterr().out.strip()
    assert peer_id == load_identity(tmp_path / "mine" / "identity.key").peer_id
    assert main(command(run_dir, "--initial-peers", ADDRESS, "--for-peer", peer_id)) == 0
    made = parse_invite(capsys.readouterr().out)
    assert (made.for_peer, made.secret) == (peer_id, "")
    with pytest.raises(AccessError):
        made.credential_for(peer("anybody"), Network.now())


def test_entry_points_are_those_that_the_directory_knows(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "/ip4/127.0.0.1/tcp/4002/p2p/" + peer("b")
    (run_dir / "entry_points.json").write_text(json.dumps([ADDRESS]))
    (run_dir / "known_peers.json").write_text(json.dumps([other, ADDRESS]))
    assert main(command(run_dir)) == 0
    assert parse_invite(capsys.readouterr().out).entry_points == (ADDRESS, other)


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ([], 2, "give --initial-peers ADDR"),
        (["surprise"], 2, "invalid choice"),
        (["make", "surprise"], 2, "make takes no 'surprise'"),
        (["revoke"], 2, "say what to revoke"),
        (["revoke", "me"], 2, "'me' is neither an invite nor an id"),
        (["--initial-peers", ADDRESS, "--for-peer", "me"], 2, "--for-peer me: a peer id begins with"),
        (["--initial-peers", ADDRESS, "--name", "x" * 41], 2, "--name has at most 40 characters"),
        (["--initial-peers", ADDRESS, "--name", "a\x1b[2J"], 2, "without control characters"),
        (["--initial-peers", ADDRESS, "--days", "0"], 2, "0 is not above 0"),
        (["--initial-peers", ADDRESS, "--days", "1e9"], 2, "--days 1e+09: that is after the year 3200"),
        (["peer-id"], 2, "give --identity-path"),
        (["show", "cold-invite-1.x"], 7, "cut off or mistyped"),
        (["revoke", invite("0" * 64, expires_at=1.0).to_text()], 7, "of another run"),
    ],
)
def test_what_is_wrong_is_said(
    run_dir: Path, arguments: list[str], code: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(command(run_dir, *arguments)) == code
    assert why in capsys.readouterr().err


def test_without_the_run_or_its_key_it_says_what_is_missing(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 2
    assert "give --output-dir DIR" in capsys.readouterr().err
    (tmp_path / "organizer.key").rename(tmp_path / "moved.key")
    assert main(command(run_dir)) == 7
    assert "there is no organizer's key" in capsys.readouterr().err
    load_identity(tmp_path / "organizer.key")
    assert main(command(run_dir)) == 7
    assert "is not the key of the run's organizer" in capsys.readouterr().err
    (run_dir / "run.toml").write_text(make_spec().to_toml())
    assert main(command(run_dir)) == 7
    assert "is public" in capsys.readouterr().err


def test_a_revocation_that_nobody_took_is_kept_and_said(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    organizer = load_identity(run_dir.parent / "organizer.key").peer_id
    run = private_spec(organizer=organizer).digest
    for number, name in enumerate("ab", start=1):
        assert main(command(run_dir, "revoke", peer(name))) == 5
        assert "nobody was told: run the command again" in capsys.readouterr().err
        kept = open_revocations((run_dir / REVOCATIONS_NAME).read_bytes(), run=run, organizer=organizer)
        assert (kept.version, len(kept.keys)) == (number, number)
    assert main(command(run_dir, "revoke", peer("a"))) == 5  # once more: no new version
    kept = open_revocations((run_dir / REVOCATIONS_NAME).read_bytes(), run=run, organizer=organizer)
    assert kept.version == 2


def test_a_revocation_is_in_the_ledger_of_its_directory(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told to a peer that runs in the same directory, and writes the same ledger meanwhile."""
    organizer = load_identity(run_dir.parent / "organizer.key")
    run, identity = private_spec(organizer=organizer.peer_id).digest, load_identity(run_dir / "identity.key")
    now = Network.now()
    own = make_invite(organizer, run, (), expires_at=now + DAY, for_peer=identity.peer_id)
    admission = Admission(
        run=run,
        organizer=organizer.peer_id,
        peer_id=identity.peer_id,
        credential=own.credential_for(identity.peer_id, now),
        file=None,
    )
    taken: list[str] = []

    async def take(_peer_id: str, body: Any) -> bytes:
        taken.append(body)
        return b"taken"

    config = network_config(run_dir / "identity.key", admission=admission)
    with Ledger(run_dir / LEDGER_NAME) as ledger, Network(config, ledger.sent) as network:
        network.on_call("spec", take)
        network.on_call("revocations", take)
        told = command(run_dir, "revoke", peer("a"), "--initial-peers", *addresses(network)[:1])
        assert main(told) == 0
    assert "told to 1 of 1" in capsys.readouterr().out
    assert len(taken) == 2
    lines = read_chain(run_dir / LEDGER_NAME).lines
    assert [line["kind"] for line in lines].count("end") == 2
    calls = {line["name"]: line for line in lines if line["kind"] == "call"}
    assert set(calls) == {"present", "spec", "revocations"}
    assert all(set(line["peers"]) == {identity.peer_id} for line in calls.values())
    message = json.dumps({"method": "revocations", "body": taken[1]}, separators=(",", ":")).encode()
    assert calls["revocations"]["sha256"] == hashlib.sha256(message).hexdigest()


# ---- the key --------------------------------------------------------------------------------------


def test_the_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "organizer.key"
    made = load_organizer(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert load_organizer(path).peer_id == made.peer_id
    path.chmod(0o644)
    with pytest.raises(StateError, match="readable by others"):
        load_organizer(path)


def test_the_key_is_not_written_where_it_would_not_be_safe(tmp_path: Path) -> None:
    repository = tmp_path / "project"
    (repository / ".git").mkdir(parents=True)
    with pytest.raises(StateError, match="not written into the git repository"):
        load_organizer(repository / "deep" / "in" / "organizer.key")
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(StateError, match="everybody may write to"):
        load_organizer(open_folder / "organizer.key")
    assert not list(tmp_path.rglob("*.key"))


def test_by_default_the_key_is_in_the_persons_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_key_path() == tmp_path / "cold-fusion" / "organizer.key"


def test_who_begins_a_private_run_gets_an_invite(tmp_path: Path) -> None:
    key = tmp_path / "organizer.key"
    spec = private_spec(organizer=load_identity(key).peer_id)
    text = first_invite(spec, key, [ADDRESS], tmp_path)
    assert text
    assert parse_invite(text).entry_points == (ADDRESS,)
    assert json.loads((tmp_path / "entry_points.json").read_text()) == [ADDRESS]
    assert first_invite(make_spec(), key, [ADDRESS], tmp_path) is None
    assert first_invite(private_spec(), key, [ADDRESS], tmp_path) == ""  # of another organizer
    assert first_invite(spec, tmp_path / "none.key", [ADDRESS], tmp_path) == ""


# ---- --invite of the other commands ---------------------------------------------------------------


@pytest.fixture
def made() -> Invite:
    return invite(private_spec().digest, expires_at=2e9, entry=(ADDRESS,))


def test_join_and_doctor_take_run_and_entry_points_from_it(made: Invite, tmp_path: Path) -> None:
    flags = ["--invite", made.to_text(), "--data", "x.csv", "--output-dir", str(tmp_path)]
    for parse in (parse_join, parse_doctor):
        config = make_config(parse(flags))
        assert (config.invite, config.run_digest) == (made, made.run)
        assert config.initial_peers == (ADDRESS,)
    other = ADDRESS.replace("4001", "4002")
    assert make_config(parse_join([*flags, "--initial-peers", other])).initial_peers == (other, ADDRESS)
    with pytest.raises(UsageError, match="is not the run of the invite"):
        parse_join([*flags, "--run", "0" * 64])


def test_an_open_run_is_not_taken_for_a_private_one(made: Invite, tmp_path: Path) -> None:
    flags = ["--data", "x.csv", "--output-dir", str(tmp_path), "--private"]
    with pytest.raises(UsageError, match="--private begins a run"):
        parse_join([*flags, "--invite", made.to_text()])
    (tmp_path / "run.toml").write_text(make_spec().to_toml())
    with pytest.raises(UsageError, match="holds a public run"):
        check_private(make_config(parse_join(flags)))
    (tmp_path / "run.toml").write_text(private_spec().to_toml())
    check_private(make_config(parse_join(flags)))


def test_any_command_can_take_it_and_from_a_file(made: Invite, tmp_path: Path) -> None:
    parser = Parser()
    add_invite_argument(parser)
    parser.add_argument("--run")
    parser.add_argument("--initial-peers", nargs="+", default=[])
    file = tmp_path / "invite.txt"
    file.write_text(made.to_text() + "\n")
    assert with_invite(parser.parse(["--invite", f"@{file}"])).invite == made
    assert with_invite(parser.parse([])).invite is None
    for bad, error in ((f"@{tmp_path}/none", StateError), ("x", AccessError)):
        with pytest.raises(error):
            with_invite(parser.parse(["--invite", bad]))
    without = invite(made.run, expires_at=2e9).to_text()
    with pytest.raises(UsageError, match="names no entry point"):
        with_invite(parser.parse(["--invite", without]))
