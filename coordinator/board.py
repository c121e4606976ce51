"""The DHT as a board: each peer pins its own signed heartbeat and reads those of the others."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import msgpack
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from coordinator.admission import Admission
from coordinator.credentials import open_revocations
from coordinator.membership import Membership
from coordinator.network import Network
from coordinator.records import MAX_RECORD_BYTES, PeerRecord, RecordError, Signed, open_signed

logger = logging.getLogger(__name__)

MAX_LIFETIME_SECONDS = 4000.0  # no record outlives the longest lease by much, whatever it claims
MAX_REMEMBERED_RECORDS = 2048
REVOCATIONS_SECONDS = 1800.0  # members store them again long before


def board_key(run_digest: str) -> str:
    return f"{run_digest}/peers"


def revocations_key(run_digest: str) -> str:
    """Of a private run. One subkey per version: else an old list that expires later would hide a new one."""
    return f"{run_digest}/revocations"


class BoardValidator(RecordValidatorBase):
    """Refuses what does not belong on the board, at every node that stores or relays it.

    There is one key, the board's. Under it only the owner of a subkey (its peer id) can write, one signed
    heartbeat for a bounded time; so nobody can overwrite, erase or lock another's record. How many entries
    there are in all is bounded by `coordinator.guard`. Records come again and again, from each node that
    is asked, so those that were found good are remembered: a signature takes 0.1 ms to check.

    In a private run the owner must show its credential in the heartbeat, and there is a second key: the
    organizer's lists of revocations.
    """

    def __init__(
        self, run_digest: str, now: Callable[[], float] = Network.now, admission: Admission | None = None
    ) -> None:
        """`admission`: of a private run."""
        self._key = DHTID.generate(source=board_key(run_digest)).to_bytes()
        self._revocations_key = DHTID.generate(source=revocations_key(run_digest)).to_bytes()
        self._run_digest, self._now, self._admission = run_digest, now, admission
        self._good: OrderedDict[tuple[bytes, bytes, float], None] = OrderedDict()
        if admission is not None:
            admission.on_revoked(lambda _: self._good.clear())

    def validate(self, record: DHTRecord) -> bool:
        checked = (record.subkey, record.value, record.expiration_time)
        if record.key == self._key and checked in self._good:
            return True
        try:
            self._check(record)
        except RecordError as error:
            logger.debug("the board refused a record: %s", error)
            return False
        self._good[checked] = None
        if len(self._good) > MAX_REMEMBERED_RECORDS:
            self._good.popitem(last=False)
        return True

    def _check(self, record: DHTRecord) -> None:
        if len(record.value) > MAX_RECORD_BYTES:
            raise RecordError("too large")
        if not record.expiration_time <= self._now() + MAX_LIFETIME_SECONDS:  # this way NaN is refused, too
            raise RecordError("expires in the far future")
        if record.key == self._revocations_key and self._admission is not None:
            self._check_revocations(record, self._admission)
            return
        if record.key != self._key:
            raise RecordError("under a key that is not of this run")  # else anybody could fill our memory
        try:
            owner, value = msgpack.unpackb(record.subkey), msgpack.unpackb(record.value)
        except (ValueError, msgpack.UnpackException) as error:
            raise RecordError("not a dictionary entry") from error
        if not isinstance(value, bytes):
            raise RecordError("not bytes")
        author, heartbeat = open_signed(value, PeerRecord)
        if author != owner or heartbeat.run != self._run_digest:
            raise RecordError("not its owner's heartbeat of this run")
        if record.expiration_time > heartbeat.expires_at:
            # Else anybody could pin an old heartbeat over its owner's newer ones: the last to expire wins.
            raise RecordError("outlives the heartbeat")
        if self._admission is not None:
            self._admission.admit(author, heartbeat.credential)

    def _check_revocations(self, record: DHTRecord, admission: Admission) -> None:
        try:
            version, value = msgpack.unpackb(record.subkey), msgpack.unpackb(record.value)
        except (ValueError, msgpack.UnpackException) as error:
            raise RecordError("not a dictionary entry") from error
        if not isinstance(value, bytes):
            raise RecordError("not bytes")
        revocations = open_revocations(value, run=self._run_digest, organizer=admission.organizer)
        if version != str(revocations.version):
            raise RecordError("not under its version")


class Board:
    def __init__(self, network: Network, run_digest: str) -> None:
        self._network, self._key = network, board_key(run_digest)
        self._revocations_key = revocations_key(run_digest)

    async def publish(self, signed: Signed, *, expires_at: float) -> bool:
        """`expires_at` is the heartbeat's own. Raises NetworkError."""
        return await self._network.dht_store(
            self._key, signed.peer_id, signed.to_bytes(), expires_at=expires_at
        )

    async def publish_revocations(self, admission: Admission) -> None:
        """Raises NetworkError."""
        if admission.signed_revocations:
            await self._network.dht_store(
                self._revocations_key,
                str(admission.version),
                admission.signed_revocations,
                expires_at=self._network.now() + REVOCATIONS_SECONDS,
            )

    async def read_revocations(self, admission: Admission) -> None:
        """Raises NetworkError."""
        for version, value in (await self._network.dht_get(self._revocations_key)).items():
            try:
                admission.learn(value)
            except RecordError as error:
                logger.debug("dropped a list of revocations, version %s: %s", version[:20], error)

    async def read_into(self, membership: Membership) -> None:
        """Raises NetworkError."""
        entries = await self._network.dht_get(self._key)
        now = self._network.now()
        for peer_id, value in entries.items():
            member = membership.observe(value, now=now, claimed_by=peer_id)
            if member is not None:
                self._network.remember(peer_id, member.record.addresses)
