"""Let people into a private run, and put them out again.

    python -m coordinator.invite --output-dir DIR [--name NAME] [--days 30] [--for-peer PEER_ID]
    python -m coordinator.invite revoke INVITE_OR_PEER_ID [...] --output-dir DIR
    python -m coordinator.invite show INVITE
    python -m coordinator.invite peer-id --identity-path DIR/identity.key

DIR holds the run's spec, `run.toml`, as `coordinator.start --private` or `peer.join --private` wrote it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from coordinator.admission import REVOCATIONS_NAME, Admission, write_private
from coordinator.cli import EXIT_CODES, Parser, add_organizer_argument, positive, run_main
from coordinator.credentials import (
    INVITE_PREFIX,
    Invite,
    instant_text,
    make_invite,
    make_revocations,
    parse_invite,
)
from coordinator.errors import AccessError, NetworkError, StateError, UsageError
from coordinator.identity import Identity, load_identity
from coordinator.network import Network, NetworkConfig, PeerUnreachable
from coordinator.organizer import DAY_SECONDS, DEFAULT_DAYS, ENTRY_POINTS_NAME, MAX_ENTRY_POINTS
from coordinator.records import MAX_NAME_CHARS, MAX_RECORD_BYTES
from coordinator.spec import MAX_INSTANT, RunSpec, load_spec

EPILOG = f"""examples:
  one string, for whoever holds it, for a week:
    python -m coordinator.invite --output-dir my-run --days 7 --name "ward 3"
  one that only a certain peer can use, so that it is no secret:
    python -m coordinator.invite peer-id --identity-path mine/identity.key     # at the member's
    python -m coordinator.invite --output-dir my-run --for-peer 12D3KooW...
  out again, by the string, by the id that `show` and the making of it print, or by peer:
    python -m coordinator.invite revoke 12D3KooW... --output-dir my-run

Revoking an invite that is for whoever holds it puts out all who came in by it. It is told to a peer that
runs (--initial-peers, else those known from DIR), which tells the others; a revocation is for ever. What
is sent for it is written to DIR/ledger.jsonl.

{EXIT_CODES}"""
CALL_SECONDS = 10.0
SPREAD_SECONDS = 60.0
ERRAND_SECONDS = 3600.0  # for which the organizer lets itself in, to tell of a revocation


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m coordinator.invite",
        usage="python -m coordinator.invite [make|revoke|show|peer-id] [WHAT ...] --output-dir DIR [options]",
        description="Let people into a private run, and put them out again.",
        epilog=EPILOG,
    )
    commands = ("make", "revoke", "show", "peer-id")
    parser.add_argument("command", nargs="?", choices=commands, default="make", help="default: make")
    parser.add_argument("what", nargs="*", metavar="WHAT", help="invites or peer ids, to revoke or to show")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="of the run: where run.toml is")
    parser.add_argument(
        "--initial-peers",
        nargs="+",
        default=None,
        metavar="ADDR",
        help="entry points for the invite, or to tell (default: those that DIR knows)",
    )
    parser.add_argument(
        "--for-peer", metavar="PEER_ID", help="only this peer can use it: the string is no secret"
    )
    parser.add_argument("--name", default="", help="a note for yourself and the members; they can read it")
    parser.add_argument(
        "--days",
        type=positive,
        default=DEFAULT_DAYS,
        metavar="N",
        help=f"for which it lets in (default: {DEFAULT_DAYS:g})",
    )
    parser.add_argument("--identity-path", type=Path, metavar="FILE", help="of peer-id: a member's key")
    add_organizer_argument(parser)
    return parser.parse(argv)


def _run(args: argparse.Namespace) -> int:
    if args.what and args.command not in ("revoke", "show"):
        raise UsageError(f"{args.command} takes no {args.what[0][:80]!r}")
    match args.command:
        case "peer-id":
            _print_peer_id(args)
        case "show":
            for text in args.what:
                print(describe(parse_invite(text)))
        case "revoke":
            _revoke(args)
        case _:
            _make(args)
    return 0


def _print_peer_id(args: argparse.Namespace) -> None:
    if args.identity_path is None:
        raise UsageError("give --identity-path FILE, such as the identity.key in the member's --output-dir")
    print(load_identity(args.identity_path).peer_id)


def _make(args: argparse.Namespace) -> None:
    spec, organizer = _open_run(args)
    if len(args.name) > MAX_NAME_CHARS or not args.name.isprintable():
        raise UsageError(f"--name has at most {MAX_NAME_CHARS} characters, without control characters")
    if args.for_peer is not None and not _is_key(args.for_peer):
        raise UsageError(f"--for-peer {args.for_peer[:80]}: a peer id begins with 12D3KooW; see peer-id")
    expires_at = round(time.time() + args.days * DAY_SECONDS)
    if expires_at > MAX_INSTANT:
        raise UsageError(f"--days {args.days:g}: that is after the year 3200")
    entry_points = _entry_points(args)
    if not entry_points:
        raise UsageError("give --initial-peers ADDR: the directory knows no address of the run's peers")
    invite = make_invite(
        organizer,
        spec.digest,
        entry_points[:MAX_ENTRY_POINTS],
        expires_at=expires_at,
        for_peer=args.for_peer,
        name=args.name,
    )
    print(describe(invite), file=sys.stderr)
    print(invite.to_text())


def describe(invite: Invite) -> str:
    """For people; nothing secret."""
    whom = "whoever holds it: a secret" if invite.for_peer is None else f"the peer {invite.for_peer} alone"
    return (
        f"invite      {invite.certificate.key}\n"
        f"name        {_printable(invite.certificate.name)}\n"
        f"run         {invite.run}\n"
        f"lets in     {whom}\n"
        f"until       {instant_text(invite.certificate.expires_at)}\n"
        f"by way of   {_printable(' '.join(invite.entry_points))}"
    )


def _revoke(args: argparse.Namespace) -> None:
    spec, organizer = _open_run(args)
    keys = {_key_of(text, spec) for text in args.what}
    if not keys:
        raise UsageError("say what to revoke: an invite, its id, or a peer id")
    from peer.ledger_file import LEDGER_NAME, Ledger  # late: torch comes with it, which takes seconds

    entry_points = _entry_points(args)
    with tempfile.TemporaryDirectory() as folder:
        identity = load_identity(Path(folder) / "errand.key")
        admission = _errand(spec, organizer, identity, args.output_dir / REVOCATIONS_NAME)
        config = NetworkConfig(
            identity, initial_peers=tuple(entry_points), listens=False, admission=admission
        )
        if not entry_points:
            _sign_next(admission, organizer, keys, args.output_dir)
            raise NetworkError(_not_told(args.output_dir, "no address of a peer is known"))
        try:
            with (
                Ledger(args.output_dir / LEDGER_NAME) as ledger,
                Network(config, ledger.sent) as network,
            ):
                network.run(_meet_all(network), timeout_seconds=SPREAD_SECONDS)
                text = _sign_next(admission, organizer, keys, args.output_dir)
                told = network.run(_tell_all(network, text), timeout_seconds=SPREAD_SECONDS)
        except NetworkError as error:
            _sign_next(admission, organizer, keys, args.output_dir)
            raise NetworkError(_not_told(args.output_dir, str(error))) from error
    if not told:
        raise NetworkError(_not_told(args.output_dir, "no entry point took it"))
    print(f"revoked, version {admission.version}; told to {told} of {len(entry_points)} entry points")


def _errand(spec: RunSpec, organizer: Identity, identity: Identity, file: Path) -> Admission:
    """The organizer comes as a peer of the moment, which it lets in itself."""
    now = time.time()
    invite = make_invite(
        organizer, spec.digest, (), expires_at=now + ERRAND_SECONDS, for_peer=identity.peer_id
    )
    return Admission(
        run=spec.digest,
        organizer=organizer.peer_id,
        peer_id=identity.peer_id,
        credential=invite.credential_for(identity.peer_id, now),
        file=file,
    )


async def _meet_all(network: Network) -> None:
    """What was revoked before, from another machine, comes with the meeting."""
    for peer_id in network.entry_points:
        try:
            await network.call(peer_id, "spec", None, timeout_seconds=CALL_SECONDS)
        except PeerUnreachable as error:
            print(f"not told: {error}", file=sys.stderr)


async def _tell_all(network: Network, text: str) -> int:
    num_told = 0
    for peer_id in network.entry_points:
        try:
            await network.call(peer_id, "revocations", text, timeout_seconds=CALL_SECONDS)
            num_told += 1
        except PeerUnreachable as error:
            print(f"not told: {error}", file=sys.stderr)
    return num_told


def _sign_next(admission: Admission, organizer: Identity, keys: set[str], output_dir: Path) -> str:
    """Signs and keeps a list that holds `keys`, unless the newest one does already."""
    if not keys <= admission.revoked:
        signed = make_revocations(organizer, admission.run, keys, admission.revocations)
        admission.learn(signed.to_bytes())
    try:
        write_private(output_dir / REVOCATIONS_NAME, admission.signed_revocations)
    except OSError as error:
        raise StateError(f"{output_dir}: cannot keep the revocations: {error.strerror}") from error
    return admission.signed_revocations.decode()


def _not_told(output_dir: Path, why: str) -> str:
    return (
        f"{why}\nThe revocation is signed and kept in {output_dir / REVOCATIONS_NAME}, but nobody was told: "
        "run the command again with --initial-peers ADDR of a peer that runs"
    )


def _open_run(args: argparse.Namespace) -> tuple[RunSpec, Identity]:
    if args.output_dir is None:
        raise UsageError("give --output-dir DIR, where the run.toml of the private run is")
    spec = load_spec(args.output_dir / "run.toml")
    if spec.organizer is None:
        raise AccessError(f"the run {spec.run_name} is public: anybody may join it without an invite")
    if not args.organizer_key.exists():
        raise AccessError(f"{args.organizer_key}: there is no organizer's key; give --organizer-key FILE")
    organizer = load_identity(args.organizer_key)
    if organizer.peer_id != spec.organizer:
        raise AccessError(
            f"{args.organizer_key} is not the key of the run's organizer, {spec.organizer}; "
            "give --organizer-key FILE"
        )
    return spec, organizer


def _key_of(text: str, spec: RunSpec) -> str:
    if not text.startswith(INVITE_PREFIX):
        if not _is_key(text):
            raise UsageError(f"{text[:80]!r} is neither an invite nor an id, which begins with 12D3KooW")
        return text
    invite = parse_invite(text)
    if invite.run != spec.digest:
        raise AccessError(f"the invite is of another run, {invite.run}")
    return invite.certificate.key


def _is_key(text: str) -> bool:
    alphabet = set("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
    return text.startswith("12D3KooW") and len(text) == 52 and set(text) <= alphabet


def _entry_points(args: argparse.Namespace) -> list[str]:
    if args.initial_peers is not None:
        return list(args.initial_peers)
    known: list[str] = []
    for name in (ENTRY_POINTS_NAME, "known_peers.json"):
        path = args.output_dir / name
        try:
            value = json.loads(path.read_bytes()[:MAX_RECORD_BYTES]) if path.exists() else []
        except (OSError, ValueError):
            continue
        known += [address for address in value if isinstance(address, str)] if isinstance(value, list) else []
    return list(dict.fromkeys(known))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text) or "-"


if __name__ == "__main__":
    sys.exit(main())
