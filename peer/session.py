"""The round, top to bottom: the only module in which network and training meet.

enter:   spec -> data -> state (own checkpoint, the swarm's, or the pretrained one)
round:   catch up -> evaluate and start the head -> finetune -> ready -> fuse -> commit -> keep
leave:   linger until the others have the state -> say goodbye
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from coordinator.admission import admission_of, check_own
from coordinator.agreement import Agreement, Committed, Fused, Group, LeftAlone, Overtaken
from coordinator.beginning import WITNESS_NAME, Beginning
from coordinator.board import BoardValidator
from coordinator.chain import Chain, build_chain
from coordinator.errors import AccessError, NetworkError, SpecError, StateError, SwarmError, UsageError
from coordinator.identity import load_identity
from coordinator.network import Network, NetworkConfig
from coordinator.organizer import first_invite
from coordinator.records import Exclusion, Promise, RecordError, SignedCommit, parse_json, parse_record
from coordinator.rounds import CatchUp, Finetune, Stop, trains_on
from coordinator.spec import RunSpec, load_spec
from coordinator.streams import Traffic
from peer.about import About, device_name
from peer.accusations import RunRules
from peer.allreduce import AllReduceService, Reduced, Rules, ToldTwoThings
from peer.audit import AuditService, RoundRecord
from peer.compression import CODECS
from peer.config import PeerConfig
from peer.contradiction import Contradiction
from peer.data import TaskData
from peer.display import Accuracy, ProgressBar, Reporter, log_dropped
from peer.evaluate import Probe
from peer.feedback import ErrorFeedback, cut_to_usual_norm
from peer.finetune import Budget
from peer.gatekeeper import AGREEING_SECONDS, GRACE_SECONDS, Gatekeeper
from peer.genesis import (
    State,
    StatesOnDisk,
    ask_spec,
    get_model_files,
    get_state,
    load_first_state,
    serve_run,
)
from peer.layout import TensorLayout
from peer.learner import Evaluation, Learner, Progress
from peer.ledger_file import LEDGER_NAME, Ledger
from peer.manifest import Outgoing, prepare
from peer.manners import Manners
from peer.memory import release_freed_memory
from peer.model import export_model
from peer.outer import outer_step
from peer.state import (
    ADDRESSES_NAME,
    CONVICTIONS_NAME,
    MAX_KNOWN_ADDRESSES,
    Checkpoint,
    CheckpointStore,
    Conviction,
    KeptModel,
    append_json_line,
    is_kept,
    kept_addresses,
    kept_convictions,
    kept_model,
    kept_score,
    recover_directory,
    repair_json_lines,
    replace_directory,
    write_model_card,
    write_task_card,
    write_text,
)
from peer.stopping import StopRequested, StopSwitch
from peer.tasks import held_out_digest

logger = logging.getLogger(__name__)

CATCH_UP_SECONDS = 60.0  # to learn which chain is the best one; some more than looking at all claims takes
SHORT_SECONDS = 15.0  # for what takes milliseconds in the network's thread
ENTRY_ATTEMPTS = 5
ROLLBACK_PAUSE_SECONDS = 2.0  # at random up to that, so that not all propose at once


@dataclass
class _RoundLog:
    """What `rounds.jsonl` says of a round; seconds by phase."""

    round: int
    seconds: dict[str, float] = field(default_factory=dict)
    num_examples: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    own: Evaluation | None = None

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(phase, time.monotonic() - started)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 4)


@dataclass
class _FuseClock:
    """Instants of one call of `fuse`, by time.monotonic(); of the last attempt where there were several."""

    started: float = field(default_factory=time.monotonic)
    reduce_started: float = 0.0
    reduce_ended: float = 0.0
    ended: float = 0.0
    is_reducing: bool = False

    def stop(self) -> None:
        self.ended = time.monotonic()


@dataclass(frozen=True)
class _Pending:
    """A state that this peer holds and the group may commit."""

    state: State
    reduced: Reduced | None  # None: computed by others, and downloaded
    group: str | None = None  # id of the attempt that it comes from


class Session:
    """One peer in one run, from entering to leaving. `run` returns the reason for which it ended."""

    def __init__(
        self,
        config: PeerConfig,
        data: TaskData,
        store: CheckpointStore,
        reporter: Reporter,
        stop: StopSwitch,
        manners: Manners,
    ) -> None:
        self._config, self._data, self._store = config, data, store
        self._reporter, self._stop, self._manners = reporter, stop, manners
        self._dir = config.output_dir
        self._pending: dict[str, _Pending] = {}  # states that may be committed yet, by hash
        self._states_on_disk = StatesOnDisk()
        self._promise_lock, self._num_promises, self._last_promise = threading.Lock(), 0, 0
        self._lies: set[tuple[str, int]] = set()  # who was convicted, and of which round
        self._audits: concurrent.futures.Future[None] | None = None  # the own ones, of the newest round
        self._undoing = ("", 0.0)  # the last round's commit, and since when, by time.monotonic()
        self._stands = ""  # the last round's commit, once it is too late to undo it
        self._outgoing: Outgoing | None = None  # of this round, until its audit is over
        self._feedback = ErrorFeedback()  # what compression cut off
        self._kept_delta: torch.Tensor | None = None  # of a round that was committed without it
        self._base: Evaluation | None = None  # of the current state
        self._is_entered = self._is_connected = False
        self._resting: str | None = None  # why, while manners forbid to go on
        self._log = _RoundLog(0)
        self._about = About(config.name, device_name(config.finetune.use_cpu), config.shares_metrics)
        self._rounds_left = config.num_rounds
        for name in ("model", "task_model", "base"):
            recover_directory(self._dir / name)
        for name in ("rounds.jsonl", CONVICTIONS_NAME):
            repair_json_lines(self._dir / name)
        self._held_out = held_out_digest(data.task, data.validation.to_dict())
        self._best_task_score = kept_score(self._dir / "task_model", data.task.metric_name, self._held_out)
        if self._best_task_score is None and (self._dir / "task_model").exists():
            reporter.note(
                "task_model/ was chosen on other held-out examples or labels: the next one takes its place"
            )

    def run(self, spec: RunSpec | None = None, first_state: State | None = None) -> str:
        """Take part until the run, this peer's rounds or its time are over, or it is told to stop.

        `spec` and `first_state` are given by the peer that begins the run. Raises SwarmError.
        """
        checkpoint = self._store.load()
        if spec is None and (self._dir / "run.toml").exists() and checkpoint is not None:
            spec = load_spec(self._dir / "run.toml")
        identity, organizer_key = load_identity(self._config.identity_file), self._config.organizer_key
        self._admission = admission_of(spec, self._config.invite, identity, self._dir, organizer_key)
        is_over = False  # not told to stop: there is time to look at what came of it
        with (
            Ledger(self._dir / LEDGER_NAME) as self._ledger,
            Network(self._network_config(), self._about.counting(self._ledger.sent)) as self._network,
        ):
            try:
                self._enter(spec, first_state, checkpoint)
                reason = self._take_part()
            except StopRequested as stopped:
                reason = str(stopped)
                self._save_checkpoint_if_entered()
            except AccessError:  # a private run does not let me in any more
                self._save_checkpoint_if_entered()
                self._say_goodbye()
                raise
            else:
                is_over = True
            self._leave()
        if is_over:
            self._score_test()
        self._reporter.stopped(self._round if self._is_connected else 0, reason)
        return reason

    # entering

    def _network_config(self) -> NetworkConfig:
        config = self._config
        return NetworkConfig(
            identity=load_identity(config.identity_file),
            host_maddrs=config.host_maddrs,
            listens=config.listens,
            reachability=config.reachability,
            announce_maddrs=config.announce_maddrs,
            initial_peers=config.initial_peers,
            remembered_peers=kept_addresses(self._dir),
            max_upload_bytes_per_second=config.max_upload_bytes_per_second,
            admission=self._admission,
        )

    def _enter(self, spec: RunSpec | None, first_state: State | None, checkpoint: Checkpoint | None) -> None:
        self.spec = spec = self._trusted_spec(spec)
        write_text(self._dir / "run.toml", spec.to_toml())
        identity = load_identity(self._config.identity_file)
        self._agreement = Agreement(
            self._network,
            identity,
            Chain(spec),
            about=self._about.record,
            remember=self._remember,
            initial_promise=_load_promise(self._dir / "promise.json"),
            obtain=self._obtain,
            holds=lambda state_hash: state_hash in self._pending,
            wants_rollback=lambda tip: self._wants_rollback() and tip == self._agreement.chain.tip,
            leaves_out=self._leaves_out,
            beginning=Beginning(spec, identity, self._dir / WITNESS_NAME, is_new=first_state is not None),
        )
        self._gatekeeper = Gatekeeper(
            spec, self._network, self._agreement, self._reporter, self._data.task.kind
        )
        self._audit = AuditService(
            self._network,
            spec.digest,
            RunRules.of(spec),
            convict=self._convict,
            live_peers=lambda: [member.peer_id for member in self._agreement.live()],
            phase_of=lambda peer: self._agreement.membership.live_phase(peer, Network.now()),
            chain=lambda: self._agreement.chain,
            slack=lambda peer, num_bytes: self._allreduce.slack_seconds(peer, num_bytes),
        )
        for known in kept_convictions(self._dir, spec.digest):
            # From before a restart. What it made is undone only if others show evidence: it is gone here.
            self._agreement.ban(known.peer, f"it lied in round {known.round}: {known.why}")
            self._audit.know(known.peer)
        serve_run(self._network, spec, self._dir / "base", self._find_state, self._audit.open_evidence)
        validator = BoardValidator(spec.digest, admission=self._admission)
        self._in_network(self._network.start_dht(validator), seconds=60.0)
        self._allreduce = AllReduceService(self._network, identity, spec.digest)
        self._in_network(self._allreduce.start())
        self._network.on_restart(self._allreduce.start)
        self._audit.start()
        self._in_network(self._agreement.start())
        self._is_connected = True
        self._state = self._enter_state(spec, first_state, checkpoint)
        self._ledger.know(spec.digest, self._layout)
        self._make_learner(checkpoint)
        self._is_entered = True
        addresses = self._in_network(self._network.addresses())
        if not self._config.initial_peers:
            invite = first_invite(spec, self._config.organizer_key, addresses, self._dir)
            self._reporter.started(addresses, spec.digest, invite=invite)
        self._reporter.joined(self._network.peer_id, addresses, self._round)
        self._save_checkpoint_if_entered()

    def _trusted_spec(self, own: RunSpec | None) -> RunSpec:
        """Of the run that this directory holds, or that begins here; else of the entry point's.

        Raises SpecError when --run names another one, StateError when the entry point is in another one.
        """
        wanted = self._config.run_digest
        if own is not None and wanted not in (None, own.digest):
            raise SpecError(f"{self._dir} holds the run {own.digest}, not {wanted}, which --run names")
        if not self._network.entry_points:
            if own is None:
                raise UsageError(
                    "there is no entry point to ask for the run, and none in the output directory"
                )
            return own
        try:
            spec = ask_spec(self._network, self._network.entry_points, own.digest if own else wanted)
        except SpecError as error:
            if own is None:
                raise
            raise StateError(
                f"{self._dir} holds the run {own.run_name}; {error}, or choose another --output-dir"
            ) from error
        if own is None and wanted is None:
            self._reporter.note(f"the entry point is in run {spec.run_name}, digest {spec.digest}")
        return spec

    def _enter_state(self, spec: RunSpec, first: State | None, checkpoint: Checkpoint | None) -> State:
        """The newest state there is: of the swarm, else of the own checkpoint, else the first one."""
        donors = tuple(self._network.entry_points) + tuple(m.peer_id for m in self._agreement.live())
        model_dir = get_model_files(self._network, spec, self._dir / "base", donors, check=self._stop.check)
        if checkpoint is not None:
            chain = build_chain(spec, [parse_record(commit, SignedCommit) for commit in checkpoint.commits])
            first = State.of(checkpoint.layout, checkpoint.flat)
            if chain.state_hash != first.state_hash:
                raise StateError(
                    f"the checkpoint in {self._dir} holds another state than its last commit: "
                    "choose another --output-dir, and the state comes from the swarm"
                )
            self._in_network(self._adopt(chain))
            self._kept_delta = checkpoint.kept_delta
            self._feedback = ErrorFeedback.of(checkpoint.residual, checkpoint.residuals)
            self._reporter.note(f"resumed at round {chain.round}")
        for _ in range(ENTRY_ATTEMPTS - 1):
            try:
                return self._newest_state(spec, first, model_dir, donors)
            except NetworkError as error:  # the swarm may have moved on while it was downloaded
                logger.warning("%s; trying again", error)
                self._stop.wait(2.0)
        return self._newest_state(spec, first, model_dir, donors)

    def _newest_state(
        self, spec: RunSpec, first: State | None, model_dir: Path | None, donors: tuple[str, ...]
    ) -> State:
        found = self._in_network(self._agreement.better_chain(), seconds=CATCH_UP_SECONDS)
        if found is not None:
            chain, holders = found
            state = self._get_state(chain, holders)
            self._feedback.forget_reduced()
            self._in_network(self._adopt(chain))
            return state
        if first is None and model_dir is not None:
            first = load_first_state(spec, model_dir)
        return first or self._get_state(Chain(spec), self._agreement.donors(spec.backbone_hash) or donors)

    def _make_learner(self, checkpoint: Checkpoint | None) -> None:
        if self._config.num_threads is not None:
            torch.set_num_threads(self._config.num_threads)
        with self._reporter.progress("tokenizing", 1.0) as bar:
            self._learner = Learner(
                self._data,
                self._dir / "base",
                self._layout.backbone,
                self._state.backbone,
                self._config.finetune,
                eval_examples=self._config.eval_examples,
                seed=self._config.seed,
                on_progress=self._stop.checking(bar.update),
            )
        task = self._data.task.digest
        if checkpoint is not None and checkpoint.extra.get("task", task) != task:
            self._reporter.note("your labels are others than before: your head begins anew")
        elif checkpoint is not None and checkpoint.head:
            self._learner.load_head_state(checkpoint.head)

    # taking part

    @property
    def _round(self) -> int:
        return self._agreement.chain.round

    @property
    def _layout(self) -> TensorLayout:
        return self._state.manifest.layout

    def _take_part(self) -> str:
        while True:
            self._stop.check()
            self._check_daemon()
            self._check_admission(within_seconds=self.spec.lease_seconds)
            if self._rounds_left is not None and self._rounds_left <= 0:
                return f"took part in {self._config.num_rounds} rounds"
            if self._wants_rollback():
                self._roll_back()
                continue
            match self._agreement.decide():
                case Stop(reason=reason):
                    self._await_judgement()
                    if not (self._wants_rollback() or self._is_behind):
                        return reason
                case CatchUp():
                    self._catch_up()
                case Finetune() if self._must_rest:
                    self._rest()
                case Finetune():
                    self._one_round()
                case _:
                    self._in_network(self._agreement.set_phase("waiting"))
                    self._stop.wait(1.0)

    def _one_round(self) -> None:
        """Finetune from the committed state and fuse; ends with a commit, or overtaken by one."""
        self._log = log = _RoundLog(self._round + 1)
        self._reporter.round_started(log.round)
        self._ledger.round = log.round
        self._in_network(self._agreement.set_phase("finetuning", entered_at=Network.now()))
        base = self._evaluate_base(log)
        if self._kept_delta is not None:
            self._learner.load_backbone(self._state.backbone + self._kept_delta)
            self._kept_delta = None
        part = 0
        while True:
            self._finetune(log, part)
            self._await_verdict()
            if self._wants_rollback():
                self._base = None  # should the gate let go, this round begins anew, head included
                return
            if log.num_examples == 0 and self._agreement.is_overtaken:  # it rested all the time
                self._catch_up()
                return
            delta = self._learner.export_backbone()
            delta -= self._state.backbone
            outcome = None
            try:
                outcome = self._fuse(self._feedback.add_to(delta), log)
            finally:  # told to stop, or cut off, while it waits for the others: it is kept all the same
                self._keep_own(log, is_ending=outcome is None)
                if outcome is None:
                    self._take_unseen_commit(delta)
            if isinstance(outcome, LeftAlone):
                self._reporter.alone(log.round)
                part += 1
                self._stop.wait(0.5)
                continue
            if isinstance(outcome, Committed) and outcome.kind == "rollback":
                self._catch_up()  # what I finetuned started from the state that is undone
            elif isinstance(outcome, Committed):
                self._commit(outcome, delta, base, log)
            elif self._wants_rollback():
                self._base = None
            else:
                self._keep_delta(delta)
                self._catch_up()
            return

    def _evaluate_base(self, log: _RoundLog) -> Evaluation:
        if self._base is None:
            with log.timed("evaluate_base"), self._progress(log, "evaluating the base model", 1.0) as bar:
                self._learner.load_backbone(self._state.backbone)
                self._base = self._learner.evaluate_base(
                    log.round, on_progress=self._stop.checking(bar.update)
                )
            self._keep_base(self._base)
        return self._base

    def _await_verdict(self) -> None:
        """No round is built on one that may be undone. There mostly is a verdict before finetuning begins."""
        while not (self._gatekeeper.is_settled(self._agreement.chain) or self._agreement.is_overtaken):
            self._stop.wait(0.1)
            self._check_daemon()

    def _await_judgement(self) -> None:
        """Of the last round, whose state people will use: wait for the verdict and for the own audits."""
        ends_at = time.monotonic() + self.spec.gate_vote_seconds + GRACE_SECONDS
        while not (self._wants_rollback() or self._is_behind):
            is_audited = self._audits is None or self._audits.done() or time.monotonic() >= ends_at
            if is_audited and self._gatekeeper.is_settled(self._agreement.chain):
                return
            self._stop.wait(0.1)
            self._check_daemon()

    @property
    def _is_behind(self) -> bool:
        return isinstance(self._agreement.decide(), CatchUp)

    def _finetune(self, log: _RoundLog, part: int) -> None:
        log.own = None  # of the part before
        budget = Budget(self.spec.round_examples, self.spec.round_seconds)
        if part > 0:
            self._in_network(self._agreement.set_phase("finetuning"))
        with log.timed("finetune"), self._progress(log, "finetuning", 1.0) as bar:
            result = self._learner.finetune(
                budget,
                round_=log.round,
                part=part,
                should_stop=lambda: self._should_stop_training(part),
                on_progress=self._about.following(bar.update),
            )
        self._about.finetuned(result.num_examples, result.seconds)
        self._stop.check()
        log.num_examples += result.num_examples
        self._reporter.finetuned(log.round, log.num_examples, result.seconds)

    @property
    def _must_rest(self) -> bool:
        reason = self._manners.reason()
        if reason is None and self._resting is not None:
            self._reporter.resumed(self._round + 1)
        elif reason is not None and reason != self._resting:
            self._reporter.paused(self._round + 1, reason)
        self._resting = reason
        return reason is not None

    def _rest(self) -> None:
        """Use no processor until manners allow it, or the others have gone on: their state is taken over."""
        agreement = self._agreement
        self._in_network(agreement.set_phase("paused"))
        while self._must_rest and not self._wants_rollback():
            if isinstance(agreement.decide(), CatchUp | Stop):
                return
            self._stop.wait(0.5)
            self._check_daemon()
            self._check_admission()
            if agreement.is_overtaken:  # asked last: where nobody holds that chain any more, it rests on
                return

    def _should_stop_training(self, part: int) -> bool:
        """Told to stop, the round's deadline is near, the others have gone on, or a lone peer has company.

        Called after every step of the optimizer: where a pause begins, and ends.
        """
        agreement = self._agreement
        if not self._stop.is_set and self._must_rest:
            self._rest()
            self._in_network(agreement.set_phase("finetuning"))
        if (
            self._stop.is_set
            or self._wants_rollback()
            or agreement.is_overtaken
            or (self._admission is not None and self._admission.problem() is not None)
            or Network.now() >= agreement.training_deadline()
        ):
            return True
        tip = agreement.chain.tip
        return part > 0 and any(
            m.record.phase == "ready" and m.record.commit == tip for m in agreement.live()
        )

    # fusing

    def _fuse(self, delta: torch.Tensor, log: _RoundLog) -> Committed | Overtaken | LeftAlone:
        if not bool(torch.isfinite(delta).all()):
            self._reporter.warning(
                "finetuning diverged (values that are not finite): sitting this round out; "
                "try a lower --learning-rate"
            )
            return self._sit_out()
        if log.num_examples == 0:  # an empty contribution would only dilute a uniform mean
            self._reporter.warning("no time was left to finetune in this round: sitting it out")
            return self._sit_out()
        self._outgoing = self._encode(delta, log)
        self._in_network(self._agreement.set_phase("ready", num_examples=log.num_examples))
        clock = _FuseClock()
        future = self._network.submit(self._agreement.fuse(lambda group: self._reduce(group, log, clock)))
        future.add_done_callback(lambda _: clock.stop())
        try:
            # The own backbone is scored while the others get ready.
            with log.timed("evaluate_own"), self._progress(log, "evaluating the own backbone", 1.0) as bar:
                log.own = self._learner.evaluate_own(on_progress=self._after_reducing(clock, bar.update))
            with self._progress(log, "averaging with the others", None):
                outcome = self._wait_for(future)
        finally:
            future.cancel()
        if isinstance(outcome, Committed) and outcome.kind == "fuse":
            log.add("find_group", clock.reduce_started - clock.started)
            log.add("allreduce", clock.reduce_ended - clock.reduce_started)
            log.add("commit", clock.ended - clock.reduce_ended)
        return outcome

    def _encode(self, delta: torch.Tensor, log: _RoundLog) -> Outgoing:
        """Once, for all attempts of the round, while the others still finetune."""
        with log.timed("encode"):
            return prepare(
                delta,
                CODECS[self.spec.compression],
                load_identity(self._config.identity_file),
                run=self.spec.digest,
                round=log.round,
                previous=self._agreement.chain.tip,
            )

    async def _reduce(self, group: Group, log: _RoundLog, clock: _FuseClock) -> Fused:
        """In the network's thread: the all-reduce and the outer step; what is committed if all agree."""
        clock.reduce_started, clock.is_reducing = time.monotonic(), True
        spec = self.spec
        outgoing = self._outgoing
        if outgoing is None:
            raise StateError("an all-reduce without a contribution: `fuse` ran without `_encode`")
        has_gram = spec.gate and spec.gate_leaves_out == "most_deviant"
        self._audit.saw(group.round, group.members)
        rules = Rules(spec.aggregation, spec.screening, spec.exchange_limit_seconds, has_gram)
        try:
            reduced = await self._allreduce.reduce(group, outgoing, rules, residuals=self._feedback.reduced)
            state = await asyncio.to_thread(self._next_state, reduced.flat)
        except ToldTwoThings as error:
            self._network.create_task(self._audit.accuse(Contradiction(error.culprit, error.statements)))
            raise
        finally:
            clock.is_reducing = False
        clock.reduce_ended = time.monotonic()
        log.traffic = reduced.traffic
        self._about.received(reduced.traffic.num_bytes_received)
        self._hold(_Pending(state, reduced, group.group_id.hex()))
        self._reporter.fused(
            group.round,
            len(group.members),
            clock.reduce_ended - clock.reduce_started,
            reduced.traffic.num_bytes_sent,
            reduced.traffic.num_bytes_received,
        )
        return Fused(state.state_hash, reduced.contributions)

    def _next_state(self, fused: torch.Tensor) -> State:
        spec = self.spec
        flat = outer_step(
            spec.outer_optimizer,
            self._state.flat,
            fused,
            lr=spec.outer_lr,
            momentum=spec.outer_momentum,
            out=fused if fused.numel() == self._state.flat.numel() else None,
        )
        return State.of(self._layout, flat)

    def _hold(self, pending: _Pending) -> None:
        """Keep the newest result, and the one that I signed: the others may still commit it."""
        signed = self._agreement.locked_state_hash
        self._pending = {h: held for h, held in self._pending.items() if h == signed}
        self._pending[pending.state.state_hash] = pending

    def _after_reducing(self, clock: _FuseClock, on_progress: Progress) -> Progress:
        """Progress of a computation that stands still during the all-reduce: all others wait for that."""

        def progress(fraction: float) -> None:
            self._stop.check()
            while clock.is_reducing:
                self._stop.wait(0.02)
            on_progress(fraction)

        return progress

    def _sit_out(self) -> Overtaken:
        """Contribute nothing until the others have committed the round, or nobody is left who could."""
        agreement = self._agreement
        self._in_network(agreement.set_phase("waiting"))
        while not isinstance(agreement.decide(), CatchUp | Stop):
            self._stop.wait(1.0)
            self._check_daemon()
            if not any(trains_on(member, agreement.chain) for member in agreement.live()):
                break
        return Overtaken()

    def _wait_for(self, future: concurrent.futures.Future[Any]) -> Any:
        while True:
            try:
                return future.result(timeout=0.2)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                self._stop.check()
                self._check_daemon()
                self._check_admission()
                if self._wants_rollback():
                    return Overtaken()

    # what is promised, and what is undone

    async def _remember(self, promise: Promise) -> None:
        self._num_promises += 1
        await asyncio.to_thread(self._write_promise, promise, self._num_promises)

    def _write_promise(self, promise: Promise, number: int) -> None:
        """A caller that was cancelled has left its thread behind: an older promise must not come last."""
        with self._promise_lock:
            if number > self._last_promise:
                write_text(self._dir / "promise.json", promise.canonical().decode())
                self._last_promise = number

    async def _obtain(self, state_hash: str, donors: tuple[str, ...]) -> bool:
        """In the network's thread: a state that others computed, and that I am asked to sign."""
        try:
            state = await asyncio.to_thread(self._fetch, state_hash, donors)
        except (NetworkError, StopRequested) as error:
            logger.warning("a state to sign is not to be had: %s", error)
            return False
        self._hold(_Pending(state, None))
        return True

    def _convict(self, reducer: str, why: str, round_: int) -> None:
        """In the network's thread: an audit has proven that a reducer lied in a round."""
        self._reporter.warning(
            f"peer {reducer[-8:]} is excluded from the run: it lied in round {round_}: {why}"
        )
        self._agreement.ban(reducer, why)
        conviction = Conviction(run=self.spec.digest, peer=reducer, round=round_, why=why)
        append_json_line(self._dir / CONVICTIONS_NAME, conviction.model_dump())
        self._lies = self._lies | {(reducer, round_)}  # the other thread looks through the old one

    def _wants_rollback(self) -> bool:
        """Whether I want the state that I am at undone: one who made it has lied, or the gate says so."""
        chain = self._agreement.chain
        if not chain.commits or chain.is_rolled_back or chain.tip == self._stands:
            return False
        return self._has_liar(chain) or self._gatekeeper.is_rejected(chain)

    def _has_liar(self, chain: Chain) -> bool:
        """Whether one who made the tip has lied in its round.

        The lie may be older than the commit: a failed attempt showed it, and its value was signed again.
        """
        cohort = chain.commits[-1].commit.cohort
        return any(chain.round == round_ and liar in cohort for liar, round_ in self._lies)

    def _leaves_out(self) -> tuple[Exclusion, ...]:
        """Whom a roll-back of the tip names. A liar is banned anyway; nobody guesses who it was."""
        chain = self._agreement.chain
        return () if not chain.commits or self._has_liar(chain) else self._gatekeeper.leaves_out(chain)

    def _roll_back(self) -> None:
        """Propose it, or follow whoever does so before me."""
        self._in_network(self._agreement.set_phase("evaluating"))
        self._stop.wait(random.SystemRandom().uniform(0.0, ROLLBACK_PAUSE_SECONDS))
        tip = self._agreement.chain.tip
        if self._agreement.is_overtaken or isinstance(self._agreement.decide(), CatchUp):
            self._catch_up()
            if self._agreement.chain.tip != tip:  # else the claim was empty, and must not hold this up
                return
        chain, reason = self._agreement.chain, "a reducer lied"
        if self._has_liar(chain):
            if self._is_too_late(chain):
                return
        else:
            reason = self._gatekeeper.reason(chain)
            self._gatekeeper.tell_votes(chain)
            if not self._wants_rollback():  # let go
                return
        limit = self.spec.exchange_limit_seconds
        self._in_network(self._agreement.roll_back(reason), seconds=limit)
        self._catch_up()

    def _is_too_late(self, chain: Chain) -> bool:
        """Whether the lie in the last round stands: after some time, as who has left agrees to nothing."""
        if chain.round < self.spec.num_rounds:
            return False
        tip, since = self._undoing
        if tip != chain.tip:
            self._undoing = (chain.tip, time.monotonic())
        elif time.monotonic() > since + AGREEING_SECONDS:
            self._stands = chain.tip
            self._reporter.warning(
                f"a reducer lied in round {chain.round}, and it stands: too few peers are left to undo it"
            )
        return self._stands == chain.tip

    # after a commit

    def _commit(self, committed: Committed, delta: torch.Tensor, base: Evaluation, log: _RoundLog) -> None:
        own = log.own
        pending = self._pending.get(self._agreement.chain.state_hash)
        if pending is None or own is None:
            raise StateError("a commit without a result: `fuse` ran without `_reduce`")
        self._count_as_sent(delta, pending)
        self._set_state(pending.state)
        self._begin_judging(pending)
        log_dropped(self._agreement.chain.commits[-1].commit)
        self._in_network(self._agreement.set_phase("evaluating", entered_at=Network.now()))
        with log.timed("save"):
            self._save_checkpoint_if_entered()
            self._export_model()
            self._ledger.flush()
        self._unload()
        self._audits = self._network.submit(self._audit_round(committed.group.members))
        try:
            self._evaluate_fused(log)
            if self._base is not None:
                self._gatekeeper.vote(base, self._base)
        finally:  # told to stop meanwhile: the round happened all the same
            self._tell_committed(committed, base, own, log)
            self._outgoing = None
        if self._rounds_left is not None:
            self._rounds_left -= 1

    def _take_unseen_commit(self, delta: torch.Tensor) -> None:
        """The network's thread may have committed the round while this one was told to stop.

        Then it happened: with its commit and the state before, a checkpoint would start from the wrong state,
        and with error feedback that auditors take for a lie.
        """
        with suppress(NetworkError, concurrent.futures.CancelledError):
            self._in_network(asyncio.sleep(0))  # behind it `fuse` is cancelled, and no commit comes later
        pending = self._pending.get(self._agreement.chain.state_hash)
        if pending is None or self._agreement.chain.state_hash == self._state.state_hash:
            return
        self._count_as_sent(delta, pending)
        self._set_state(pending.state)
        try:
            self._export_model()
        except (StateError, OSError, SafetensorError) as error:  # must not hide what ends this peer
            logger.error("the model of round %d is not written: %s", self._round, error)

    def _begin_judging(self, pending: _Pending) -> None:
        chain, reduced = self._agreement.chain, pending.reduced
        if reduced is None or pending.group != chain.commits[-1].commit.group:
            self._gatekeeper.begin(chain)
        else:
            self._gatekeeper.begin(chain, was_there=True, gram=reduced.gram)

    async def _audit_round(self, members: Sequence[str]) -> None:
        """In the network's thread: what others were told, and some parts computed again; neither waits."""
        await asyncio.gather(
            self._compare_statements(members),
            self._audit.audit(self.spec.audit_parts, random.SystemRandom()),
        )

    async def _compare_statements(self, members: Sequence[str]) -> None:
        try:
            await self._allreduce.compare_statements(members)
        except ToldTwoThings as error:
            await self._audit.accuse(Contradiction(error.culprit, error.statements))

    def _keep_delta(self, delta: torch.Tensor) -> None:
        """What no commit holds: the next finetuning starts with it, cut to the norm that others had."""
        self._kept_delta = cut_to_usual_norm(delta, self._agreement.chain)

    def _count_as_sent(self, delta: torch.Tensor, pending: _Pending) -> None:
        """What the commit holds of my delta is done; what compression cut off is kept for the next round."""
        commit = self._agreement.chain.commits[-1].commit
        mine = next((c for c in commit.contributors if c.peer == self._network.peer_id), None)
        if pending.group != commit.group:
            self._feedback.forget_reduced()
        reduced, outgoing = pending.reduced, self._outgoing
        if mine is None or outgoing is None:
            self._keep_delta(delta)
            return
        residuals = {} if reduced is None or pending.group != commit.group else reduced.residuals
        before = dict(self._feedback.reduced)
        self._feedback.committed(delta, outgoing, mine.missing, residuals)
        if self._feedback.sent is not None:  # all of the delta, where a rule has left it out
            self._feedback.sent = cut_to_usual_norm(self._feedback.sent, self._agreement.chain)
        if reduced is not None:
            self._audit.keep(
                RoundRecord(
                    round=commit.round,
                    aggregation=self.spec.aggregation,
                    screening=self.spec.screening,
                    outgoing=outgoing,
                    statements=reduced.statements,
                    manifests=reduced.manifests,
                    residuals_before=before,
                    group=pending.group or "",
                )
            )

    def _evaluate_fused(self, log: _RoundLog) -> None:
        with log.timed("evaluate_fused"), self._progress(log, "evaluating the fused backbone", 1.0) as bar:
            progress = self._stop.checking(self._about.following(bar.update))
            self._base = self._learner.evaluate_base(self._round + 1, on_progress=progress)
        with log.timed("save"):
            self._keep_base(self._base)

    def _tell_committed(
        self, committed: Committed, base: Evaluation, own: Evaluation, log: _RoundLog
    ) -> None:
        fused = None if self._base is None else self._base.head_only
        accuracy = Accuracy(base=base.head_only, own=own.head_only, fused=fused)
        self._write_round(committed, accuracy, log)
        self._about.scored(self._round, self._data.task.metric_name, accuracy)
        num_peers = len(committed.group.members)
        metric_name = self._data.task.metric_name
        self._reporter.committed(self._round, self._state.state_hash, num_peers, accuracy, metric_name)

    def _set_state(self, state: State) -> None:
        self._state, self._base = state, None
        self._pending.clear()
        self._learner.load_backbone(state.backbone)

    def _catch_up(self) -> None:
        try:
            found = self._in_network(self._agreement.better_chain(), seconds=CATCH_UP_SECONDS)
            if found is None:
                self._stop.wait(0.2)
                return
            chain, holders = found
            state = self._get_state(chain, holders)
        except NetworkError as error:
            logger.warning("%s; trying again", error)
            self._stop.wait(1.0)
            return
        if chain.is_rolled_back or any(
            self._network.peer_id in signed.commit.cohort for signed in chain.commits[self._log.round - 1 :]
        ):
            self._kept_delta = None  # my work of this round is in it already, or started from what is undone
        self._set_state(state)
        self._feedback.forget_reduced()
        self._in_network(self._adopt(chain))
        self._gatekeeper.begin(chain)
        self._save_checkpoint_if_entered()
        self._export_model()
        if chain.is_rolled_back:
            commit = chain.commits[-1].commit
            left_out = {exclusion.peer: exclusion.reason for exclusion in commit.excluded}
            self._reporter.rolled_back(chain.round, chain.state_hash, commit.reason, left_out)

    async def _adopt(self, chain: Chain) -> None:
        self._agreement.adopt(chain)
        await self._agreement.publish()

    def _get_state(self, chain: Chain, donors: tuple[str, ...]) -> State:
        """The state of a chain: held here (a roll-back's often is), or downloaded."""
        held = self._find_state(chain.state_hash)
        if held is not None:
            return held
        started = time.monotonic()
        state = self._fetch(chain.state_hash, donors)
        seconds = time.monotonic() - started
        self._reporter.caught_up(chain.round, state.state_hash, seconds, state.manifest.layout.size_bytes)
        return state

    def _fetch(self, state_hash: str, donors: tuple[str, ...]) -> State:
        with self._reporter.progress("downloading the state", 1.0) as bar:
            state = get_state(
                self._network,
                self.spec,
                state_hash,
                donors,
                lambda done, total: bar.update(done / total),
                check=self._stop.check,
            )
        self._about.received(state.manifest.layout.size_bytes)
        return state

    # keeping

    def _save_checkpoint_if_entered(self) -> None:
        if not self._is_entered:
            return
        chain = self._agreement.chain
        if chain.state_hash != self._state.state_hash:
            logger.error("the state is not that of the chain: the checkpoint before stays")
            return
        commits = tuple(signed.model_dump(mode="json") for signed in chain.commits)
        self._store.save(
            Checkpoint(
                run_digest=self.spec.digest,
                round=chain.round,
                layout=self._layout,
                flat=self._state.flat,
                commits=commits,
                head=self._learner.head_state(),
                kept_delta=self._kept_delta,
                residual=self._feedback.sent,
                residuals=self._feedback.reduced_by_name(),
                extra={"task": self._data.task.digest},
            )
        )
        addresses = [address for m in self._agreement.live() for address in m.record.addresses]
        if addresses:
            # who is silent now may be back when I am
            known = dict.fromkeys((*addresses, *kept_addresses(self._dir)))
            write_text(self._dir / ADDRESSES_NAME, json.dumps(list(known)[:MAX_KNOWN_ADDRESSES]))

    def _unload(self) -> None:
        """Read what the checkpoint holds from there when it is needed: finetuning needs the memory."""
        flat = self._store.map_state(self._state.state_hash)
        if flat is not None:
            self._state = State(self._state.manifest, flat)
        if self._feedback.sent is not None:
            self._feedback.sent = self._store.map_residual()
        release_freed_memory()

    # `task_model/` holds the best on the own held-out split so far. The candidate is in the learner.

    def _keep_own(self, log: _RoundLog, *, is_ending: bool) -> None:
        """Once it is scored. `is_ending`: something ends this peer, which a full disk must not hide."""
        if log.own is None:
            return
        what = "your own finetuned backbone with its head"
        try:
            self._keep_task_model(what, log.round, log.own.classifier)
        except (StateError, OSError, SafetensorError) as error:
            if not is_ending:
                raise
            logger.error("your own classifier of this round is not kept: %s", error)

    def _keep_base(self, base: Evaluation) -> None:
        what = "the fused backbone with a head fitted to it"
        if self._agreement.chain.state_hash == self.spec.backbone_hash:
            what = "the backbone that the run began with and a head fitted to it"
        self._keep_task_model(what, self._round, base.fitted, base.probe)

    def _keep_task_model(
        self, what: str, round_: int, score: float | None, probe: Probe | None = None
    ) -> None:
        if score is None or not is_kept(score, self._best_task_score):
            return
        metric_name = self._data.task.metric_name
        kept = KeptModel(what, round_, metric_name, score, self._learner.num_held_out, self._held_out)

        def write(directory: Path) -> None:
            self._learner.save_task_model(directory, probe)
            write_task_card(directory, kept)

        replace_directory(self._dir / "task_model", write)
        self._best_task_score = score

    def _score_test(self) -> None:
        """What the own classifier is worth, on examples by which none was chosen."""
        directory = self._dir / "task_model"
        kept = kept_model(directory)
        if kept is None or kept.held_out != self._held_out or self._learner.num_test == 0:
            return
        num_test = self._learner.num_test
        try:
            with self._reporter.progress("scoring task_model/ on the test examples", 1.0) as bar:
                score = self._learner.score_saved(directory, on_progress=self._stop.checking(bar.update))
            write_task_card(directory, replace(kept, test_score=score, num_test=num_test))
        except StopRequested:
            return
        except (SwarmError, OSError) as error:  # the run is over, and all else of it is kept
            logger.error("task_model/ is not scored on the test examples: %s", error)
            return
        self._reporter.tested(kept.metric_name, score, num_test)

    def _export_model(self) -> None:
        chain = self._agreement.chain
        commits = [signed.commit for signed in chain.commits]
        peers = sorted({peer for commit in commits for peer in commit.cohort})

        def write(directory: Path) -> None:
            export_model(self._dir / "base", self._layout.backbone, self._state.backbone, directory)
            write_model_card(
                directory,
                base_model=self.spec.model,
                base_revision=self.spec.revision,
                run_name=self.spec.run_name,
                spec_digest=self.spec.digest,
                round=chain.round,
                state_hash=self._state.state_hash,
                num_contributions=sum(len(commit.contributors) for commit in commits),
                peers=peers,
                commits=[commit.model_dump(mode="json") for commit in commits],
            )

        replace_directory(self._dir / "model", write)

    def _write_round(self, committed: Committed, accuracy: Accuracy, log: _RoundLog) -> None:
        own = self._network.peer_id
        commit = committed.chain.commits[-1].commit
        weights = {c.peer: c.weight for c in commit.contributors}
        append_json_line(
            self._dir / "rounds.jsonl",
            {
                "round": self._round,
                "state_hash": self._state.state_hash,
                "attempt": commit.attempt,
                "num_peers": len(weights),
                "peers": list(weights),
                "weight": weights.get(own, 0.0),
                "metric": self._data.task.metric_name,
                "accuracy": {"base": accuracy.base, "own": accuracy.own, "fused": accuracy.fused},
                "num_examples": log.num_examples,
                "seconds": log.seconds,
                "bytes_sent": log.traffic.num_bytes_sent,
                "bytes_received": log.traffic.num_bytes_received,
                "audit": asdict(self._audit.traffic),
                "partial": {c.peer: c.reason for c in commit.contributors if c.missing},
                "excluded": {e.peer: e.reason for e in commit.excluded},
                "gate": self._gatekeeper.told(),
            },
        )

    # leaving

    def _leave(self) -> None:
        """Serve the last state to those that lack it, then say goodbye; a signal cuts it short."""
        if not self._is_connected:
            return
        deadline = time.monotonic() + self._config.linger_seconds
        try:
            if not self._stop.is_set:
                self._in_network(self._agreement.set_phase("done"))
            while not self._stop.is_set and time.monotonic() < deadline and self._is_needed():
                self._stop.wait(0.2)
                if self._is_behind:
                    self._catch_up()  # who stayed has undone the last round
            self._in_network(self._agreement.leave())
        except StopRequested:
            logger.info("told to stop while lingering")
        except SwarmError as error:
            logger.warning("could not say goodbye: %s", error)

    def _say_goodbye(self) -> None:
        """Without lingering: nobody may ask me any more."""
        if self._is_connected:
            try:
                self._in_network(self._agreement.leave())
            except (SwarmError, StopRequested) as error:
                logger.info("could not say goodbye: %s", error)

    def _is_needed(self) -> bool:
        """Whether a live peer of the run has not confirmed my state."""
        tip = self._agreement.chain.tip
        behind = (member for member in self._agreement.live() if member.record.commit != tip)
        return any(member.record.round <= self._round for member in behind)

    # helpers

    def _progress(
        self, log: _RoundLog, what: str, total: float | None
    ) -> AbstractContextManager[ProgressBar]:
        return self._reporter.progress(f"round {log.round}: {what}", total)

    def _find_state(self, state_hash: str) -> State | None:
        """In memory, else in a checkpoint: the state before is on disk only. Not for the network's thread."""
        pending = self._pending.get(state_hash)
        if pending is not None:
            return pending.state
        if not self._is_entered:
            return None
        if self._state.state_hash == state_hash:
            return self._state
        try:
            flat = self._store.map_state(state_hash)
        except OSError:  # a newer checkpoint is taking its place this moment
            return None
        return None if flat is None else self._states_on_disk.state(state_hash, self._layout, flat)

    def _in_network(self, coroutine: Any, *, seconds: float = SHORT_SECONDS) -> Any:
        return self._network.run(coroutine, timeout_seconds=seconds)

    def _check_admission(self, *, within_seconds: float = 0.0) -> None:
        """Raises AccessError when the credential for a private run has expired, soon will, or was revoked."""
        if self._admission is not None:
            check_own(self._admission, within_seconds=within_seconds)

    def _check_daemon(self) -> None:
        if not self._network.is_daemon_alive():
            raise NetworkError(
                "the p2p daemon has died; the checkpoint is kept: start again with the same --output-dir"
            )


def _load_promise(path: Path) -> Promise | None:
    """What this peer promised before it was killed; None when there is nothing to read."""
    try:
        return parse_record(parse_json(path.read_bytes()), Promise)
    except (OSError, RecordError):
        return None
