"""Will it work here, before anything is spent? The flags of `peer.join`; nothing is written or published.

python -m peer.doctor --initial-peers ADDR [ADDR ...] --data FILE [--output-dir DIR] [any flag of join]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO, TypeVar

from coordinator.cli import Parser, default_run_name, run_main, spec_options
from coordinator.errors import EXIT_TERMINATED, SwarmError, UsageError
from peer.join import add_join_arguments, check_private, limit_threads, make_config, make_manners, read_flags

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from coordinator.spec import RunSpec
    from peer.checkup import Check, RoundBudget
    from peer.data import TaskData
    from peer.layout import TensorLayout
    from peer.probes import KeptRun
    from peer.swarm_probes import Asked, HeartbeatLog, ProbeNetwork

T = TypeVar("T")

EPILOG = """what is checked, one line each:
  python, packages    versions, against what the project needs
  resume              the run that --output-dir holds, if it holds one
  output, disk        whether the directory can be written, and has room
  memory, device      enough for this model; processor or GPU, bfloat16
  data, duplicates,   columns and sizes; rows in two splits; classes with one row;
  classes, length     rows that would be cut at --max-length
  p2p, entry point    the p2p daemon starts; each entry point by name
  run, clock          the run that they are in; your clock against theirs
  reachable           whether others can dial you
  model               its files and weights, against the hashes of the run
  speed, traffic      of a round, from a few real steps on your data and pieces of the state
  round               minutes and megabytes of one in all

nothing is written to --output-dir, nothing is published, nothing stays behind.
with --json: one object per line, {"check", "status", "message", "fix", "figures"}.

exit codes:
  0  all ok                     2  failures (and wrong flags): it will not work like this
  1  warnings: it works, read them   7  the invite is malformed or forged
  130 Ctrl-C, 143 SIGTERM
"""
LOCAL_SECONDS = 10.0  # deadlines of the checks; each is a failure of its own when it passes
DATA_SECONDS = 30.0
NETWORK_SECONDS = 30.0
MODEL_SECONDS = 25.0
SPEED_SECONDS = 30.0
PROBE_THREAD = "probe"
END_SECONDS = 5.0  # for a probe that was left behind


def main(argv: Sequence[str] | None = None) -> int:
    with _sigterm_as_exit():
        return run_main(lambda: _doctor(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m peer.doctor",
        usage="python -m peer.doctor [--initial-peers ADDR ...] --data FILE [option ...]",
        description="Will it work here, before anything is spent? Takes the flags of peer.join.",
        epilog=EPILOG,
    )
    add_join_arguments(parser, needs_output_dir=False)
    return read_flags(parser.parse(argv))


def _doctor(args: argparse.Namespace) -> int:
    limit_threads(args.threads)
    from peer.display import claim_stdout, setup_logging

    # Warnings of libraries would stand between the lines; what is wrong is said by a check.
    setup_logging("error" if args.log_level == "warning" else args.log_level, args.log_file)
    may_resume = args.output_dir is not None and (args.output_dir / "run.toml").exists()
    if not (args.initial_peers or args.model or may_resume):
        raise UsageError("give --initial-peers to look at a swarm, or --model to look at a run of your own")
    lines = Lines(claim_stdout() if args.json else None)
    examine(args, lines)
    lines.summary()
    return lines.exit_code


def examine(args: argparse.Namespace, lines: Lines) -> None:
    """All checks, each told to `lines` as soon as it is known; nothing is left behind, whatever happens."""
    folder = tempfile.TemporaryDirectory(prefix="cold-doctor-", ignore_cleanup_errors=True)
    with folder as path, ExitStack() as stack:
        Examination(args, Path(path), lines, stack).run()


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM leaves every `with` block: the daemon ends, the temporary folder goes."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Lines:
    """One line for each check, as soon as it is known: for people in columns, for scripts as JSON."""

    def __init__(self, json_stream: TextIO | None, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole

        self.checks: list[Check] = []
        self._json_stream = json_stream
        self._console = console or RichConsole(highlight=False, emoji=False)

    @property
    def exit_code(self) -> int:
        from peer.checkup import exit_code

        return exit_code(self.checks)

    def is_free_of(self, *names: str) -> bool:
        """Whether no check of such a name failed."""
        return not any(check.status == "failure" and check.name in names for check in self.checks)

    def add(self, check: Check) -> None:
        self.checks.append(check)
        if self._json_stream is not None:
            self._json_stream.write(json.dumps(check.to_json()) + "\n")
            self._json_stream.flush()
            return
        self._row(check.status, check.name, check.message)
        if check.status != "ok" and check.fix:
            self._row("", "", f"→ {check.fix}")

    def summary(self) -> None:
        if self._json_stream is not None:
            return
        counts = {status: sum(c.status == status for c in self.checks) for status in ("failure", "warning")}
        said = [f"{n} {status}{'s' if n > 1 else ''}" for status, n in counts.items() if n]
        verdict = {
            0: "it will work here",
            1: "it will work, but read the warnings",
            2: "it will not work yet",
        }
        self._console.print()
        self._console.print(f"{verdict[self.exit_code]}{': ' if said else ''}{', '.join(said)}")

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A moving line while it is looked at; on a terminal only."""
        if self._json_stream is not None or not self._console.is_terminal:
            yield
            return
        with self._console.status(f"{what} ..."):
            yield

    def _row(self, status: str, name: str, text: str) -> None:
        from rich.table import Table
        from rich.text import Text

        colour = {"ok": "green", "warning": "yellow", "failure": "bold red"}.get(status, "")
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for width in (7, 11, None):
            table.add_column(width=width)
        table.add_row(Text(status, style=colour), Text(name), Text(text, style="" if status else "italic"))
        self._console.print(table)


class Examination:
    """The checks in their order. One that needs what an earlier one did not find is left out."""

    def __init__(self, args: argparse.Namespace, folder: Path, lines: Lines, stack: ExitStack) -> None:
        """`stack` ends what is started here; `folder` is removed by the caller."""
        self._has_output_dir = args.output_dir is not None
        args.output_dir = args.output_dir or Path()
        self._args, self._config = args, make_config(args)
        make_manners(args)  # so that what `join` would refuse is refused here
        self._folder, self._lines, self._stack = folder, lines, stack
        self._worker = Worker()
        self._kept: KeptRun | None = None  # by --output-dir, to be resumed
        self._data: TaskData | None = None
        self._network: ProbeNetwork | None = None
        self._wanted: str | None = None  # digest of the run, once it is known
        self._asked: Asked | None = None
        self._donors: list[str] = []  # entry points that are in the run
        self._spec: RunSpec | None = None
        self._log: HeartbeatLog | None = None  # of a swarm whose run is known
        self._model_dir: Path | None = None  # config and tokenizer
        self._backbone: tuple[TensorLayout, torch.Tensor] | None = None
        self._speed: float | None = None  # examples/s

    def run(self) -> None:
        try:
            self._examine()
        finally:  # before what it works with is closed
            self._worker.end()

    def _examine(self) -> None:
        self._do("packages", LOCAL_SECONDS, self._versions)
        if any(check.name == "packages" and "missing" in check.message for check in self._lines.checks):
            return  # nothing else can be imported
        if self._has_output_dir:
            self._do("resume", LOCAL_SECONDS, self._look_for_run)
        self._do("data", DATA_SECONDS, self._examine_data)
        self._do("p2p", NETWORK_SECONDS, self._examine_network)
        if self._network is not None:
            self._wanted = self._config.run_digest if self._kept is None else self._kept.spec.digest
            self._do("entry point", NETWORK_SECONDS, self._examine_entries)
        begins = self._kept is None and not self._config.initial_peers and self._args.model is not None
        if begins:
            self._do("model", MODEL_SECONDS, self._examine_own_run)
        elif self._asked is not None and self._network is not None and self._network.entry_points:
            self._do("run", NETWORK_SECONDS, self._examine_run)
        elif self._kept is not None:
            self._do("run", LOCAL_SECONDS, self._examine_kept_run)
        if self._network is not None:
            self._do("reachable", NETWORK_SECONDS, self._examine_reach)
        self._do("machine", LOCAL_SECONDS, self._examine_machine)
        if self._spec is not None and not begins:
            self._do("model", MODEL_SECONDS, self._examine_model)
        if self._data is not None and self._model_dir is not None:
            self._do("length", DATA_SECONDS, self._examine_lengths)
        if self._backbone is not None and self._lines.is_free_of("memory", "device", "data"):
            self._do("speed", SPEED_SECONDS, self._examine_speed)
        if self._spec is not None:
            self._do("traffic", NETWORK_SECONDS, self._examine_traffic)
        if self._log is not None:
            self._do("clock", NETWORK_SECONDS, self._examine_clock)

    def _do(self, name: str, limit_seconds: float, probe: Callable[[], list[Check]]) -> None:
        """Each line of what `probe` finds; what it raises is a line, too."""
        from peer.checkup import failed, unmeasured_speed

        with self._lines.busy(f"looking at {name}"):
            try:
                checks = self._worker.run(probe, limit_seconds)
            except TimeoutError:
                why = f"no result within {limit_seconds:.0f} s; the machine may be too busy: try again"
                checks = [unmeasured_speed(limit_seconds) if name == "speed" else failed(name, why)]
            except SwarmError as error:
                checks = [failed(name, self._without_folder(str(error)))]
            except ImportError as error:
                checks = [failed(name, f"cannot import {error.name}; install the packages again")]
        for check in checks:
            self._lines.add(check)

    def _without_folder(self, text: str) -> str:
        return text.replace(str(self._folder), "the temporary folder")

    # the probes: each in the worker's thread, under a deadline

    def _versions(self) -> list[Check]:
        from peer.versions import check_versions

        return check_versions()

    def _look_for_run(self) -> list[Check]:
        from peer.checkup import Check, short_name
        from peer.probes import find_kept_run

        self._kept = find_kept_run(self._config)
        if self._kept is not None:
            if self._args.private:
                check_private(self._config)
            spec, round_ = self._kept.spec, self._kept.checkpoint.round
            name = short_name(spec.run_name, spec.digest)
            return [Check("resume", "ok", f"{name}, from round {round_}")]
        if not (self._config.initial_peers or self._args.model):
            what = f"{self._config.output_dir} holds no checkpoint to resume"
            raise UsageError(f"{what}; give --initial-peers or --model")
        return []

    def _examine_data(self) -> list[Check]:
        from peer.checkup import judge_data
        from peer.data import load_task_data
        from peer.probes import data_figures

        self._data = load_task_data(self._config.data)
        return judge_data(data_figures(self._data))

    def _examine_network(self) -> list[Check]:
        from peer.checkup import Check
        from peer.state import kept_addresses
        from peer.swarm_probes import make_network

        remembered = kept_addresses(self._config.output_dir) if self._has_output_dir else ()
        kept = None if self._kept is None else self._kept.spec
        network = make_network(self._config, self._folder, kept=kept, remembered=remembered)
        self._stack.enter_context(network)
        self._network = network
        return [Check("p2p", "ok", "the p2p daemon starts")]

    def _examine_entries(self) -> list[Check]:
        """Those that were dialled, and which run they are in. What is wrong with all is told by `run`."""
        from peer.checkup import judge_entries, judge_solitude
        from peer.swarm_probes import ask_entry_points

        assert self._network is not None
        network = self._network
        self._asked = asked = ask_entry_points(network)
        with suppress(SwarmError):
            self._wanted = asked.find(network, self._wanted).digest
        checks = judge_entries(
            asked.entries(network.answers), asked.entries(network.remembered), self._wanted
        )
        return [judge_solitude()] if self._kept is not None and not checks else checks

    def _examine_run(self) -> list[Check]:
        from peer.checkup import judge_swarm
        from peer.swarm_probes import DAEMON_SECONDS, HeartbeatLog, swarm_figures

        assert self._network is not None
        assert self._asked is not None
        self._spec = self._asked.find(self._network, self._wanted)
        self._donors = self._asked.of_run(self._network, self._spec.digest)
        log = HeartbeatLog(self._network, self._spec)
        self._network.run(log.start(), timeout_seconds=DAEMON_SECONDS)
        self._network.run(log.read_first(), timeout_seconds=DAEMON_SECONDS)
        self._log = log
        self._watching = self._network.submit(log.watch())  # goes on while the rest is looked at
        return [judge_swarm(swarm_figures(self._spec, log.heartbeats))]

    def _examine_kept_run(self) -> list[Check]:
        """Where no peer can be asked: as far as this peer knows."""
        from peer.checkup import judge_swarm
        from peer.swarm_probes import swarm_figures

        assert self._kept is not None
        self._spec = self._kept.spec
        return [judge_swarm(swarm_figures(self._spec, (), round_=self._kept.checkpoint.round))]

    def _examine_own_run(self) -> list[Check]:
        """One that begins here."""
        from peer.checkup import judge_model
        from peer.genesis import make_run

        options = spec_options(self._args, seed=self._args.seed)
        options.setdefault("run_name", default_run_name(self._args.model))
        self._model_dir = self._folder / "base"
        self._spec, state = make_run(self._args.model, self._args.revision, options, self._model_dir)
        self._backbone = (state.manifest.layout.backbone, state.backbone)
        return [judge_model(self._args.model, self._spec.num_parameters, "new")]

    def _examine_reach(self) -> list[Check]:
        from peer.checkup import judge_reach
        from peer.swarm_probes import find_reach

        assert self._network is not None
        run = "" if self._spec is None else self._spec.digest
        reach = find_reach(self._network, self._config, self._folder, run=run, donors=self._donors)
        return [judge_reach(reach)]

    def _examine_machine(self) -> list[Check]:
        from peer.checkup import judge_device
        from peer.probes import batch_of, check_disk, check_memory, check_output, find_device, size_of

        finetune = self._config.finetune
        device = find_device(finetune.use_cpu, self._config.num_threads)
        size = None if self._spec is None else size_of(self._spec)
        batch = batch_of(self._config, self._find_config())
        checks = [judge_device(device, size, batch, finetune.bf16)]
        if size is not None:
            checks.append(check_memory(size, batch, on_gpu=device.is_gpu))
            checks.append(check_disk(self._config.output_dir, size))
        if self._has_output_dir:
            checks.append(check_output(self._config))
        return checks

    def _find_config(self) -> Path | None:
        """A directory with the config of the run's model, here or from a peer."""
        from coordinator.errors import NetworkError
        from peer.probes import find_config
        from peer.swarm_probes import CALL_SECONDS, fetch_files

        if self._spec is None or self._model_dir is not None:
            return self._model_dir
        found = find_config(self._spec, self._config.output_dir)
        if found is None and self._network is not None and self._log is not None:
            folder, donors = self._folder / "config", self._donors
            with suppress(NetworkError):  # then the batch is taken to be of a small model
                name = ("config.json",)
                fetch_files(self._network, self._spec, donors, folder, name, timeout_seconds=CALL_SECONDS)
                return folder
        return found

    def _examine_model(self) -> list[Check]:
        from peer.checkup import judge_model
        from peer.probes import find_model, random_backbone
        from peer.swarm_probes import fetch_files, fetch_layout

        assert self._spec is not None
        found = find_model(self._spec, self._kept, self._config.output_dir)
        source = found.source
        if found.state is not None:
            self._model_dir = found.directory
            self._backbone = (found.state.manifest.layout.backbone, found.state.backbone)
        elif self._network is not None and self._log is not None:
            directory, donors = self._folder / "base", self._donors
            fetch_files(self._network, self._spec, donors, directory)
            self._model_dir = directory
            layout = fetch_layout(self._network, self._spec, *self._log.newest_state(donors))
            self._backbone = (layout, random_backbone(layout, self._config.seed))
            source = "peers" if source == "nowhere" else source
        else:
            source = "nowhere"
        return [judge_model(self._spec.model, self._spec.num_parameters, source)]

    def _examine_lengths(self) -> list[Check]:
        from peer.checkup import judge_lengths
        from peer.probes import max_tokens, token_lengths

        assert self._data is not None
        assert self._model_dir is not None
        lengths = token_lengths(self._data, self._model_dir)
        most = max_tokens(self._model_dir)
        limit = min(self._config.finetune.max_length, most)
        num_cut, num_in_all = sum(n > limit for n in lengths), len(self._data.train)
        can_raise = limit < most
        return [judge_lengths(len(lengths), num_cut, limit, max(lengths), num_in_all, can_raise=can_raise)]

    def _examine_speed(self) -> list[Check]:
        from peer.checkup import judge_speed
        from peer.probes import measure_speed

        assert self._data is not None
        assert self._model_dir is not None
        assert self._backbone is not None
        self._speed = measure_speed(
            self._config, self._data, self._model_dir, *self._backbone, should_stop=self._worker.is_ended
        )
        return [judge_speed(self._speed, self._budget())]

    def _examine_traffic(self) -> list[Check]:
        from peer.checkup import judge_round, judge_traffic
        from peer.swarm_probes import download_rate

        assert self._spec is not None
        rate = None
        if self._network is not None and self._log is not None:
            state_hash, donors = self._log.newest_state(self._donors)
            rate = download_rate(self._network, self._spec, state_hash, donors)
        budget = self._budget()
        in_all = [] if self._speed is None else [judge_round(self._speed, rate, budget)]
        return [judge_traffic(rate, budget), *in_all]

    def _budget(self) -> RoundBudget:
        from peer.probes import round_budget
        from peer.swarm_probes import swarm_figures

        assert self._spec is not None
        heartbeats = [] if self._log is None else self._log.heartbeats
        num_trainers = swarm_figures(self._spec, heartbeats).num_trainers
        return round_budget(self._spec, num_trainers, self._config)

    def _examine_clock(self) -> list[Check]:
        from peer.checkup import judge_clock
        from peer.swarm_probes import answering, clock_samples

        assert self._network is not None
        assert self._log is not None
        assert self._spec is not None
        self._watching.result(NETWORK_SECONDS)
        samples = clock_samples(self._log.heartbeats, answering(self._network))
        return [judge_clock(samples, lease_seconds=self._spec.lease_seconds)]


class Worker:
    """Runs one probe after the other beside the main thread, which so stays free for Ctrl-C and deadlines."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self, probe: Callable[[], T], limit_seconds: float) -> T:
        """Raises what the probe raises, and TimeoutError; then the probe is left behind."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(probe())
            except BaseException as error:  # noqa: BLE001 (handed to the main thread, which raises it)
                future.set_exception(error)

        thread = threading.Thread(target=work, name=PROBE_THREAD, daemon=True)
        self._threads.append(thread)
        thread.start()
        return future.result(limit_seconds)

    def is_ended(self) -> bool:
        return self._ended.is_set()

    def end(self) -> None:
        """Steps of finetuning look at `is_ended`; anything else that hangs ends with the process."""
        self._ended.set()
        ends_at = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, ends_at - time.monotonic()))


def leave(code: int) -> NoReturn:
    """A probe that hangs in a library would crash the interpreter when that takes its thread away."""
    if any(thread.name == PROBE_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
