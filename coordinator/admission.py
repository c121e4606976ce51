"""Whom does this peer of a private run let in, and what does it show itself?

One `Admission` per process. A peer presents its credential once (`door.py`), or shows it in a heartbeat
(`membership.py`, `board.py`); it is checked here, without asking anybody, and remembered until it expires or
is revoked. `guard.py` asks for every call and every stream that comes in.

Revocations are one list, signed by the organizer, with a version; the highest one counts. Members tell it on,
and keep it in a file, so that a restart forgets nobody.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from coordinator.credentials import (
    CredentialError,
    Invite,
    RevokedError,
    check_credential,
    instant_text,
    make_invite,
    open_revocations,
    parse_credential,
    revoked_keys,
)
from coordinator.errors import AccessError, StateError
from coordinator.identity import Identity, load_identity
from coordinator.records import MAX_RECORD_BYTES, Credential, RecordError, Revocations, parse_json
from coordinator.spec import RunSpec

logger = logging.getLogger(__name__)

NOT_ADMITTED = "this run is private"  # begins each refusal: who is told so presents itself again, once
MAX_ADMITTED = 4096  # peers whose credentials are remembered; one that was forgotten shows it again
MAX_PRESENTED_BYTES = 16 * 1024  # a credential and a list of revocations
COMPLAINT_SECONDS = 60.0  # one line per peer and minute
CREDENTIAL_NAME, REVOCATIONS_NAME = "credential.json", "revocations.json"  # in the output directory
OWN_SECONDS = 365 * 24 * 3600.0  # for how long an organizer's own peer lets itself in; anew at each start
_MAX_COMPLAINTS = 1000

OnRevoked = Callable[[frozenset[str]], None]  # gets the ids of peers that are out from now on


class NotAdmittedError(RecordError):
    """A call of a peer that has shown no valid credential."""


class Admission:
    """Belongs to the network's thread; `problem` may be asked by any."""

    def __init__(
        self,
        *,
        run: str,
        organizer: str,
        peer_id: str,
        credential: Credential | None,
        file: Path | None = None,
        keeps: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`file`: where the revocations are; new ones are kept there, unless not `keeps`.

        Raises StateError when it is there and not readable.
        """
        self.run, self.organizer, self.peer_id, self.credential = run, organizer, peer_id, credential
        self._file, self._now = file if keeps else None, now
        self._admitted: OrderedDict[str, Credential] = OrderedDict()
        self._complained_at: OrderedDict[str, float] = OrderedDict()
        self._on_revoked: list[OnRevoked] = []
        self._lock = threading.Lock()
        self._text = b""  # the list of revocations, signed
        self.revocations: Revocations | None = None
        self.revoked: frozenset[str] = frozenset()  # keys of peers and of invites
        if file is not None and file.exists():
            self._load(file)

    def on_revoked(self, callback: OnRevoked) -> None:
        self._on_revoked.append(callback)

    @property
    def version(self) -> int:
        """Of the revocations that are known here; 0: none."""
        return self.revocations.version if self.revocations else 0

    @property
    def signed_revocations(self) -> bytes:
        """As the organizer made them; empty: none."""
        return self._text

    # what I show

    def problem(self, *, within_seconds: float = 0.0) -> str | None:
        """Why the others refuse me, now or within some seconds; None: they do not."""
        if self.credential is None:
            return "there is no credential"
        if not revoked_keys(self.credential, self.peer_id).isdisjoint(self.revoked):
            return "the organizer has revoked it"
        expires_at = self.credential.certificate.expires_at
        if expires_at <= self._now() + within_seconds:
            return f"it ends at {instant_text(expires_at)}"
        return None

    def presented(self) -> bytes:
        """What a peer says at the door: its credential, and the revocations that it knows."""
        credential = None if self.credential is None else self.credential.model_dump(mode="json")
        revocations = self._text.decode() or None
        return json.dumps({"credential": credential, "revocations": revocations}).encode()

    # whom I let in

    def is_admitted(self, peer_id: str) -> bool:
        credential = self._admitted.get(peer_id)
        return credential is not None and credential.certificate.expires_at > self._now()

    def require(self, peer_id: str) -> None:
        """Raises NotAdmittedError for whoever has not shown a valid credential."""
        if not self.is_admitted(peer_id):
            credential = self._admitted.pop(peer_id, None)
            why = "you have shown no credential" if credential is None else "your credential has expired"
            self.complain(peer_id, why.replace("you have", "it has").replace("your", "its"))
            raise NotAdmittedError(f"{NOT_ADMITTED}: {why}")

    def admit(self, peer_id: str, credential: Credential | None) -> None:
        """Let a peer in until its credential expires. Raises CredentialError with the reason."""
        known = self._admitted.get(peer_id)
        if known is not None and known == credential and self.is_admitted(peer_id):
            return
        check_credential(
            credential,
            peer_id,
            run=self.run,
            organizer=self.organizer,
            revoked=self.revoked,
            now=self._now(),
        )
        assert credential is not None  # else it was refused
        self._admitted[peer_id] = credential
        self._admitted.move_to_end(peer_id)
        if len(self._admitted) > MAX_ADMITTED:
            self._admitted.popitem(last=False)

    def answer(self, peer_id: str, data: bytes) -> bytes:
        """To one who presents itself: what I show in turn, or why it is not let in."""
        try:
            self.take(peer_id, data)
        except RecordError as error:
            self.complain(peer_id, str(error))
            # One whom the organizer has taken back may see that it was the organizer.
            proof = self._text.decode() if isinstance(error, RevokedError) else None
            return json.dumps({"refused": str(error)[:200], "revocations": proof}).encode()
        return self.presented()

    def take(self, peer_id: str, data: bytes) -> None:
        """What a peer has presented. Raises RecordError when that does not let it in."""
        shown = parse_json(data, max_bytes=MAX_PRESENTED_BYTES)
        if not isinstance(shown, dict) or not {"revocations"} <= shown.keys() <= {
            *("revocations", "credential", "refused"),
        }:
            raise RecordError("not what one shows at the door")
        self._learn_if_any(shown["revocations"])
        if "refused" in shown:
            raise CredentialError(f"it refuses me: {str(shown['refused'])[:200]}")
        self.admit(peer_id, parse_credential(shown.get("credential")))

    # whom the organizer has taken back

    def learn(self, data: bytes) -> bool:
        """Take in a signed list; whether it was news. Raises RecordError for what is not the organizer's."""
        if data == self._text:
            return False
        revocations = open_revocations(data, run=self.run, organizer=self.organizer)
        if revocations.version <= self.version:
            return False
        self._set(revocations, data)
        self._keep()
        gone = {p for p, c in self._admitted.items() if not revoked_keys(c, p).isdisjoint(self.revoked)}
        for peer_id in gone:
            del self._admitted[peer_id]
        logger.warning(
            "the organizer has revoked %d keys (version %d); %d peers known here are out",
            len(self.revoked),
            revocations.version,
            len(gone),
        )
        for callback in self._on_revoked:
            callback(frozenset(gone | self.revoked))
        return True

    def complain(self, peer_id: str, why: str) -> None:
        """In the log, once per peer and minute."""
        now = self._now()
        if now < self._complained_at.get(peer_id, float("-inf")) + COMPLAINT_SECONDS:
            return
        self._complained_at[peer_id] = now
        self._complained_at.move_to_end(peer_id)
        if len(self._complained_at) > _MAX_COMPLAINTS:
            self._complained_at.popitem(last=False)
        logger.warning("refused peer %s: %s", peer_id[-8:], why)

    def _learn_if_any(self, text: object) -> None:
        if isinstance(text, str):
            self.learn(text.encode(errors="replace"))

    def _set(self, revocations: Revocations, text: bytes) -> None:
        self.revocations, self._text = revocations, text
        self.revoked = frozenset(revocations.keys)

    def _load(self, file: Path) -> None:
        try:
            text = file.read_bytes()[: MAX_RECORD_BYTES + 1]
            self._set(open_revocations(text, run=self.run, organizer=self.organizer), text)
        except (OSError, RecordError) as error:
            raise StateError(f"{file}: cannot read the revocations of the run: {error}; delete it") from error

    def _keep(self) -> None:
        if self._file is None:
            return
        try:
            write_private(self._file, self._text)
        except OSError as error:
            logger.error("%s: the revocations are not kept: %s", self._file, error.strerror)


# ---- where an Admission comes from ----------------------------------------------------------------


def admission_of(
    spec: RunSpec | None,
    invite: Invite | None,
    identity: Identity,
    output_dir: Path | None,
    organizer_key: Path | None = None,
    *,
    keeps: bool = True,
) -> Admission | None:
    """Of a peer that holds an invite, resumes, or is the organizer's own; None: no sign of a private run.

    Raises AccessError when this peer has no valid credential. `output_dir`: where credential and revocations
    are kept; None: nowhere. Not `keeps`: for who only looks there; nothing is written, neither now nor when a
    revocation is heard of.
    """
    credential: Credential | None
    if invite is not None:
        if spec is not None and spec.digest != invite.run:
            raise AccessError(f"the invite is for the run {invite.run}, not for {spec.digest}")
        run, organizer = invite.run, invite.organizer
        credential = invite.credential_for(identity.peer_id, time.time())
    elif spec is not None and spec.organizer is not None:
        run, organizer = spec.digest, spec.organizer
        credential = _own_credential(spec, organizer, identity, output_dir, organizer_key)
    else:
        return None
    file = None if output_dir is None else output_dir / REVOCATIONS_NAME
    admission = Admission(
        run=run,
        organizer=organizer,
        peer_id=identity.peer_id,
        credential=credential,
        file=file,
        keeps=keeps,
    )
    if keeps and output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_private(output_dir / CREDENTIAL_NAME, credential.canonical())
    check_own(admission)
    return admission


def check_own(admission: Admission, *, within_seconds: float = 0.0) -> None:
    """Raises AccessError when the others refuse this peer, or soon will."""
    problem = admission.problem(within_seconds=within_seconds)
    if problem is not None:
        raise AccessError(
            f"the credential of this peer for the private run is of no use: {problem}; "
            "ask the organizer for a new invite and start again with --invite: the checkpoint is kept"
        )


def _own_credential(
    spec: RunSpec, organizer: str, identity: Identity, output_dir: Path | None, organizer_key: Path | None
) -> Credential:
    """The organizer's own peer lets itself in; another one shows what it kept of its invite."""
    if organizer_key is not None and organizer_key.exists():
        key = load_identity(organizer_key)
        if key.peer_id == organizer:
            invite = make_invite(
                key, spec.digest, (), expires_at=time.time() + OWN_SECONDS, for_peer=identity.peer_id
            )
            return invite.credential_for(identity.peer_id, time.time())
    kept = output_dir / CREDENTIAL_NAME if output_dir is not None else None
    try:
        credential = parse_credential(parse_json(kept.read_bytes())) if kept is not None else None
    except (OSError, RecordError):
        credential = None
    if credential is None:
        raise AccessError(
            f"the run {spec.run_name} is private: join with --invite STRING, which its organizer makes; "
            "the organizer's own peer needs --organizer-key FILE"
        )
    try:
        check_credential(
            credential,
            identity.peer_id,
            run=spec.digest,
            organizer=organizer,
            revoked=(),
            now=time.time(),
        )
    except CredentialError as error:
        why = f"{kept}: {error}; ask the organizer for a new invite, and give --invite"
        raise AccessError(why) from error
    return credential


def write_private(path: Path, data: bytes) -> None:
    """Atomically, readable by its owner only. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
