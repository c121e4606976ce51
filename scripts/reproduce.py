"""Does a swarm help? The experiments of ColD Fusion and its baselines, made again with our own code.

    python -m scripts.reproduce --data-dir DATA --out my-results

DATA holds a folder of train.csv, validation.csv and test.csv for each data set. Sizes and seeds are those of
scripts/reproduce.toml. The work is done in pieces, each kept when it is done, so the same command goes on
where it was stopped. OUT/work holds them (some 8 GB of models at night size, and the scores: these are small,
and a model is made again only where one is missing); OUT gets README.md with tables and plots, and every
figure as JSON. An OUT with figures of pieces that its work folder lacks, as results/ in a clone, is left as
it is. Experiments 1 to 7 are claims; 8 looks for what makes it better.

    --list              what is done, what is to do, and about how long it takes
    --only 1 2          these experiments
    --max-minutes 110   stop after the piece that is in work by then; 0: the tables of what is done
    --profile smoke     all of it, tiny
    --redraw            README.md and plots once more, from the JSON in OUT
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordinator.cli import EXIT_CODES, Parser, positive, positive_int, run_main
from coordinator.errors import StateError, SwarmError, UsageError
from peer.display import format_seconds
from peer.state import write_text
from peer.stopping import StopRequested, StopSwitch
from scripts.evaluate import find_datasets
from scripts.experiments import TITLES, Mix, Piece, Profile, Scoring, all_pieces, load_profile, told
from scripts.findings import findings
from scripts.json_files import read_json
from scripts.lab import Lab, locked
from scripts.report import Provenance, redraw, write_report

CONFIG = Path(__file__).with_name("reproduce.toml")
PROGRAM = "scripts.reproduce"
PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "numpy")
_MIN_SECONDS_TO_EXTRAPOLATE = 20.0

Pieces = Sequence[tuple[int, Piece]]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def _main(flags: argparse.Namespace) -> int:
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    datasets.disable_progress_bars()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150)
    profile = load_profile(flags.config, flags.profile, flags.model)
    if flags.redraw:
        _require_matplotlib()
        redraw(flags.out, profile.note)
        return 0
    find_datasets(flags.data_dir, profile.datasets)  # all, before anything is spent
    if not flags.no_plots:
        _require_matplotlib()
    work = _claim(flags.out, profile, reads_only=flags.list)
    switch, commit = StopSwitch(), _commit()
    with locked(work), switch.listening():
        lab = Lab(profile, flags.data_dir, work, switch=switch, commit=commit)
        pieces = all_pieces(profile, flags.only and sorted(set(flags.only)))
        if flags.list:
            _print_list(lab, pieces, console)
            return 0
        try:
            is_finished = _work(lab, pieces, flags.max_minutes, console)
        except StopRequested:
            console.print(f"{switch.reason}; the same command goes on with the piece that was in work")
            return switch.exit_code
        write_report(flags.out, findings(lab), _provenance(lab, flags), with_plots=not flags.no_plots)
    console.print(f"Tables and plots: {flags.out}/README.md", soft_wrap=True)
    if not is_finished:
        console.print("The time is up and pieces are left: the same command goes on")
    return 0


# ---- work ---------------------------------------------------------------------------------


def _work(lab: Lab, pieces: Pieces, max_minutes: float | None, console: Console) -> bool:
    """False when the time was up before the last piece. Raises StopRequested."""
    names = _pending_names(lab, pieces)
    pending = [(number, piece) for number, piece in pieces if piece.name in names]
    everything = [piece for _, piece in all_pieces(lab.profile)]
    clock = _Clock([lab.minutes(piece) for _, piece in pending], max_minutes)
    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for at, (number, piece) in enumerate(pending):
            if clock.is_over:
                return False
            line = f"[{at + 1} of {len(pending)}] {number}: {told(piece)}"
            console.print(f"{format_seconds(clock.passed):>12}  {line}{clock.left(at)}", soft_wrap=True)
            task = bar.add_task(told(piece), total=1.0)
            lab.do(piece, lambda fraction, task=task: bar.update(task, completed=fraction))  # type: ignore[misc]
            bar.remove_task(task)
            if isinstance(piece, Mix) or (isinstance(piece, Scoring) and "@" in piece.model):
                lab.tidy([other for other in everything if not lab.is_done(other)])
    return True


def _pending_names(lab: Lab, pieces: Pieces) -> set[str]:
    return {piece.name for piece in lab.pending([piece for _, piece in pieces])}


class _Clock:
    """How long it takes: the estimates, corrected by the speed of what was done."""

    def __init__(self, minutes: Sequence[float], max_minutes: float | None) -> None:
        self._minutes, self._started_at = minutes, time.monotonic()
        self._max_seconds = math.inf if max_minutes is None else 60 * max_minutes

    @property
    def passed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._started_at

    @property
    def is_over(self) -> bool:
        return self.passed >= self._max_seconds

    def left(self, num_done: int) -> str:
        expected = 60 * sum(self._minutes[:num_done])
        is_known = expected >= _MIN_SECONDS_TO_EXTRAPOLATE
        seconds = 60 * sum(self._minutes[num_done:]) * (self.passed / expected if is_known else 1.0)
        return f"  (about {format_seconds(seconds)} left)"


def _print_list(lab: Lab, pieces: Pieces, console: Console) -> None:
    table = Table(title=f"Profile {lab.profile.name}", title_justify="left")
    for column in ("experiment", "piece", "state"):
        table.add_column(column)
    table.add_column("minutes, about", justify="right")
    left = dict.fromkeys((number for number, _ in pieces), 0.0)
    pending = _pending_names(lab, pieces)
    for number, piece in pieces:
        is_done, minutes = piece.name not in pending, lab.minutes(piece)
        left[number] += 0.0 if is_done else minutes
        table.add_row(str(number), told(piece), "done" if is_done else "to do", f"{minutes:.1f}")
    console.print(table)
    for number, minutes in sorted(left.items()):
        console.print(f"{number}. {TITLES[number]}: {format_seconds(60 * minutes)} to do")
    console.print(
        f"In all: {format_seconds(60 * sum(left.values()))} to do; a piece that two need counts once"
    )


# ---- the folder ---------------------------------------------------------------------------


def _claim(out: Path, profile: Profile, *, reads_only: bool) -> Path:
    """The folder of the pieces. Raises StateError, UsageError."""
    file = out / "settings.json"
    settings = {"program": PROGRAM, "profile": profile.name, "model": _model_name(profile)}
    try:
        if out.is_dir() and any(out.iterdir()) and not file.exists():
            raise StateError(f"--out {out} holds other files: name an empty or a new folder")
        if file.exists():
            _check_settings(out, file, settings)
            if not reads_only:
                _check_work(out)
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"--out {out} cannot be used: {error.strerror}") from error
    if not file.exists():
        write_text(file, json.dumps(settings) + "\n")
    write_text(out / "work" / ".gitignore", "/runs/\n/books/\n/.lock\n")  # gigabytes
    return out / "work"


def _check_settings(out: Path, file: Path, settings: dict[str, Any]) -> None:
    there = read_json(file, advice="restore or delete it")
    if there.get("program") != PROGRAM:
        raise StateError(f"{file} is not of this program: name an empty or a new folder")
    if there != settings:
        raise UsageError(
            f"--out {out} holds results of profile {there.get('profile')}, model {there.get('model')}: "
            "name another --out"
        )


def _check_work(out: Path) -> None:
    """Raises StateError where tables are of pieces that are not here, as in a clone without them: tables
    of what is here would take their place.

    Pieces are counted by their times, which stay when models are deleted to make room.
    """
    made, times = out / "made.json", out / "work" / "times.jsonl"
    if not made.exists():
        return
    num_told = sum(read_json(made, ("commits",), advice="restore it")["commits"].values())
    num_here = len(times.read_text(encoding="utf-8").splitlines()) if times.exists() else 0
    if num_told > num_here:
        raise StateError(
            f"--out {out} holds figures of work that is not in {times} ({num_here} of {num_told} lines), so "
            "they would be lost: name another --out, or say --redraw for the same figures once more"
        )


def _minutes(text: str) -> float:
    return 0.0 if text == "0" else positive(text)


def _require_matplotlib() -> None:
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise SwarmError("matplotlib is not installed: pip install matplotlib, or say --no-plots") from error


# ---- what was run -------------------------------------------------------------------------


def _provenance(lab: Lab, flags: argparse.Namespace) -> Provenance:
    profile, times = lab.profile, lab.times
    pieces = [piece for _, piece in all_pieces(profile)]
    is_gpu = torch.cuda.is_available() and not profile.scoring.use_cpu
    is_night = flags.profile == "night"
    extra = "" if is_night else f"{flags.profile} --profile {flags.profile}"
    return Provenance(
        command=f"python -m scripts.reproduce --data-dir DATA --out results/{extra}",
        profile=profile.name,
        model=_model_name(profile),
        commits=dict(Counter(record["commit"] for record in times)),
        sizes=_sizes(profile),
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        device=torch.cuda.get_device_name() if is_gpu else f"{platform.machine()} processor",
        num_cores=os.cpu_count() or 1,
        hours=round(sum(record["seconds"] for record in times) / 3600, 3),
        num_pieces=len(pieces),
        num_done=len(pieces) - len(lab.pending(pieces)),
        note=profile.note,
    )


def _model_name(profile: Profile) -> str:
    """Without the path of a directory."""
    return Path(profile.model).name if Path(profile.model).is_dir() else profile.model


def _sizes(profile: Profile) -> dict[str, str]:
    def shown(values: Any) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items())

    return {
        "data sets": f"{len(profile.datasets)} in {len(profile.folds)} folds: "
        + "; ".join(f"{number}: {', '.join(fold)}" for number, fold in enumerate(profile.folds)),
        "seeds": f"of the folds' runs: {_seeds(profile)}; of experiment 5: "
        + ", ".join(map(str, profile.one_set["seeds"])),
        "a run": shown(profile.swarm),
        "test rows": shown(vars(profile.scoring)),
        "validation rows": shown(vars(profile.validation)),
    }


def _seeds(profile: Profile) -> str:
    """Experiments 3 to 8 need the run of fold 0 only."""
    if set(profile.experiments) == {1}:
        return ", ".join(map(str, profile.followed_folds))
    return f"0 to {len(profile.folds) - 1}" if {1, 2} & set(profile.experiments) else "0"


def _commit() -> str:
    """Of the program, with a plus where files differ from it; "unknown" outside of a clone."""
    folder = Path(__file__).parent
    command = ("git", "-C", str(folder), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


# ---- the command --------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.reproduce", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DATA", help="holds NAME/train.csv ..."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="goes on where it stopped")
    numbers = list(TITLES)
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, metavar="N",
                        help="experiments, by number (default: all of the profile)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what is done and to do, and train nothing")
    parser.add_argument(
        "--redraw", action="store_true", help="README.md and plots once more, from the JSON in OUT"
    )
    parser.add_argument(
        "--max-minutes", type=_minutes, metavar="N", help="begin no piece after so long; 0: tables alone"
    )
    parser.add_argument("--profile", default="night", metavar="NAME", help="of the config (default: night)")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="default: reproduce.toml")
    parser.add_argument("--model", metavar="MODEL", help="a directory or a hub id, instead of the profile's")
    parser.add_argument("--no-plots", action="store_true", help="do without matplotlib")
    parser.add_argument("--threads", type=positive_int, help="of PyTorch (default: its own choice)")
    return parser.parse(arguments)


if __name__ == "__main__":
    sys.exit(main())
