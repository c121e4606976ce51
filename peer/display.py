"""What a person sees, and what a script reads: the events of a peer, its progress, its log.

With `--json`, standard output holds one JSON object per line and nothing else. Names and keys below
are stable: keys may be added, none is renamed or dropped without a new major version. Integers
are JSON integers, durations seconds, sizes bytes, hashes hexadecimal; what was not measured is null.

    {"event": "started", "initial_peers": [address, ...], "spec_digest": hash}
        a run began here: others enter through these addresses; of a private run also "invite", the string
        that lets in whoever holds it (empty where the organizer's key is not at hand)
    {"event": "joined", "peer_id": str, "initial_peers": [address, ...], "round": int}
        this peer is a member; others reach it under these addresses
    {"event": "caught_up", "round": int, "state_hash": hash, "seconds": float, "size_bytes": int}
        it downloaded the state of that round and checked it
    {"event": "round_started", "round": int}
    {"event": "finetuned", "round": int, "num_examples": int, "seconds": float}
    {"event": "fused", "round": int, "num_peers": int, "seconds": float, "bytes_sent": int,
        "bytes_received": int}
        the average is there, but not yet agreed on; num_peers includes this one
    {"event": "committed", "round": int, "state_hash": hash, "num_peers": int,
        "accuracy": {"base": float, "own": float, "fused": float}}
        the run's next state, agreed on. Accuracy (0 to 1) is head-only on this peer's held-out split:
        of the base model that the round began with, of its own finetuned backbone, of the fused one.
        For a regression task the three are Pearson correlations (-1 to 1).
    {"event": "voted", "round": int, "rejects": bool, "p_value": float}
        this peer told the others whether the state of that round is worse than the one before, on its own
        held-out split and beyond noise; only the bit left this machine
    {"event": "verdict", "round": int, "rejected": bool, "num_rejections": int, "num_votes": int,
        "num_members": int}
        what the votes on that round come to, as far as they reached this peer
    {"event": "rolled_back", "round": int, "state_hash": hash, "reason": str, "left_out": {peer: reason}}
        that round undid the one before it; who is left out takes no part in the next rounds
    {"event": "alone", "round": int}
        below the quorum: it goes on finetuning its own copy and commits nothing
    {"event": "paused", "round": int, "reason": str}
        it rests, by --schedule, --pause-when-busy or a signal; the others go on without it
    {"event": "resumed", "round": int}
    {"event": "tested", "metric_name": str, "score": float, "num_examples": int}
        at the end, where it is not told to stop: task_model/ on the test split, which nothing was chosen by
    {"event": "stopped", "round": int, "reason": str}
        always the last line of an orderly end

When nobody reads standard output any more (a closed pipe), the peer goes on without it.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from coordinator.dropped import dropped_in
from coordinator.errors import UsageError
from coordinator.overview import short_id
from coordinator.records import Commit

logger = logging.getLogger(__name__)

LOG_LEVELS = ("debug", "info", "warning", "error")

# Libraries that tell at INFO what is of use only to their developers.
NOISY_LIBRARIES = (
    *("accelerate", "asyncio", "datasets", "filelock", "fsspec", "hivemind", "httpcore", "httpx"),
    *("huggingface_hub", "sklearn", "torch", "transformers", "urllib3"),
)


@dataclass(frozen=True)
class Accuracy:
    """Head-only score on this peer's held-out split; None where it was not measured."""

    base: float | None = None  # of the base model that the round began with
    own: float | None = None  # of this peer's own backbone after finetuning in this round
    fused: float | None = None  # of the backbone that the round committed


class ProgressBar(Protocol):
    def update(self, completed: float) -> None: ...


class Reporter:
    """Tells what happens: for people one readable line per round, for scripts JSON lines.

    `stream` is where JSON lines go (standard output); `console` is where people read. The methods named
    after the events may be called from any thread, in any order.
    """

    def __init__(
        self, json_lines: bool, stream: TextIO | None = None, console: Console | None = None
    ) -> None:
        self.json_lines = json_lines
        self._stream: TextIO = sys.stdout if stream is None else stream
        self._console = _PatientConsole() if console is None else console
        self._lock = threading.RLock()
        self._is_output_lost = False
        self._round = _RoundSoFar()
        self._last_alone: int | None = None
        self._progress: Progress | None = None

    def started(self, initial_peers: Sequence[str], spec_digest: str, *, invite: str | None = None) -> None:
        """`invite`: of a private run; empty: its organizer's key is not here."""
        extra = {} if invite is None else {"invite": invite}
        if self._emit("started", initial_peers=list(initial_peers), spec_digest=spec_digest, **extra):
            return
        self._print(f"run {clean(spec_digest)}")
        if invite is not None:
            self._print("the run is private: others join with an invite of its organizer")
            if invite:
                self._print(f"  python -m peer.join --invite {clean(invite)} --data FILE --output-dir DIR")
                self._print("this one lets in whoever holds it, for 30 days: send it by a private way")
            self._print("more of them, for one peer, or revoked: python -m coordinator.invite --help")
            return
        self._print("others join with")
        self._print(
            f"  python -m peer.join --initial-peers {_addresses(initial_peers)} --run {clean(spec_digest)}"
            " --data FILE --output-dir DIR"
        )

    def joined(self, peer_id: str, initial_peers: Sequence[str], round: int) -> None:
        if self._emit("joined", peer_id=peer_id, initial_peers=list(initial_peers), round=round):
            return
        self._print(f"joined at round {round} as {clean(peer_id)}")
        if initial_peers:
            self._print("others reach this peer with")
            self._print(f"  --initial-peers {_addresses(initial_peers)}")

    def caught_up(self, round: int, state_hash: str, seconds: float, size_bytes: int) -> None:
        event = {"round": round, "state_hash": state_hash, "seconds": seconds, "size_bytes": size_bytes}
        if not self._emit("caught_up", **event):
            size = format_size(size_bytes)
            self._print(
                f"caught up with round {round}: {size} in {seconds:.1f} s, state {clean(state_hash, 12)}"
            )

    def round_started(self, round: int) -> None:
        self._round = _RoundSoFar(number=round, started_at=time.monotonic())
        if not self._emit("round_started", round=round):
            logger.info("round %d: started", round)

    def finetuned(self, round: int, num_examples: int, seconds: float) -> None:
        self._so_far(round).finetune = f"{num_examples} examples in {format_seconds(seconds)}"
        if not self._emit("finetuned", round=round, num_examples=num_examples, seconds=seconds):
            logger.info("round %d: finetuned on %d examples in %.1f s", round, num_examples, seconds)

    def fused(self, round: int, num_peers: int, seconds: float, bytes_sent: int, bytes_received: int) -> None:
        self._so_far(round).moved_bytes += bytes_sent + bytes_received
        traffic = {"bytes_sent": bytes_sent, "bytes_received": bytes_received}
        if not self._emit("fused", round=round, num_peers=num_peers, seconds=seconds, **traffic):
            logger.info("round %d: averaged with %d peers in %.1f s", round, num_peers, seconds)

    def committed(
        self, round: int, state_hash: str, num_peers: int, accuracy: Accuracy, metric_name: str = "accuracy"
    ) -> None:
        """`metric_name`: of the task, "accuracy" or "pearson"; it decides how people see the three."""
        self._last_alone = None
        scores = asdict(accuracy)
        event = {"round": round, "state_hash": state_hash, "num_peers": num_peers, "accuracy": scores}
        if self._emit("committed", **event):
            return
        so_far = self._so_far(round)
        shown = {name: format_score(metric_name, score) for name, score in scores.items()}
        parts = [
            f"round {round}",
            f"{num_peers} peer{'s' if num_peers != 1 else ' '}",
            f"{clean(metric_name, 12)} base {shown['base']} own {shown['own']} fused {shown['fused']}",
            "" if so_far.started_at is None else format_seconds(time.monotonic() - so_far.started_at),
            format_size(so_far.moved_bytes),
        ]
        line = Text("  ".join(part for part in parts if part))
        line.highlight_regex(r"fused \S+", "bold")
        self._print(line)

    def voted(self, round: int, rejects: bool, p_value: float) -> None:
        if self._emit("voted", round=round, rejects=rejects, p_value=p_value):
            return
        if rejects:
            self._print(f"round {round}  worse than the round before on this peer's held-out data: rejected")
        else:
            logger.info("round %d: accepted, p = %.3f", round, p_value)

    def verdict(
        self, round: int, rejected: bool, num_rejections: int, num_votes: int, num_members: int
    ) -> None:
        votes = {"num_rejections": num_rejections, "num_votes": num_votes, "num_members": num_members}
        if self._emit("verdict", round=round, rejected=rejected, **votes):
            return
        if rejected:
            self._print(f"round {round}  rejected by {num_rejections} of {num_votes} votes: to be undone")
        else:
            logger.info("round %d: stands, %d of %d votes reject it", round, num_rejections, num_votes)

    def rolled_back(self, round: int, state_hash: str, reason: str, left_out: Mapping[str, str]) -> None:
        for peer, why in left_out.items():
            logger.warning("peer %s is left out of the next rounds: %s", clean(peer[-8:]), clean(why))
        event = {"round": round, "state_hash": state_hash, "reason": reason, "left_out": dict(left_out)}
        if not self._emit("rolled_back", **event):
            self._print(f"round {round}  undid the round before it: {clean(reason)}")

    def alone(self, round: int) -> None:
        if self._emit("alone", round=round) or self._last_alone == round:
            return
        self._last_alone = round  # told once, however often the round is tried
        finetune = self._so_far(round).finetune
        self._print(f"round {round}  alone: too few peers to average, training goes on here")
        if finetune:
            self._print(f"  finetuned on {finetune}; nothing is committed until others are back")

    def paused(self, round: int, reason: str) -> None:
        if not self._emit("paused", round=round, reason=reason):
            self._print(f"round {round}  paused: {clean(reason)}; the others go on without this peer")

    def resumed(self, round: int) -> None:
        if not self._emit("resumed", round=round):
            self._print(f"round {round}  goes on after a pause")

    def tested(self, metric_name: str, score: float, num_examples: int) -> None:
        """The own classifier, `task_model/`, on examples by which nothing was chosen."""
        if not self._emit("tested", metric_name=metric_name, score=score, num_examples=num_examples):
            shown = f"{clean(metric_name, 12)} {format_score(metric_name, score)}"
            self._print(f"task_model/  {shown} on {num_examples} test examples")

    def stopped(self, round: int, reason: str) -> None:
        if not self._emit("stopped", round=round, reason=reason):
            self._print(f"stopped at round {round}: {clean(reason)}")

    def note(self, text: str) -> None:
        """Something worth knowing that is not an event: to people on their console, else to the log."""
        if self.json_lines:
            logger.info("%s", clean_lines(text))
        else:
            self._print(clean_lines(text))

    def warning(self, text: str) -> None:
        """Something that a person should look at; goes to the log, which shows it on standard error."""
        logger.warning("%s", clean_lines(text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Cells may be None ("-"), numbers (to the right) or text; floats come formatted from the caller."""
        table = _make_table(columns, rows)
        if self.json_lines:
            text = io.StringIO()
            Console(width=100, file=text).print(table)
            logger.info("%s\n%s", clean(title), text.getvalue().rstrip())
        else:
            self._print(Text(clean(title), style="bold"))
            self._print(table)

    @contextmanager
    def progress(self, description: str, total: float | None) -> Iterator[ProgressBar]:
        """A bar while the block runs, `total` in any unit (None: unknown); may be nested.

        Silent when the console is not a terminal, or with JSON lines.
        """
        if self.json_lines or not self._console.is_terminal:
            yield _NoBar()
            return
        bar = self._add_bar(clean(description, 40), total)
        try:
            yield bar
        finally:
            self._remove_bar(bar)

    def _emit(self, event: str, **values: Any) -> bool:
        """Whether this reporter writes JSON lines: then nothing is left to show to people."""
        if not self.json_lines:
            return False
        line = json.dumps({"event": event, **_without_nan(values)}, allow_nan=False) + "\n"
        with self._lock:
            if self._is_output_lost:
                return True
            try:
                self._stream.write(line)
                self._stream.flush()
            except (OSError, ValueError) as error:  # ValueError: the stream was closed on our side
                self._is_output_lost = True
                _discard_output(self._stream)
                _log_lost_output(error)
        return True

    def _print(self, what: str | Text | Table) -> None:
        # As Text, so that no markup is read from it; soft_wrap, so that a command can be copied whole.
        try:
            if isinstance(what, Table):
                self._console.print(what)
            else:
                self._console.print(Text(what) if isinstance(what, str) else what, soft_wrap=True)
        except OSError as error:  # the terminal is gone, or the disk behind a redirection is full
            self._console.quiet = True
            _discard_output(self._console.file)
            _log_lost_output(error)

    def _so_far(self, round: int) -> _RoundSoFar:
        if self._round.number != round:
            self._round = _RoundSoFar(number=round)
        return self._round

    def _add_bar(self, description: str, total: float | None) -> _Bar:
        with self._lock:
            if self._progress is None:
                self._progress = _make_progress(self._console)
                self._progress.start()
            return _Bar(self._progress, self._progress.add_task(description, total=total))

    def _remove_bar(self, bar: _Bar) -> None:
        with self._lock:
            bar.progress.remove_task(bar.task)
            if not bar.progress.tasks:
                bar.progress.stop()
                self._progress = None


def claim_stdout() -> TextIO:
    """A stream to standard output for `Reporter`; from now on all others who print go to standard error.

    For `--json`: libraries, child processes and `print` included. Call it once, before any other output.
    """
    sys.stdout.flush()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


def setup_logging(level: str, file: Path | None) -> None:
    """The log of this process: plain on standard error, and with times in `file` where one is given.

    Other libraries are heard from WARNING on. Raises UsageError for an unknown level or a file that
    cannot be written.
    """
    if level.lower() not in LOG_LEVELS:
        raise UsageError(f"--log-level {level}: not one of {', '.join(LOG_LEVELS)}")
    handlers: list[logging.Handler] = [_StderrHandler()]
    handlers[0].setFormatter(_SafeFormatter("%(levelname)s: %(message)s"))
    if file is not None:
        handlers.append(_open_log_file(file))
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "WARNING")  # it has a handler of its own, set at import
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old.formatter, _SafeFormatter):  # ours, from an earlier call
            root.removeHandler(old)
            old.close()
    for handler in handlers:
        handler.addFilter(_is_of_use)
        root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def log_dropped(commit: Commit) -> None:
    """Whose contribution a committed round lacks, in whole or in part, and why."""
    for drop in dropped_in(commit):
        logger.warning(
            "round %d: %s is %s: %s", drop.round, short_id(drop.peer), drop.what, clean(drop.reason)
        )


def clean(value: object, max_length: int = 200) -> str:
    """One short printable line of a value that may come from another peer.

    Escape sequences, line breaks and text-direction marks become "?": none can act on a terminal.
    """
    text = str(value)
    text = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in text)


def clean_lines(text: str, max_length: int = 4000) -> str:
    """The same for text of several lines, which stay lines."""
    return "\n".join(clean(line, max_length) for line in text[:max_length].split("\n"))


def format_score(metric_name: str, score: float | None) -> str:
    """Accuracy in percent ("71.3"), any other metric as it is ("0.713"), "-" where there is none."""
    if score is None or not math.isfinite(score):
        return "-"
    return f"{100 * score:.1f}" if metric_name == "accuracy" else f"{score:.3f}"


def format_seconds(seconds: float) -> str:
    """ "7.2 s", "62 s", "12 min 5 s", "3 h 12 min"."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{60 * minutes + rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_size(size_bytes: int) -> str:
    """Decimal units, as networks count: "90.8 MB"."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 999.95:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@dataclass
class _RoundSoFar:
    """What earlier events of a round said, for the one line at its end."""

    number: int | None = None
    started_at: float | None = None  # instant of time.monotonic()
    finetune: str = ""
    moved_bytes: int = 0  # sent and received, failed attempts included


class _NoBar:
    def update(self, completed: float) -> None:
        pass


@dataclass(frozen=True)
class _Bar:
    progress: Progress
    task: TaskID

    def update(self, completed: float) -> None:
        self.progress.update(self.task, completed=completed)


class _PatientConsole(Console):
    """rich ends the process when its output is closed; a peer goes on, for the others' sake."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _discard_output(self.file)
        _log_lost_output(BrokenPipeError("closed pipe"))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (name of logging)
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


class _SafeFormatter(logging.Formatter):
    """Several lines may be a traceback, and stay; what a terminal would act on does not."""

    def format(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in super().format(record))


def _is_of_use(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in NOISY_LIBRARIES


def _open_log_file(file: Path) -> logging.Handler:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--log-file {file} cannot be written: {error.strerror}") from error
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _log_lost_output(error: Exception) -> None:
    logger.warning("nobody reads standard output any more (%s); going on without it", error)


def _discard_output(stream: Any) -> None:
    """Points a closed pipe to nowhere, or the interpreter complains when it flushes at exit."""
    try:
        fd = stream.fileno()
    except (OSError, ValueError):
        return  # not a file, or closed
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


def _addresses(initial_peers: Sequence[str]) -> str:
    return " ".join(quote(clean(address, 400)) for address in initial_peers) or "ADDR"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),  # a log that goes to a file must not land on the terminal
    )


def _make_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style=None)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(_is_numeric(row[index]) for row in rows)
        table.add_column(Text(clean(column)), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else clean(cell)) for cell in row))
    return table


def _is_numeric(cell: object) -> bool:
    if cell is None or cell == "-":
        return True
    try:
        float(str(cell))
    except ValueError:
        return False
    return True
