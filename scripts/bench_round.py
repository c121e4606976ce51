"""What does a round cost beside finetuning? Seconds by phase, and memory beyond bare finetuning.

    python -m scripts.bench_round --data-dir DIR [--peers 4] [--rounds 3] [--round-seconds 60]

DIR holds sst2/train.csv and so on. Peers share the cores of this machine, so phases that compute (evaluating)
take longer than on a machine of one's own; with --peers 2 on two cores each has one for itself.
Memory is PSS, of the peer and its p2p daemon, sampled; beside it the same finetuning in a process that
does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from coordinator.cli import Parser, positive, positive_int, run_main
from coordinator.errors import SwarmError
from scripts.demo import embedded_encoder
from scripts.swarm_on_real_data import LOOPBACK, START_SECONDS, TASKS, read_rounds
from scripts.swarm_processes import LocalSwarm, SwarmProcess, sigterm_as_exit, threads_each

SAMPLING_SECONDS = 0.5
OVERLAPPED = "evaluate_own"  # runs while the others get ready and the deltas are exchanged


class PeakMemory:
    """Samples the PSS of processes and their children until left; peaks in MiB."""

    def __init__(self, process_ids: Mapping[str, int]) -> None:
        self.peaks = dict.fromkeys(process_ids, 0.0)
        self._processes = {name: psutil.Process(process_id) for name, process_id in process_ids.items()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            for name, process in self._processes.items():
                with suppress(psutil.Error):
                    family = [process, *process.children(recursive=True)]
                    size = sum(member.memory_full_info().pss for member in family) / 2**20
                    self.peaks[name] = max(self.peaks[name], size)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def run_swarm(flags: argparse.Namespace, out: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Output directories and peak memory in MiB of the peers, by task."""
    tasks = TASKS[: flags.peers]
    with sigterm_as_exit(), LocalSwarm(out / "logs") as swarm:
        options = ["--round-seconds", str(flags.round_seconds), "--rounds", str(flags.rounds)]
        model = ["--model", flags.model or str(embedded_encoder()), "--output-dir", str(out / "starter")]
        common = ["--min-peers", str(len(tasks)), "--host-maddrs", LOOPBACK]
        starter = swarm.start("starter", "coordinator.start", [*model, *options, *common])
        started = swarm.wait_for(starter, "started", timeout_seconds=START_SECONDS)
        peers: dict[str, SwarmProcess] = {}
        for task in tasks:
            data = ["--data", str(flags.data_dir / task), "--output-dir", str(out / task)]
            join = ["--initial-peers", *started["initial_peers"], "--host-maddrs", LOOPBACK, "--use-cpu"]
            limits = ["--threads", str(threads_each(len(tasks))), "--max-length", str(flags.max_length)]
            limits += ["--eval-examples", str(flags.eval_examples)]
            peers[task] = swarm.start(
                task, "peer.join", [*data, *join, *limits], num_threads=threads_each(len(tasks))
            )
        with PeakMemory({task: peer.process.pid for task, peer in peers.items()}) as memory:
            limit = START_SECONDS + flags.rounds * (flags.round_seconds + 600.0)
            swarm.wait_until_ended(list(peers.values()), timeout_seconds=limit)
    return {task: out / task for task in tasks}, memory.peaks


def bare_finetuning_mib(flags: argparse.Namespace, task: str) -> float:
    """Peak PSS of the bare PyTorch loop of bench_finetune, in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench_finetune", "--memory-of", "bare", "--data-dir"]
    options = [str(flags.data_dir / task), "--max-length", str(flags.max_length), "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        raise SwarmError(f"bench_finetune failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _print(
    directories: Mapping[str, Path], peaks: Mapping[str, float], bare: float, console: Console
) -> None:
    entries = [entry for directory in directories.values() for entry in read_rounds(directory)]
    steady = [
        entry for entry in entries if entry["round"] > 1
    ]  # the first round also waits for others to start
    phases = list(dict.fromkeys(phase for entry in entries for phase in entry["seconds"]))
    table = Table(
        title=f"Seconds of a round, median of {len(steady)} (rounds 2 and later)", title_justify="left"
    )
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    medians = {phase: statistics.median(e["seconds"].get(phase, 0.0) for e in steady) for phase in phases}
    for phase, seconds in medians.items():
        table.add_row(phase + (" (while waiting)" if phase == OVERLAPPED else ""), f"{seconds:.2f}")
    console.print(table)
    finetune = medians["finetune"]
    exchange = sum(medians.get(phase, 0.0) for phase in ("find_group", "allreduce", "commit", "save"))
    evaluate = sum(medians.get(phase, 0.0) for phase in ("evaluate_base", "evaluate_fused"))
    console.print(
        f"finetuning / (finetuning + group, all-reduce, commit, save): {finetune / (finetune + exchange):.1%}"
    )
    console.print(f"the same with evaluations: {finetune / (finetune + exchange + evaluate):.1%}")
    console.print(
        f"peak memory, MiB PSS with p2pd: {json.dumps({t: round(m) for t, m in peaks.items()})}; "
        f"bare finetuning {bare:.0f}; beyond it, median {statistics.median(peaks.values()) - bare:.0f}",
        soft_wrap=True,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.bench_round", description="What a round costs beside finetuning.")
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="holds sst2/train.csv, ..."
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="default: the demo's encoder")
    parser.add_argument("--peers", type=positive_int, default=4, metavar="N")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N")
    parser.add_argument("--round-seconds", type=positive, default=60.0, metavar="S")
    parser.add_argument("--eval-examples", type=positive_int, default=200, metavar="N")
    parser.add_argument("--max-length", type=positive_int, default=64, metavar="N", help="tokens")
    return parser.parse(arguments)


def _main(flags: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as out:
        directories, peaks = run_swarm(flags, Path(out))
        bare = bare_finetuning_mib(flags, next(iter(directories)))
        _print(directories, peaks, bare, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    return 0


if __name__ == "__main__":
    sys.exit(main())
