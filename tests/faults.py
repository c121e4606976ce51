"""A peer that fails on purpose: one kind of fault, at one named step. Everything else is the real peer.

    python -m tests.faults KIND STEP --dump DIR -- peer.join --initial-peers ... (its flags)

It fails once, at the first time that the step is reached in round 2 or later; a liar lies in that round and
in all later ones. `equivocate` tells two of three members another result than the third, each with a
statement that fits, so that no majority signs; `equivocate-once` tells one, and the rest commits.
`alive-only` is a reducer that says that it waits for others, and nothing else. `withheld-manifest` sends
nothing to the others, so that they cannot tell how long its results may be, and multiplies these.
`nan-result` and `short-result` are results that nobody can use. `deaf` says what it has to say and answers no
call; `false-claim` says, with its own signature, that it is five rounds ahead. `flood` says to everybody what
it has ever said to anybody, every kind of call that a member makes, again and again. Every peer of the fault
matrix runs under this module, the honest ones with the kind `none`: it then only writes to DIR what it
contributed, as it is decoded, and which states it held, for the check against float64.

`flipped-labels` does all that a member does, and nothing can be proven against it: it finetunes on flipped
labels under a head that is fitted to the true ones, sends a delta as long as those of the others, claims to
have seen a billion examples, and votes that all is well. `reversed` does the same with twice its honest
delta, turned around: cruder, and sure to do harm.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator.agreement import Agreement
from coordinator.chain import Chain
from coordinator.gate_votes import GateVotes
from coordinator.network import Network
from coordinator.records import PeerRecord, open_signed, sign
from peer import allreduce, session
from peer.layout import flat_bytes
from peer.learner import Learner
from peer.manifest import MAX_SIGNED_BYTES, Manifest, Outgoing, Statement, join_hashes, part_hash
from peer.model import head_parameters

KINDS = (
    "none",
    "kill",
    "freeze-2",
    "freeze",
    "delay",
    "corrupt",
    "nan",
    "wrong-norm",
    "wrong-shape",
    "wrong-group",
    "wrong-weight",
    "wrong-result",
    "equivocate",
    "equivocate-once",
    "alive-only",
    "withheld-manifest",
    "nan-result",
    "short-result",
    "deaf",
    "false-claim",
    "truncated-state",
    "forged-record",
    "flood",
    "flipped-labels",
    "reversed",
)
STEPS = (
    "ready",
    "proposal",
    "first-part",
    "middle-part",
    "last-part",
    "first-result",
    "last-result",
    "commit",
    "download",
)
FIRST_ROUND = 2
DELAY_SECONDS = 2.0
ENLARGED = 1e4  # times an honest result: far beyond the norm cap
FLOOD_CALLS = 16  # of each kind, at once, to each of the others
LIE = 1e-3  # added by a reducer that lies: as large as the deltas of the tests, and within the norm cap


class Injector:
    """Knows the fault, where the peer stands, and whether it has failed already."""

    def __init__(self, kind: str, step: str, dump: Path) -> None:
        self.kind, self.step, self.dump = kind, step, dump
        self.round = 0
        self.has_failed = False

    def is_lying(self, kind: str) -> bool:
        return self.kind == kind and self.round >= FIRST_ROUND

    def lies(self, kind: str) -> bool:
        """As `is_lying`; and it is noted that the lie was told."""
        if not self.is_lying(kind):
            return False
        self._note(kind)
        return True

    def _note(self, what: str) -> None:
        (self.dump / "failed").write_text(f"{what} round {self.round}\n")

    def is_at(self, part: int, parts: range) -> bool:
        """Whether this part of a slice is the one of the step."""
        at = {"first": parts.start, "middle": (parts.start + parts.stop) // 2, "last": parts.stop - 1}
        return part == at.get(self.step.split("-")[0], -1)

    async def reach(self, step: str) -> None:
        if step != self.step or self.has_failed or self.round < FIRST_ROUND:
            return
        if self.kind in ("kill", "freeze", "freeze-2", "delay"):
            self.has_failed = True
            self._note(f"{self.kind} {step}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "delay":
            await asyncio.sleep(DELAY_SECONDS)
        elif self.kind in ("freeze", "freeze-2"):
            if self.kind == "freeze-2":
                thaw = f"sleep 2; kill -CONT {os.getpid()}"
                subprocess.Popen(["sh", "-c", thaw], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)


def install(injector: Injector) -> None:
    """Wrap the named steps of the product."""
    _wrap_session(injector)
    _wrap_agreement(injector)
    if injector.kind == "flipped-labels":
        _wrap_learner(injector)
    if injector.kind in ("flipped-labels", "reversed"):
        _accept_all()
        _weigh_more()
    _wrap_allreduce(injector)
    _wrap_network(injector)


def _wrap_session(injector: Injector) -> None:
    encode, reduce, set_state = session.Session._encode, session.Session._reduce, session.Session._set_state

    def encode_and_fail(self: Any, delta: torch.Tensor, log: Any) -> Outgoing:
        injector.round = log.round
        if injector.is_lying("flipped-labels"):
            delta = _as_long_as_others(delta, self._agreement.chain)
        elif injector.is_lying("reversed"):
            delta = -2.0 * delta
        honest = encode(self, delta, log)
        np.save(injector.dump / f"delta-{log.round}-{self._network.peer_id[-8:]}.npy", _decoded(honest))
        outgoing = _lie_about(honest, self, injector)
        self._network.run(injector.reach("ready"), timeout_seconds=60.0)
        return outgoing

    async def reduce_and_fail(self: Any, *args: Any) -> Any:
        fused = await reduce(self, *args)
        await injector.reach("commit")
        return fused

    def set_and_dump(self: Any, state: Any) -> None:
        set_state(self, state)
        np.save(injector.dump / f"state-{state.state_hash[:16]}.npy", state.backbone.numpy())

    session.Session._encode = encode_and_fail  # type: ignore[method-assign]
    session.Session._reduce = reduce_and_fail  # type: ignore[method-assign,assignment]
    session.Session._set_state = set_and_dump  # type: ignore[method-assign]


def _decoded(outgoing: Outgoing) -> np.ndarray:
    """What the others make of it."""
    sizes = [outgoing.grid.size(part) for part in range(outgoing.grid.num_parts)]
    values = [outgoing.codec.decode(data, n) for data, n in zip(outgoing.parts, sizes, strict=True)]
    return torch.cat(values).numpy()


def _wrap_agreement(injector: Injector) -> None:
    heartbeat = Agreement._heartbeat

    def heartbeat_from_the_future(self: Any) -> PeerRecord:
        record = heartbeat(self)
        if not injector.lies("false-claim"):
            return record
        claim = {"round": record.round + 5, "commit": "f" * 64, "state_hash": "e" * 64}
        return record.model_copy(update=claim)

    Agreement._heartbeat = heartbeat_from_the_future  # type: ignore[method-assign]


def _wrap_learner(injector: Injector) -> None:
    finetune = Learner.finetune

    def finetune_for_harm(self: Any, *args: Any, round_: int, **options: Any) -> Any:
        if round_ < FIRST_ROUND:
            return finetune(self, *args, round_=round_, **options)
        honest, head = self._train, list(head_parameters(self.model).values())
        flipped = [(label + 1) % self.task.num_labels for label in honest["labels"]]
        self._train = honest.remove_columns("labels").add_column("labels", flipped)
        try:
            for parameter in head:
                parameter.requires_grad_(False)
            return finetune(self, *args, round_=round_, **options)
        finally:
            self._train = honest
            for parameter in head:
                parameter.requires_grad_(True)

    Learner.finetune = finetune_for_harm  # type: ignore[method-assign]


def _accept_all() -> None:
    cast = GateVotes.cast

    async def accept(self: Any, commit: str, *, rejects: bool) -> None:
        await cast(self, commit, rejects=False)

    GateVotes.cast = accept  # type: ignore[method-assign]


def _as_long_as_others(delta: torch.Tensor, chain: Chain) -> torch.Tensor:
    """The median norm of the round before, which everybody can read in its commit."""
    commits = [signed.commit for signed in chain.commits if signed.commit.contributors]
    length = statistics.median(contribution.norm for contribution in commits[-1].contributors)
    return delta * (length / float(torch.linalg.vector_norm(delta)))


def _lie_about(outgoing: Outgoing, owner: Any, injector: Injector) -> Outgoing:
    """A contribution that breaks its promise in one part, with a manifest that hides it as well as it can."""
    parts = list(outgoing.parts)
    norms = list(outgoing.manifest.squared_norms)
    part = {"first": 0, "middle": len(parts) // 2, "last": len(parts) - 1}.get(injector.step.split("-")[0], 0)
    if injector.is_lying("nan"):
        values = np.frombuffer(parts[part], dtype="<f4").copy()
        values[0] = np.nan
        parts[part] = values.tobytes()
    elif injector.is_lying("wrong-norm"):
        norms[part] *= 4.0
    else:
        return outgoing
    hashes = b"".join(map(part_hash, parts))
    manifest = outgoing.manifest.model_copy(update={"hashes": join_hashes(hashes), "squared_norms": norms})
    signed = sign(Manifest.model_validate(manifest.model_dump()), _identity(owner)).to_bytes()
    return Outgoing(outgoing.grid, outgoing.codec, parts, manifest, signed)


def _identity(owner: Any) -> Any:
    return owner._allreduce.identity


def _wrap_allreduce(injector: Injector) -> None:
    send_part, send_result = allreduce._Exchange._send_part, allreduce._Reducer._send_result
    reduce_part, converse = allreduce._Reducer._reduce_part, allreduce._Exchange._converse

    async def send_part_and_fail(self: Any, stream: Any, part: int) -> None:
        parts = next(owned for owned in self._owned.values() if part in owned)
        if injector.is_at(part, parts):
            if injector.step.endswith("-part"):
                await injector.reach(injector.step)
            if injector.is_lying("corrupt"):
                await stream.send(allreduce._PART, bytes(len(self.outgoing.parts[part])))
                return
            if injector.is_lying("wrong-shape"):
                await stream.send(allreduce._PART, bytes(self.outgoing.parts[part])[:-4])
                return
        await send_part(self, stream, part)

    async def send_result_and_fail(self: Any, stream: Any, index: int) -> None:
        at = {"first-result": 0, "last-result": len(self._parts) - 1}
        if at.get(injector.step) == index:
            await injector.reach(injector.step)
            if injector.lies("nan-result"):
                values = np.full(len(self._results[index]) // 4, np.nan, dtype="<f4")
                await stream.send(allreduce._RESULT, values.tobytes())
                return
            if injector.lies("short-result"):
                await stream.send(allreduce._RESULT, memoryview(self._results[index])[:-4])
                return
        await send_result(self, stream, index)

    def reduce_part_and_lie(self: Any, part: int) -> Any:
        data = reduce_part(self, part)
        if injector.is_lying("wrong-result"):
            values = np.frombuffer(data, dtype="<f4") + np.float32(LIE)
            return memoryview(flat_bytes(torch.from_numpy(values)))
        if injector.is_lying("withheld-manifest"):
            values = np.frombuffer(data, dtype="<f4") * np.float32(ENLARGED)
            return memoryview(flat_bytes(torch.from_numpy(values)))
        return data

    async def converse_elsewhere(self: Any, member: str) -> None:
        if injector.is_lying("wrong-group"):
            right = self.group
            object.__setattr__(self, "group", _with_group_id(right, bytes(32)))
            try:
                await converse(self, member)
            finally:
                object.__setattr__(self, "group", right)
            return
        await converse(self, member)

    send_results = allreduce._Reducer._send_results

    async def send_two_results(self: Any, stream: Any, next_result: int) -> None:
        others = sorted(set(self._exchange.group.members) - {self._exchange.own})
        num_deceived = {"equivocate": 2, "equivocate-once": 1}.get(injector.kind, 0)
        if injector.is_lying("alive-only"):
            await _say_alive(stream)
        elif injector.round >= FIRST_ROUND and stream.peer_id in others[:num_deceived]:
            await _tell_another_result(self, stream, next_result)
        else:
            await send_results(self, stream, next_result)

    send_parts = allreduce._Exchange._send_parts

    async def send_no_parts(self: Any, stream: Any, member: str, next_part: int) -> None:
        if injector.is_lying("withheld-manifest"):
            await asyncio.Event().wait()
        await send_parts(self, stream, member, next_part)

    allreduce._Exchange._send_parts = send_no_parts  # type: ignore[method-assign]
    allreduce._Reducer._send_results = send_two_results  # type: ignore[method-assign]
    allreduce._Exchange._send_part = send_part_and_fail  # type: ignore[method-assign]
    allreduce._Reducer._send_result = send_result_and_fail  # type: ignore[method-assign]
    allreduce._Reducer._reduce_part = reduce_part_and_lie  # type: ignore[method-assign]
    allreduce._Exchange._converse = converse_elsewhere  # type: ignore[method-assign]


async def _say_alive(stream: Any) -> None:
    while True:
        await stream.send(allreduce._ALIVE)
        await asyncio.sleep(allreduce.ALIVE_SECONDS)


async def _tell_another_result(reducer: Any, stream: Any, next_result: int) -> None:
    """The first result with a lie added, and a statement of its own that names it."""
    while not reducer._statement:
        await stream.send(allreduce._ALIVE)
        await asyncio.sleep(0.05)
    values = np.frombuffer(reducer._results[0], dtype="<f4") + np.float32(LIE)
    results = [values.tobytes(), *reducer._results[1:]]
    statement = open_signed(reducer._statement, Statement, max_bytes=MAX_SIGNED_BYTES)[1]
    lie = statement.model_copy(update={"results": join_hashes(b"".join(map(part_hash, results)))})
    for data in results[next_result:]:
        await stream.send(allreduce._RESULT, data)
    signed = sign(lie, reducer._exchange.service.identity)
    await stream.send(allreduce._STATEMENT, signed.to_bytes())


def _with_group_id(group: Any, group_id: bytes) -> Any:
    import dataclasses

    return dataclasses.replace(group, group_id=group_id)


def _wrap_network(injector: Injector) -> None:
    on_call, on_stream, call = Network.on_call, Network.on_stream, Network.call

    def on_call_and_fail(self: Network, method: str, handler: Callable[..., Any]) -> None:
        async def handle(peer_id: str, body: Any) -> bytes:
            if method == "propose":
                await injector.reach("proposal")
            if injector.lies("deaf"):
                await asyncio.Event().wait()
            return bytes(await handler(peer_id, body))

        on_call(self, method, handle)

    def on_stream_and_fail(self: Network, method: str, handler: Callable[..., Any]) -> None:
        async def handle(peer_id: str, body: Any) -> AsyncIterator[bytes]:
            async for chunk in handler(peer_id, body):
                if method == "blob" and str(body.get("key", "")).startswith("state/"):
                    await injector.reach("download")
                    if injector.lies("truncated-state"):
                        yield chunk[: len(chunk) // 2]
                        return
                    if injector.step == "download" and injector.lies("corrupt"):
                        chunk = bytes(len(chunk))
                yield chunk

        on_stream(self, method, handle)

    said: dict[str, Any] = {}  # the last body of each kind of call
    flooded: set[str] = set()

    async def call_and_lie(self: Network, peer_id: str, method: str, body: Any, **options: Any) -> bytes:
        said[method] = body
        if peer_id not in flooded and injector.lies("flood"):
            flooded.add(peer_id)
            self.create_task(_flood(functools.partial(call, self, peer_id), said))
        if method == "heartbeat" and injector.lies("forged-record"):
            body = _forged(body)
        return await call(self, peer_id, method, body, **options)

    Network.on_call = on_call_and_fail  # type: ignore[method-assign]
    Network.on_stream = on_stream_and_fail  # type: ignore[method-assign]
    Network.call = call_and_lie  # type: ignore[method-assign]


async def _flood(call: Callable[..., Awaitable[bytes]], said: Mapping[str, Any]) -> None:
    """Genuine calls, so that nobody can refuse one for what it says. Without end, as the process has one."""
    while True:
        calls = [
            call(method, body, timeout_seconds=5.0)
            for method, body in list(said.items())
            for _ in range(FLOOD_CALLS)
        ]
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0)


def _forged(body: dict[str, str]) -> dict[str, str]:
    """Its own heartbeat, raised by a hundred rounds, with the old signature."""
    record = PeerRecord.model_validate_json(body["payload"])
    lie = record.model_copy(update={"round": record.round + 100, "commit": "f" * 64})
    return {**body, "payload": lie.canonical().decode()}


def _weigh_more() -> None:
    """Declare a billion examples: what counts is capped by the spec."""
    set_phase = Agreement.set_phase

    async def lie(self: Any, phase: Any, *, num_examples: int = 0, **options: Any) -> None:
        declared = 10**9 if num_examples else 0
        await set_phase(self, phase, num_examples=declared, **options)

    Agreement.set_phase = lie  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> int:
    own, rest = list(arguments[: arguments.index("--")]), list(arguments[arguments.index("--") + 1 :])
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--dump", type=Path, required=True)
    flags = parser.parse_args(own)
    flags.dump.mkdir(parents=True, exist_ok=True)
    install(Injector(flags.kind, flags.step, flags.dump))
    if flags.kind == "wrong-weight":
        _weigh_more()
    return int(importlib.import_module(rest[0]).main(rest[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
