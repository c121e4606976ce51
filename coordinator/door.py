"""How do two peers of a private run show each other their credentials, before anything else?

The only call that a stranger may make at a peer of a private run. Whoever calls first shows its credential
and gets the other's; after that both let each other in (`admission.py`). An outgoing call to a peer that was
not met yet waits for it: so nothing else is ever said to an outsider either.
"""

from __future__ import annotations

import asyncio

from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError

from coordinator.admission import MAX_ADMITTED, NOT_ADMITTED, Admission
from coordinator.outgoing import Recorder, report
from coordinator.records import RecordError

DOOR_HANDLER = "Door.rpc_present"
MEET_SECONDS = 10.0
# What is said at the door and lets nobody in: refusals, and bytes that are no message, which hivemind parses.
_NO_ANSWER = (RecordError, DecodeError, TypeError, ValueError)


class RefusedError(P2PHandlerError):
    """The other peer does not let me in, or I do not let it in."""


class Door(ServicerBase):
    def __init__(self, admission: Admission, namespace: str, record: Recorder) -> None:
        self._admission, self._namespace, self._record = admission, namespace, record
        self._met: dict[str, int] = {}  # who has let me in, at which meeting
        self._meeting: dict[str, asyncio.Task[int]] = {}  # under way
        self._num_meetings = 0

    async def rpc_present(self, request: BytesValue, context: P2PContext) -> BytesValue:
        peer_id = str(context.remote_id)
        reply = self._admission.answer(peer_id, request.value)
        report(self._record, "reply", "present", peer_id, reply)
        return BytesValue(value=reply)

    async def open(self, p2p: P2P) -> None:
        await self.add_p2p_handlers(p2p, namespace=self._namespace)

    def is_own(self, handler_name: str) -> bool:
        return handler_name == f"{self._namespace}::{DOOR_HANDLER}"

    def forget(self, peer_id: str, meeting: int) -> None:
        """It has forgotten me, since that meeting: it was started anew, for example."""
        if self._met.get(peer_id) == meeting:
            del self._met[peer_id]

    async def meet(self, p2p: P2P, peer: PeerID) -> int:
        """Which meeting it was in which both let each other in; calls at one time share it.

        Raises RefusedError, and what a failed call raises.
        """
        peer_id = str(peer)
        if peer_id in self._met and self._admission.is_admitted(peer_id):
            return self._met[peer_id]
        if peer_id == self._admission.peer_id:
            return 0
        task = self._meeting.get(peer_id)
        if task is None:
            task = self._meeting[peer_id] = asyncio.create_task(self._meet(p2p, peer))
            task.add_done_callback(lambda done: self._met_or_not(peer_id, done))
        return await asyncio.shield(task)

    def _met_or_not(self, peer_id: str, task: asyncio.Task[int]) -> None:
        self._meeting.pop(peer_id, None)
        if not task.cancelled():
            task.exception()  # looked at, also where nobody waits for it any more

    async def _meet(self, p2p: P2P, peer: PeerID) -> int:
        peer_id, shown = str(peer), self._admission.presented()
        report(self._record, "call", "present", peer_id, shown)
        stub = self.get_stub(p2p, peer, namespace=self._namespace)
        try:
            async with asyncio.timeout(MEET_SECONDS):
                reply = await stub.rpc_present(BytesValue(value=shown))
            self._admission.take(peer_id, reply.value)
        except _NO_ANSWER as error:
            self._met.pop(peer_id, None)
            self._admission.complain(peer_id, str(error))
            raise RefusedError(f"{NOT_ADMITTED}: {error}") from error
        if len(self._met) >= MAX_ADMITTED:
            self._met.clear()
        self._num_meetings += 1
        self._met[peer_id] = self._num_meetings
        return self._num_meetings
