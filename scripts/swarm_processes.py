"""How are the real processes of a swarm started on this machine, followed by their events, and surely ended?

Each is a process group of its own, with its share of the cores. It writes JSON lines, which a thread reads;
its log goes to a file. Leaving the `with` block ends everything that was started, descendants included.

A peer begins with 13 CPU-seconds of imports (two cores of an AMD EPYC). Who starts hundreds gives `preload`:
then a process that has imported forks them, `multiprocessing`'s fork server.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, context, forkserver
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol

import psutil

from coordinator.errors import EXIT_TERMINATED, SwarmError

Event = Mapping[str, Any]  # one JSON line of a process: {"event": name, ...}, see peer/display.py
OnEvent = Callable[[str, Event], None]  # gets the name of the process; called from its reader thread

TERMINATE_SECONDS = 20.0  # from SIGTERM to SIGKILL: a checkpoint may be on its way to the disk
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOG_LINES_SHOWN = 15


class Running(Protocol):
    """What we need of `subprocess.Popen`, and give of a forked process."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class SwarmProcess:
    """One running command of this project; made by `LocalSwarm.start`."""

    def __init__(self, name: str, process: Running, output: IO[str], log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        self.events: list[Event] = []  # in the order in which they came
        self.is_output_closed = False  # nothing more will be added to `events`
        self.process = process
        self.output = output

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self.process.poll()

    def of_kind(self, event_name: str) -> list[Event]:
        return [event for event in list(self.events) if event["event"] == event_name]

    def last_log_lines(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


class LocalSwarm:
    """Owns the processes of one swarm. Use as a context manager."""

    def __init__(
        self,
        log_directory: Path,
        on_event: OnEvent = lambda name, event: None,
        *,
        descendants_seconds: float = 5.0,
        preload: Sequence[str] = (),
    ) -> None:
        """`descendants_seconds`: how long descendants may outlive their process; p2pd ends within 2 s.

        `preload`: modules to import once, for all swarms of this process; each peer then has one thread.
        """
        log_directory.mkdir(parents=True, exist_ok=True)
        self.processes: list[SwarmProcess] = []
        self._log_directory = log_directory
        self._on_event = on_event
        self._descendants_seconds = descendants_seconds
        self._fork_server = _fork_server(preload) if preload else None
        self._changed = threading.Condition()
        self._readers: dict[SwarmProcess, threading.Thread] = {}
        self._descendants: set[psutil.Process] = set()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def start(self, name: str, module: str, flags: Sequence[str], *, num_threads: int = 1) -> SwarmProcess:
        """Run `python -m module flags --json`, from the main thread; its log goes to <name>.log."""
        log_file = self._log_directory / f"{name}.log"
        started = SwarmProcess(name, *self._run(module, [*flags, "--json"], log_file, num_threads), log_file)
        reader = threading.Thread(
            target=self._read_events, args=(started,), name=f"events-{name}", daemon=True
        )
        self.processes.append(started)
        self._readers[started] = reader
        reader.start()
        return started

    def _run(
        self, module: str, flags: list[str], log_file: Path, num_threads: int
    ) -> tuple[Running, IO[str]]:
        if self._fork_server is not None:
            return _forked(self._fork_server, module, flags, log_file)
        with log_file.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(num_threads),
                start_new_session=True,  # Ctrl-C in a terminal reaches only us, and we end the others
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        assert process.stdout is not None
        return process, process.stdout

    def wait_for(
        self,
        process: SwarmProcess,
        event_name: str,
        *,
        timeout_seconds: float,
        where: Callable[[Event], bool] = lambda event: True,
    ) -> Event:
        """The first such event, past ones included.

        Raises SwarmError, with the end of the log, when the process ends or the time is over before it.
        """

        def found() -> Event | None:
            return next(filter(where, process.of_kind(event_name)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or process.is_output_closed, timeout_seconds)
        event = found()
        if event is None:
            ended = process.is_output_closed
            why = "ended" if ended else f"was still running after {timeout_seconds:.0f} s"
            raise SwarmError(_with_log(f"{process.name} {why} without the event {event_name!r}", process))
        return event

    def wait_until_ended(self, processes: Sequence[SwarmProcess], *, timeout_seconds: float) -> None:
        """Raises SwarmError, with the end of the log, when one failed or is still running then."""
        ends_at = time.monotonic() + timeout_seconds
        for process in processes:
            try:
                exit_code = process.process.wait(max(0.0, ends_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                message = f"{process.name} was still running after {timeout_seconds:.0f} s"
                raise SwarmError(_with_log(message, process)) from None
            if exit_code != 0:
                raise SwarmError(_with_log(f"{process.name} ended with exit code {exit_code}", process))
        for process in processes:
            self._readers[process].join(max(0.0, ends_at - time.monotonic()) + 1.0)

    def kill(self, process: SwarmProcess) -> None:
        """SIGKILL to its whole group: as if its machine had lost power."""
        self._remember_descendants(process)
        _signal_group(process, signal.SIGKILL)
        process.process.wait()

    def terminate(self, process: SwarmProcess, timeout_seconds: float = TERMINATE_SECONDS) -> int:
        """SIGTERM, and SIGKILL where that is not obeyed in time; returns the exit code."""
        self._remember_descendants(process)
        _signal_group(process, signal.SIGTERM)
        try:
            return process.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            return process.process.wait()

    def end(self) -> None:
        """Ends what still runs, all at once, and waits until nothing of it is left. May be called again."""
        for process in self.processes:
            self._remember_descendants(process)
            _signal_group(process, signal.SIGTERM)
        ends_at = time.monotonic() + TERMINATE_SECONDS
        for process in self.processes:
            try:
                process.process.wait(max(0.0, ends_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                process.process.wait()
        for reader in self._readers.values():
            reader.join(5.0)
        self._kill_descendants()

    def _read_events(self, process: SwarmProcess) -> None:
        with process.output as lines:
            for event in _parse_events(lines, process.log_file):
                process.events.append(event)
                with self._changed:
                    self._changed.notify_all()
                self._on_event(process.name, event)
        process.is_output_closed = True
        with self._changed:
            self._changed.notify_all()

    def _remember_descendants(self, process: SwarmProcess) -> None:
        # p2pd may lead a session of its own; after its parent's death nothing would tell whose it was.
        try:
            self._descendants.update(psutil.Process(process.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def _kill_descendants(self) -> None:
        _, left = psutil.wait_procs(list(self._descendants), timeout=self._descendants_seconds)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5.0)
        self._descendants.clear()


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM raises SystemExit in the main thread while the block runs: every `with` block is left."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break what ends the others
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def num_usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(num_processes: int) -> int:
    """Processes that share a machine share its cores, or they slow each other down several times over."""
    return max(1, num_usable_cores() // num_processes)


def _environment(num_threads: int) -> dict[str, str]:
    limits = {
        name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    return {**os.environ, **limits, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _fork_server(preload: Sequence[str]) -> context.ForkServerContext:
    """Running, with these modules imported; there is one for a process, and it ends with it."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*preload])
    before = dict(os.environ)
    os.environ.update(_environment(num_threads=1))  # libraries read it when they are imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


def _forked(
    server: context.ForkServerContext, module: str, flags: list[str], log_file: Path
) -> tuple[Running, IO[str]]:
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=_main_of, args=(module, flags, str(log_file), theirs))
    process.start()
    theirs.close()
    output = os.fdopen(os.dup(ours.fileno()))
    ours.close()
    return _Forked(process), output


def _main_of(module: str, flags: list[str], log_file: str, output: connection.Connection) -> None:
    """In the new process: what `python -m module flags` would do."""
    os.setsid()
    threading.Thread(target=_end_after_parent, name="parent", daemon=True).start()
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
    output.close()
    sys.exit(importlib.import_module(module).main(flags))


def _end_after_parent() -> None:
    """As `_die_with_parent`, which would wait for the fork server, and that waits for us."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Forked:
    def __init__(self, process: context.ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


# Loaded here: between fork and exec as little as possible may happen.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    # Should this process be killed with SIGKILL, no `with` block is left: then the kernel ends the others.
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(process: SwarmProcess, number: signal.Signals) -> None:
    if process.exit_code is None:
        try:
            os.killpg(process.process.pid, number)
        except ProcessLookupError:
            return


def _parse_events(lines: IO[str], log_file: Path) -> Iterator[Event]:
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event
        else:
            with log_file.open("a") as log:
                log.write(f"on standard output, not an event: {line}")


def _with_log(message: str, process: SwarmProcess) -> str:
    return f"{message}. The end of its log, {process.log_file}:\n{process.last_log_lines()}"
