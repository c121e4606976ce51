"""Where does a run come from? Made here from a model, or asked from an entry point and checked.

What is served to others, by every peer: the spec, the model's config and tokenizer files, and the
state, chunk by chunk. So the peer that began the run may go.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coordinator.dial_back import DialBack
from coordinator.errors import AccessError, ModelError, NetworkError, SpecError
from coordinator.network import Network, PeerRefuses, PeerUnreachable
from coordinator.outgoing import About
from coordinator.records import RecordError, parse_json
from coordinator.spec import MAX_SPEC_BYTES, RunSpec, load_spec, parse_spec, validate_spec
from coordinator.transfer import Piece, fetch_blob, serve_blobs
from peer.layout import CHUNK_SIZE_BYTES, StateManifest, TensorLayout, flat_bytes, make_manifest
from peer.model import check_revision, load_backbone, model_files, name_in_spec, resolve_model, shared_bytes
from peer.outer import OUTER_OPTIMIZERS, buffer_names
from peer.state import kept_run, replace_directory

logger = logging.getLogger(__name__)

CALL_TIMEOUT_SECONDS = 10.0
MAX_STATES_ON_DISK = 4  # whose manifests are kept: two checkpoints, and those before them
NUM_ATTEMPTS = 4  # of a question that may be asked twice: a connection may break
DOWNLOAD_TIMEOUT_SECONDS = 24 * 3600.0  # a stalled donor is left after 10 s; this only bounds the whole


@dataclass(frozen=True)
class State:
    """A backbone with everything that is needed to check it and to serve it."""

    manifest: StateManifest
    flat: torch.Tensor  # (num_values,) float32; never changed in place once it is here

    @property
    def state_hash(self) -> str:
        return self.manifest.state_hash

    @property
    def backbone(self) -> torch.Tensor:
        """(num_parameters,) float32, a view: the state without the outer optimizer's buffers."""
        return self.flat[: self.manifest.layout.backbone.num_values]

    @classmethod
    def of(cls, layout: TensorLayout, flat: torch.Tensor) -> State:
        return cls(make_manifest(layout, flat), flat)


class StatesOnDisk:
    """States that are mapped files, hashed once each: it takes 72 ms for 90 MB, and every piece asks.

    For any thread but the network's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._manifests: OrderedDict[str, StateManifest | None] = OrderedDict()  # None: not what it should be

    def state(self, state_hash: str, layout: TensorLayout, flat: torch.Tensor) -> State | None:
        """None when `flat` (num_values,) does not have this hash."""
        with self._lock:  # who asks for the same meanwhile waits
            if state_hash not in self._manifests:
                found = make_manifest(layout, flat)
                self._manifests[state_hash] = found if found.state_hash == state_hash else None
            self._manifests.move_to_end(state_hash)
            if len(self._manifests) > MAX_STATES_ON_DISK:
                self._manifests.popitem(last=False)
            manifest = self._manifests[state_hash]
        return None if manifest is None else State(manifest, flat)


def make_run(
    model: str,
    revision: str | None,
    options: dict[str, Any],
    base_dir: Path,
    *,
    source: str = "the run to begin",
) -> tuple[RunSpec, State]:
    """A new run of `model`: its spec and round 0. The model's data files are copied to `base_dir`.

    `options`: the remaining keys of the spec. Raises ModelError, SpecError, UsageError.
    """
    check_revision(model, revision)
    model_dir = resolve_model(model, revision)
    layout, backbone = load_backbone(model_dir)
    outer = options.get("outer_optimizer", "plain")
    state = first_state(layout, backbone, outer if outer in OUTER_OPTIMIZERS else "plain")  # told below
    files = model_files(model_dir)
    spec = validate_spec(
        {
            "model": name_in_spec(model),
            "revision": revision,
            "backbone_hash": state.state_hash,
            "num_parameters": layout.num_values,
            "files": {name: {"sha256": f.sha256, "size_bytes": f.size_bytes} for name, f in files.items()},
            **options,
        },
        source=source,
    )
    copy_files(spec, model_dir, base_dir)
    return spec, state


def serve_run(
    network: Network,
    spec: RunSpec,
    base_dir: Path,
    find_state: Callable[[str], State | None],
    find_evidence: Callable[[str], memoryview | None] = lambda _: None,
) -> None:
    """Answer others who ask for the spec, the model's files, a state by its hash, or evidence by its hash;
    and who ask to be dialled back.

    `find_state` and `find_evidence` are called in other threads than the network's: they may read a disk.
    """

    DialBack(network, spec.digest).start()

    async def on_spec(_peer_id: str, _body: Any) -> bytes:
        return spec.to_toml().encode()

    async def on_manifest(_peer_id: str, body: Any) -> bytes:
        wanted = str(body.get("state")) if isinstance(body, dict) else ""
        state = await asyncio.to_thread(find_state, wanted)
        if state is None:
            raise RecordError("not held here")
        manifest = state.manifest
        return json.dumps({"layout": manifest.layout.to_json(), "chunks": manifest.chunk_hashes}).encode()

    @functools.lru_cache(maxsize=len(spec.files))
    def read_file(name: str) -> memoryview:
        return memoryview((base_dir / name).read_bytes())

    served: dict[str, StateManifest] = {}  # the state that was asked for last, by its hash

    def open_blob(key: str) -> memoryview | None:
        kind, _, name = key.partition("/")
        if kind == "state":
            state = find_state(name)
            if state is None:
                return None
            if name not in served:
                served.clear()
                served[name] = state.manifest
            return flat_bytes(state.flat)
        if kind == "evidence":
            return find_evidence(name)
        if kind == "file" and name in spec.files:
            return read_file(name)
        return None

    def about(key: str, start: int, stop: int) -> About:
        kind, _, name = key.partition("/")
        manifest = served.get(name) if kind == "state" else None
        if manifest is not None:
            return about_chunk(manifest, start, stop)
        file = spec.files.get(name) if kind == "file" else None
        is_whole = file is not None and (start, stop) == (0, file.size_bytes)
        known = bytes.fromhex(file.sha256) if file is not None and is_whole else b""
        return About(kind="model file" if kind == "file" else kind, of=name, sha256=known)

    network.on_call("spec", on_spec)
    network.on_call("manifest", on_manifest)
    serve_blobs(network, spec.digest, open_blob, about)


def about_chunk(manifest: StateManifest, start: int, stop: int) -> About:
    """Of bytes of a state; the hash of a whole chunk is known."""
    index, offset = divmod(start, CHUNK_SIZE_BYTES)
    is_chunk = offset == 0 and stop == min(start + CHUNK_SIZE_BYTES, manifest.layout.size_bytes)
    return About(
        kind="state chunk",
        of=manifest.state_hash,
        values=(start // 4, -(-stop // 4)),
        sha256=bytes.fromhex(manifest.chunk_hashes[index]) if is_chunk else b"",
    )


def ask_spec(network: Network, peer_ids: Sequence[str], digest: str | None) -> RunSpec:
    """The spec from the first entry point that gives a valid one; with `digest`, the first of that run.

    Raises SpecError when there are only others, NetworkError when nobody answers, AccessError when a private
    run does not let this peer in.
    """
    refused: SpecError | AccessError | None = None
    for peer_id in peer_ids:
        try:
            reply = network.run(
                network.call(
                    peer_id, "spec", None, timeout_seconds=CALL_TIMEOUT_SECONDS, num_attempts=NUM_ATTEMPTS
                ),
                timeout_seconds=(NUM_ATTEMPTS + 1) * CALL_TIMEOUT_SECONDS,
            )
        except PeerRefuses as error:
            refused = AccessError(f"{error}; ask the organizer of the run for an invite: --invite STRING")
            continue
        except PeerUnreachable as error:
            logger.warning("no run spec from an entry point: %s", error)
            continue
        try:
            spec = parse_spec(reply[: MAX_SPEC_BYTES + 1], source=f"the run spec of peer {peer_id[-8:]}")
        except SpecError as error:
            refused = error
            continue
        if digest is None or spec.digest == digest:
            return spec
        refused = SpecError(
            f"peer {peer_id[-8:]} is in run {spec.digest}, not in the wanted one ({digest}); "
            "check the address and the digest with whoever invited you"
        )
    raise refused or NetworkError(
        "no entry point gave its run spec; is it a peer of this program? Try another peer's address"
    )


def get_model_files(
    network: Network,
    spec: RunSpec,
    base_dir: Path,
    donors: Sequence[str],
    *,
    check: Callable[[], None] = lambda: None,
) -> Path | None:
    """Config and tokenizer, from where they are: `base_dir`, the model's path or hub, else the peers.

    Returns the directory of the model where it was found locally or on the hub (it has weights,
    too), None when the files came from peers. Every file is checked against the spec.
    Raises NetworkError when nobody has them. `check` is called while waiting, and may raise.
    """
    if has_files(spec, base_dir):
        return _local_model(spec)
    model_dir = _local_model(spec)
    if model_dir is not None:
        copy_files(spec, model_dir, base_dir)
        return model_dir
    replace_directory(base_dir, lambda directory: _download_files(network, spec, donors, directory, check))
    return None


def get_state(
    network: Network,
    spec: RunSpec,
    state_hash: str,
    donors: Sequence[str],
    on_progress: Callable[[int, int], None],
    *,
    check: Callable[[], None] = lambda: None,
) -> State:
    """Download a state and check it, chunk by chunk. Raises NetworkError when no donor has all of it.

    `check` is called while waiting, and may raise to end it.
    """
    manifest = _get_manifest(network, spec, state_hash, donors)
    total = manifest.layout.size_bytes
    pieces = [
        Piece(i * CHUNK_SIZE_BYTES, min(CHUNK_SIZE_BYTES, total - i * CHUNK_SIZE_BYTES), chunk_hash)
        for i, chunk_hash in enumerate(manifest.chunk_hashes)
    ]
    fetch = fetch_blob(
        network,
        spec.digest,
        f"state/{state_hash}",
        pieces,
        donors,
        on_progress=lambda done: on_progress(done, total),
    )
    data = network.run(fetch, timeout_seconds=DOWNLOAD_TIMEOUT_SECONDS, check=check)
    return State(manifest, torch.frombuffer(data, dtype=torch.float32))


def kept_spec(output_dir: Path) -> RunSpec | None:
    """Of the run that a directory holds and `join` resumes; nothing is written.

    Raises SpecError, StateError.
    """
    file = output_dir / "run.toml"
    return load_spec(file) if kept_run(output_dir) is not None and file.exists() else None


def first_state(layout: TensorLayout, backbone: torch.Tensor, outer_optimizer: str) -> State:
    """Round 0: the pretrained backbone (num_parameters,), and zeros for the outer optimizer's buffers."""
    names = buffer_names(outer_optimizer)
    if not names:
        return State.of(layout, backbone)
    zeros = torch.zeros(len(names) * backbone.numel(), dtype=torch.float32)
    return State.of(layout.with_buffers(names), torch.cat([backbone, zeros]))


def load_first_state(spec: RunSpec, model_dir: Path) -> State | None:
    """Round 0 from the pretrained weights of `model_dir`; None when they are not those of the spec."""
    state = first_state(*load_backbone(model_dir), spec.outer_optimizer)
    if state.state_hash != spec.backbone_hash:
        logger.warning("the weights in %s are not those of the run; asking the peers", model_dir)
        return None
    return state


def _get_manifest(network: Network, spec: RunSpec, state_hash: str, donors: Sequence[str]) -> StateManifest:
    for donor in donors:
        try:
            reply = network.run(
                network.call(
                    donor,
                    "manifest",
                    {"state": state_hash},
                    timeout_seconds=CALL_TIMEOUT_SECONDS,
                    num_attempts=NUM_ATTEMPTS,
                ),
                timeout_seconds=(NUM_ATTEMPTS + 1) * CALL_TIMEOUT_SECONDS,
            )
            manifest = _parse_manifest(reply)
        except (PeerUnreachable, RecordError, ValueError) as error:
            logger.warning("no state from %s: %s", donor[-8:], error)
            continue
        if manifest.state_hash == state_hash and _is_layout_of(spec, manifest.layout):
            return manifest
        logger.warning("no state from %s: its chunks do not belong to the state", donor[-8:])
    raise NetworkError(f"none of {len(donors)} peers holds the state {state_hash[:12]}")


def _is_layout_of(spec: RunSpec, layout: TensorLayout) -> bool:
    backbone = layout.backbone
    return backbone.num_values == spec.num_parameters and layout == backbone.with_buffers(
        buffer_names(spec.outer_optimizer)
    )


def _parse_manifest(reply: bytes) -> StateManifest:
    value = parse_json(reply, max_bytes=len(reply))
    if not isinstance(value, dict) or set(value) != {"layout", "chunks"}:
        raise RecordError("a manifest holds layout and chunks")
    layout = TensorLayout.from_json(value["layout"])
    chunks = value["chunks"]
    if (
        not isinstance(chunks, list)
        or len(chunks) != layout.num_chunks
        or not all(isinstance(c, str) for c in chunks)
    ):
        raise RecordError("the chunk hashes do not fit the layout")
    return StateManifest(layout=layout, chunk_hashes=tuple(chunks))


def _local_model(spec: RunSpec) -> Path | None:
    try:
        model_dir = resolve_model(spec.model, spec.revision)
    except ModelError as error:
        logger.info("the model is not to be had here: %s", error)
        return None
    if has_files(spec, model_dir):
        return model_dir
    logger.warning("the model in %s is not the one of the run; asking the peers", model_dir)
    return None


def has_files(spec: RunSpec, directory: Path) -> bool:
    """Whether config and tokenizer of the run are there, each with its hash."""
    return all(run_file(spec, directory, name) is not None for name in spec.files)


def run_file(spec: RunSpec, directory: Path, name: str) -> bytes | None:
    """What the run has under this name, from a directory of the model; None where it has other content.

    A run that an earlier version began shares its files as they are.
    """
    path = directory / name
    if not path.is_file():
        return None
    for content in (shared_bytes(path), path.read_bytes()):
        if hashlib.sha256(content).hexdigest() == spec.files[name].sha256:
            return content
    return None


def copy_files(spec: RunSpec, model_dir: Path, base_dir: Path) -> None:
    def write(directory: Path) -> None:
        for name in spec.files:
            content = run_file(spec, model_dir, name)
            if content is None:
                raise ModelError(f"{model_dir / name} has changed while it was read: try again")
            (directory / name).write_bytes(content)

    if not has_files(spec, base_dir):
        replace_directory(base_dir, write)


def _download_files(
    network: Network, spec: RunSpec, donors: Sequence[str], directory: Path, check: Callable[[], None]
) -> None:
    for name, file in spec.files.items():
        piece = Piece(0, file.size_bytes, file.sha256)
        fetch = fetch_blob(network, spec.digest, f"file/{name}", [piece], donors)
        data = network.run(fetch, timeout_seconds=DOWNLOAD_TIMEOUT_SECONDS, check=check)
        (directory / name).write_bytes(data)
