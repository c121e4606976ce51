"""An entry point: begins a run, or takes up one begun earlier, and serves its spec, files and first state."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from coordinator.admission import admission_of, check_own
from coordinator.agreement import Agreement
from coordinator.beginning import WITNESS_NAME, Beginning
from coordinator.board import BoardValidator
from coordinator.chain import Chain
from coordinator.errors import SpecError, UsageError
from coordinator.identity import load_identity
from coordinator.network import Network, NetworkConfig
from coordinator.organizer import first_invite
from coordinator.spec import RunSpec, load_spec, validate_spec
from peer.config import Reachability
from peer.display import Reporter
from peer.genesis import State, copy_files, has_files, load_first_state, make_run, serve_run
from peer.ledger_file import LEDGER_NAME, Ledger
from peer.model import name_in_spec, resolve_model
from peer.state import CheckpointStore, recover_directory, write_text
from peer.stopping import StopRequested, StopSwitch

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
_COMPUTED_KEYS = ("backbone_hash", "num_parameters", "files")


class EntryPoint:
    def __init__(
        self,
        output_dir: Path,
        values: dict[str, Any],
        *,
        explicit: dict[str, Any],
        source: str,
        identity_path: Path,
        host_maddrs: tuple[str, ...],
        announce_maddrs: tuple[str, ...],
        reachability: Reachability,
        organizer_key: Path,
        reporter: Reporter,
        stop: StopSwitch,
    ) -> None:
        """`values`: keys of the spec, from `source`; `explicit`: those that the person chose now."""
        self._source = source
        self._dir, self._values, self._explicit = output_dir, values, explicit
        self._identity_path, self._reporter, self._stop = identity_path, reporter, stop
        self._maddrs, self._reachability = (host_maddrs, announce_maddrs), reachability
        self._organizer_key = organizer_key

    def serve(self) -> None:
        """Until told to stop, or until the run is over. Raises SwarmError."""
        with CheckpointStore(self._dir):  # one process per directory
            recover_directory(self._dir / "base")
            identity = load_identity(self._identity_path)
            is_new = not (self._dir / "run.toml").exists()
            spec, state = self._open_run(identity.peer_id)
            admission = admission_of(spec, None, identity, self._dir, self._organizer_key)
            config = NetworkConfig(
                identity,
                host_maddrs=self._maddrs[0],
                announce_maddrs=self._maddrs[1],
                reachability=self._reachability,
                admission=admission,
            )
            with Ledger(self._dir / LEDGER_NAME) as ledger, Network(config, ledger.sent) as network:
                ledger.know(spec.digest, state.manifest.layout)
                beginning = Beginning(spec, identity, self._dir / WITNESS_NAME, is_new=is_new)
                agreement = Agreement(network, identity, Chain(spec), serves_only=True, beginning=beginning)
                find = {state.state_hash: state}.get
                serve_run(network, spec, self._dir / "base", find)
                validator = BoardValidator(spec.digest, admission=admission)
                network.run(network.start_dht(validator), timeout_seconds=60.0)
                network.run(agreement.start(), timeout_seconds=15.0)
                addresses = network.run(network.addresses(), timeout_seconds=15.0)
                invite = first_invite(spec, self._organizer_key, addresses, self._dir)
                self._reporter.started(addresses, spec.digest, invite=invite)
                try:
                    reason = self._watch(network, agreement)
                except StopRequested as stopped:
                    reason = str(stopped)
                network.run(agreement.leave(), timeout_seconds=15.0)
            self._reporter.stopped(agreement.chain.round, reason)

    def _watch(self, network: Network, agreement: Agreement) -> str:
        """Follow the chain, telling which rounds are committed; returns when the run is over."""
        beginning = agreement.membership.beginning
        is_to_tell = beginning.watches
        while True:
            self._stop.wait(WATCH_SECONDS)
            if network.admission is not None:
                check_own(network.admission)
            found = network.run(agreement.better_chain(), timeout_seconds=60.0)
            if found is not None:
                chain = found[0]
                commit = chain.commits[-1].commit
                what = f"by {len(commit.contributors)} peers" if commit.contributors else "as a roll-back"
                self._reporter.note(f"round {chain.round} was committed {what}")
                network.run(_follow(agreement, chain), timeout_seconds=15.0)
            if is_to_tell and beginning.witness is not None:
                self._reporter.note("the first round is signed as the run's: this process may end now")
                is_to_tell = False
            if agreement.chain.round >= agreement.chain.spec.num_rounds and not agreement.live():
                return "the run is over"

    def _open_run(self, starter: str) -> tuple[RunSpec, State]:
        path = self._dir / "run.toml"
        if path.exists():
            return self._reopen(load_spec(path))
        complete = all(key in self._values for key in _COMPUTED_KEYS)
        options = {
            key: value
            for key, value in self._values.items()
            if key not in (*_COMPUTED_KEYS, "model", "revision")
        }
        options["starter"] = starter  # not that of another run, whose file is taken for a template
        spec, state = make_run(
            self._values["model"],
            self._values.get("revision"),
            options,
            self._dir / "base",
            source=self._source,
        )
        if complete:
            spec = self._as_written(spec)
        write_text(path, spec.to_toml())
        return spec, state

    def _as_written(self, made: RunSpec) -> RunSpec:
        """A spec file that holds the hashes of its model already. Raises SpecError for another model."""
        written = validate_spec(self._values, source=self._source)
        model_dir = resolve_model(written.model, written.revision)
        is_same = (made.backbone_hash, made.num_parameters) == (written.backbone_hash, written.num_parameters)
        if not is_same or not has_files(written, model_dir):
            raise SpecError(f"the model {written.model} is not the one whose hashes the spec file holds")
        copy_files(written, model_dir, self._dir / "base")
        return written

    def _reopen(self, spec: RunSpec) -> tuple[RunSpec, State]:
        stored = spec.model_dump(mode="json")
        explicit = dict(self._explicit)
        if stored["model"] != explicit.get("model") and "model" in explicit:
            explicit["model"] = name_in_spec(explicit["model"])
        changed = [key for key, value in explicit.items() if stored.get(key) != value]
        if changed:
            raise UsageError(
                f"{self._dir} holds the run {spec.run_name} already, with another {', '.join(changed)}; "
                "a run's spec is frozen: choose another --output-dir for a new run"
            )
        self._reporter.note(f"serving the run {spec.run_name} again, which was begun in {self._dir}")
        state = load_first_state(spec, resolve_model(spec.model, spec.revision))
        if state is None:
            raise SpecError(f"the model {spec.model} has changed since the run {spec.run_name} was begun")
        return spec, state


async def _follow(agreement: Agreement, chain: Chain) -> None:
    agreement.adopt(chain)
    await agreement.set_phase("serving")  # said to all at once: peers that are done wait for it
