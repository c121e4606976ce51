"""What does one exchange cost? Ours beside gloo and hivemind's stock averager, in one run.

    python -m scripts.bench_fusion --out DIR                    # 4 peers, every codec, 5 repeats
    python -m scripts.bench_fusion --peers 2 4 8 16 --out DIR

Every peer is a process of its own on this machine. A repeat runs gloo, each codec of ours and the stock
averager one after another on the same tensor, so that the load of the machine hits all of them; what counts
are the ratios to gloo's float32 of the same repeat, and their median. Writes fusion.json (settings,
versions, medians, every sample) and fusion.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from coordinator.agreement import Group
from coordinator.cli import Parser, positive_int, run_main
from coordinator.errors import SwarmError
from coordinator.identity import load_identity
from coordinator.network import Network, NetworkConfig
from coordinator.records import GENESIS, Contribution
from peer.allreduce import AllReduceService, Rules
from peer.compression import CODECS
from peer.manifest import prepare

RUN = hashlib.sha256(b"bench_fusion").hexdigest()
LIMIT_SECONDS = 300.0
GLOO, STOCK = "gloo", "stock hivemind"
DELTA_SCALE = 1e-3
SERVING_SECONDS = 0.3
PROCESS_BYTES, BYTES_PER_VALUE = 450_000_000, 60  # of a worker that has gloo and all codecs behind it
STOCK_PROCESS_BYTES, STOCK_BYTES_PER_VALUE = 450_000_000, 45  # of the one with the stock averager beside it
MEMORY_SHARE = 0.85  # of what is free; 16 workers with 22.7M values each need 29 GB


@dataclass(frozen=True)
class Sample:
    """One exchange, seen from one peer."""

    seconds: float  # from the start signal to the result
    prepare_seconds: float  # encoding and hashing before it, while a real peer waits for the others
    cpu_seconds: float  # of the process and its children, prepare included
    bytes_sent: int
    pss_mib: float  # at the end, above the process with the tensor alone
    error: float  # largest, against float64, relative to the largest value
    digest: str
    # Mean over the peers of what went over the loopback device meanwhile, with headers and acknowledgements;
    # any other traffic of the machine is in it, such as the DHT of the swarm that is not measured. 0 where
    # the system does not tell.
    bytes_on_wire: float = 0.0


@dataclass(frozen=True)
class Row:
    peers: int
    method: str
    num_values: int
    seconds: float  # medians over the repeats; of the slowest peer
    times_gloo: float
    prepare_seconds: float
    cpu_seconds: float
    sent_mb: float  # payload: counted by ours, known of the others' algorithms
    wire_mb: float
    pss_mib: float
    error: float
    is_identical: bool  # the same bytes on all peers, in every repeat


# one peer

Method = Callable[
    [], tuple[torch.Tensor, float, float, int]
]  # result, seconds to prepare and to exchange, bytes


class Worker:
    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags, self._index, self._peers = flags, flags.worker, flags.num_peers
        self._directory = Path(flags.directory)
        torch.set_num_threads(1)
        self._flat = _vector(self._index, flags.values)
        self._reference = _reference(self._peers, flags.values)
        self._base_pss = _pss_mib()
        self._methods: dict[str, Method] = {}

    def serve(self) -> None:
        """Answer one JSON line for each line that names a method."""
        setup = {"ours": self._start_ours, "stock": self._start_stock}[self._flags.kind]
        with setup():
            print("ready", flush=True)
            for line in sys.stdin:
                print(json.dumps(asdict(self._measure(line.strip()))), flush=True)

    def _measure(self, method: str) -> Sample:
        cpu = _cpu_seconds()
        result, prepare_seconds, seconds, bytes_sent = self._methods[method]()
        cpu = _cpu_seconds() - cpu
        error = float((result.double() - self._reference).abs().max() / self._reference.abs().max())
        digest = hashlib.sha256(result.numpy().tobytes()).hexdigest()
        return Sample(seconds, prepare_seconds, cpu, bytes_sent, _pss_mib() - self._base_pss, error, digest)

    def _start_ours(self) -> Network:
        self._join_gloo()
        key = self._directory / f"{self._index}.key"
        entry = () if self._index == 0 else (_wait_for_file(self._directory / "entry"),)
        identity = load_identity(key)
        network = Network(
            NetworkConfig(identity=identity, host_maddrs=("/ip4/127.0.0.1/tcp/0",), initial_peers=entry)
        )
        network.__enter__()
        service = AllReduceService(network, identity, RUN)
        network.run(service.start(), timeout_seconds=LIMIT_SECONDS)
        _write(self._directory / f"peer{self._index}", network.peer_id)
        address = network.run(network.addresses(), timeout_seconds=LIMIT_SECONDS)[0]
        if self._index == 0:
            _write(self._directory / "entry", address)
        members = [_wait_for_file(self._directory / f"peer{index}") for index in range(self._peers)]
        for codec in self._flags.codecs:
            self._methods[codec] = self._ours(network, service, members, codec)
        return _Closing(network)  # type: ignore[return-value]

    def _ours(self, network: Network, service: AllReduceService, members: list[str], codec: str) -> Method:
        contributions = tuple(Contribution(peer=member, num_examples=1, weight=1.0) for member in members)
        rules = Rules(self._flags.rule, "none", LIMIT_SECONDS)
        attempt = 0

        def run() -> tuple[torch.Tensor, float, float, int]:
            nonlocal attempt
            attempt += 1
            started = time.perf_counter()
            outgoing = prepare(
                self._flat, CODECS[codec], service.identity, run=RUN, round=1, previous=GENESIS
            )
            prepared = time.perf_counter()
            group_id = hashlib.sha256(f"{codec}/{attempt}".encode()).digest()
            group = Group(1, attempt, tuple(members), contributions, tuple(members), 0.0, group_id)
            future = service.reduce(group, outgoing, rules, residuals={})
            reduced = network.run(future, timeout_seconds=LIMIT_SECONDS)
            ended = time.perf_counter()
            time.sleep(SERVING_SECONDS)  # slower peers take the rest; it counts as work and as bytes
            return reduced.flat, prepared - started, ended - prepared, reduced.traffic.num_bytes_sent

        return run

    def _join_gloo(self) -> None:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{self._directory}/gloo",
            rank=self._index,
            world_size=self._peers,
        )

        def run() -> tuple[torch.Tensor, float, float, int]:
            started = time.perf_counter()
            result = self._flat.clone()
            torch.distributed.all_reduce(result)
            result /= self._peers
            sent = 2 * (self._peers - 1) * 4 * self._flags.values // self._peers
            return result, 0.0, time.perf_counter() - started, sent

        self._methods[GLOO] = run

    def _start_stock(self) -> Any:
        from hivemind.averaging.averager import DecentralizedAverager
        from hivemind.dht import DHT

        entry = [] if self._index == 0 else [_wait_for_file(self._directory / "stock_entry")]
        dht = DHT(initial_peers=entry, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=True)
        if self._index == 0:
            _write(self._directory / "stock_entry", str(dht.get_visible_maddrs()[0]))
        averager = DecentralizedAverager(
            averaged_tensors=[self._flat.clone()],
            dht=dht,
            prefix="bench",
            target_group_size=self._peers,
            min_group_size=self._peers,
            min_matchmaking_time=2.0,
            start=True,
        )

        def run() -> tuple[torch.Tensor, float, float, int]:
            with averager.get_tensors() as tensors:
                tensors[0].copy_(self._flat)
            started = time.perf_counter()
            averager.step(timeout=60.0)
            seconds = time.perf_counter() - started
            with averager.get_tensors() as tensors:
                result = tensors[0].clone()
            return result, 0.0, seconds, 2 * (self._peers - 1) * 4 * self._flags.values // self._peers

        self._methods[STOCK] = run
        return _Closing(averager, dht)


class _Closing:
    """Ends hivemind objects, which have no `with` of one kind."""

    def __init__(self, *resources: Any) -> None:
        self._resources = resources

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for resource in self._resources:
            resource.close() if isinstance(resource, Network) else resource.shutdown()


def _vector(index: int, num_values: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(num_values, generator=generator) * DELTA_SCALE


def _reference(num_peers: int, num_values: int) -> torch.Tensor:
    total = torch.zeros(num_values, dtype=torch.float64)
    for index in range(num_peers):
        total += _vector(index, num_values).double()
    return total / num_peers


def _cpu_seconds() -> float:
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def _pss_mib() -> float:
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        total += process.memory_full_info().pss
    return total / 2**20


def _loopback_bytes() -> int:
    devices = psutil.net_io_counters(pernic=True)
    return sum(counters.bytes_sent for name, counters in devices.items() if name.startswith("lo"))


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def _wait_for_file(path: Path) -> str:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise SwarmError(f"{path.name} did not appear within {LIMIT_SECONDS:.0f} s")
        time.sleep(0.05)
    return path.read_text()


# the parent


class Swarm:
    """Worker processes of one kind; a context manager."""

    def __init__(self, flags: argparse.Namespace, kind: str, num_peers: int, directory: str) -> None:
        command = [sys.executable, "-m", "scripts.bench_fusion", "--kind", kind, "--directory", directory]
        options = ["--num-peers", str(num_peers), "--values", str(flags.values), "--rule", flags.rule]
        self._processes = [
            subprocess.Popen(
                [*command, *options, "--codecs", *flags.codecs, "--worker", str(index)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for index in range(num_peers)
        ]

    def __enter__(self) -> Swarm:
        for process in self._processes:
            self._read(process, "ready")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def measure(self, method: str) -> list[Sample]:
        before = _loopback_bytes()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(method + "\n")
            process.stdin.flush()
        samples = [Sample(**json.loads(self._read(process))) for process in self._processes]
        each = (_loopback_bytes() - before) / len(samples)
        return [replace(sample, bytes_on_wire=each) for sample in samples]

    def _read(self, process: subprocess.Popen[str], expected: str = "{") -> str:
        timer = threading.Timer(LIMIT_SECONDS, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(expected):
                    return line
        finally:
            timer.cancel()
        raise SwarmError(f"a worker ended early, with {process.wait(10)}")


Samples = dict[str, list[list[Sample]]]  # by method, repeat and peer


def measure(flags: argparse.Namespace, num_peers: int) -> Samples:
    samples: Samples = {}
    with tempfile.TemporaryDirectory() as directory, Swarm(flags, "ours", num_peers, directory) as ours:
        swarms = dict.fromkeys((GLOO, *flags.codecs), ours)
        if num_peers <= flags.stock_up_to:
            with Swarm(flags, "stock", num_peers, directory) as stock:
                _repeat(flags, {**swarms, STOCK: stock}, samples)
        else:
            _repeat(flags, swarms, samples)
    return samples


def _repeat(flags: argparse.Namespace, swarms: Mapping[str, Swarm], samples: Samples) -> None:
    for repeat in range(flags.repeats + 1):
        for method, swarm in swarms.items():
            result = swarm.measure(method)
            if repeat > 0:  # the first one opens connections and warms up
                samples.setdefault(method, []).append(result)


def _row(num_peers: int, method: str, num_values: int, samples: Samples) -> Row:
    slowest = [max(s.seconds for s in repeat) for repeat in samples[method]]
    gloo = [max(s.seconds for s in repeat) for repeat in samples[GLOO]]
    every = [sample for repeat in samples[method] for sample in repeat]
    return Row(
        peers=num_peers,
        method=method,
        num_values=num_values,
        seconds=statistics.median(slowest),
        times_gloo=statistics.median(s / g for s, g in zip(slowest, gloo, strict=True)),
        prepare_seconds=statistics.median(s.prepare_seconds for s in every) if method in CODECS else 0.0,
        cpu_seconds=statistics.median(s.cpu_seconds for s in every),
        sent_mb=statistics.median(s.bytes_sent for s in every) / 1e6,
        wire_mb=statistics.median(s.bytes_on_wire for s in every) / 1e6,
        pss_mib=statistics.median(s.pss_mib for s in every),
        error=max(s.error for s in every),
        is_identical=all(len({s.digest for s in repeat}) == 1 for repeat in samples[method]),
    )


def _print(rows: Sequence[Row], flags: argparse.Namespace, console: Console) -> None:
    title = f"One exchange of float32 values, medians of {flags.repeats} repeats"
    table = Table(title=title, title_justify="left")
    for heading in ("peers", "method"):
        table.add_column(heading)
    for heading in (
        "values",
        "seconds",
        "x gloo",
        "prepare s",
        "CPU-s/peer",
        "sent MB/peer",
        "wire MB/peer",
        "PSS MiB",
        "error",
        "one hash",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.peers),
            row.method,
            f"{row.num_values / 1e6:.1f}M",
            f"{row.seconds:.2f}",
            f"{row.times_gloo:.1f}",
            f"{row.prepare_seconds:.2f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.sent_mb:.1f}",
            f"{row.wire_mb:.1f}",
            f"{row.pss_mib:.0f}",
            f"{row.error:.1e}",
            "yes" if row.is_identical else "no",
        )
    console.print(table)


def _plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, Callable[[Row], float]] = {
        "seconds, as multiples of gloo's": lambda row: row.times_gloo,
        "MB sent per peer": lambda row: row.sent_mb,
        "CPU-seconds per peer": lambda row: row.cpu_seconds,
        "MiB of a peer, PSS": lambda row: row.pss_mib,
        "largest error, against float64": lambda row: row.error,
    }
    methods = list(dict.fromkeys(row.method for row in rows))
    num_peers = sorted({row.peers for row in rows})
    thickness = 0.8 / len(num_peers)
    height = 2 * (1.0 + 0.2 * len(methods) * max(len(num_peers), 2)) + 0.6
    figure, grid = plt.subplots(2, 3, figsize=(12, height), sharey=True)
    axes = grid.flatten()
    for axis, (title, value) in zip(axes, panels.items(), strict=False):
        for index, peers in enumerate(num_peers):
            own = [row for row in rows if row.peers == peers]
            offset = (index - (len(num_peers) - 1) / 2) * thickness
            places = [methods.index(row.method) + offset for row in own]
            bars = axis.barh(places, [value(row) for row in own], thickness, label=f"{peers} peers")
            axis.bar_label(bars, fmt=_short, padding=2, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[4].set_xscale("log")
    axes[5].set_axis_off()
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-2 else f"{value:.0e}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.bench_fusion", description="What one exchange costs.")
    parser.add_argument("--peers", type=positive_int, nargs="+", default=[4], metavar="N")
    parser.add_argument(
        "--codecs", nargs="+", choices=sorted(CODECS), default=["fp32", "fp16", "int8", "int4", "topk"]
    )
    parser.add_argument("--rule", default="mean", metavar="RULE", help="of coordinator.spec; default: mean")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N")
    parser.add_argument(
        "--values", type=positive_int, default=22_713_216, metavar="N", help="all-MiniLM-L6-v2 has 22.7M"
    )
    parser.add_argument(
        "--stock-up-to", type=int, default=8, metavar="N", help="peers; it needs 0.7 GB for each"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for fusion.json and fusion.png")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=("ours", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--num-peers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def _main(flags: argparse.Namespace) -> int:
    if flags.worker is not None:
        Worker(flags).serve()
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    samples: dict[int, Samples] = {}
    for num_peers in flags.peers:
        has_stock = num_peers <= flags.stock_up_to
        fitting = argparse.Namespace(
            **{**vars(flags), "values": fitting_values(flags.values, num_peers, has_stock)}
        )
        done = samples[num_peers] = measure(fitting, num_peers)
        rows += [_row(num_peers, method, fitting.values, done) for method in done]
        _print(rows, flags, console)
        if flags.out is not None:  # each time: the next one may be too much for the machine
            flags.out.mkdir(parents=True, exist_ok=True)
            _write(flags.out / "fusion.json", json.dumps(_report(flags, rows, samples), indent=1) + "\n")
            _plot(rows, flags.out / "fusion.png")
    return 0


def fitting_values(num_values: int, num_peers: int, has_stock: bool, free_bytes: int | None = None) -> int:
    """`num_values`, or as many as this machine has memory for in so many processes. Raises SwarmError."""
    free = psutil.virtual_memory().available if free_bytes is None else free_bytes
    fixed = PROCESS_BYTES + (STOCK_PROCESS_BYTES if has_stock else 0)
    per_value = BYTES_PER_VALUE + (STOCK_BYTES_PER_VALUE if has_stock else 0)
    fitting = int((MEMORY_SHARE * free / num_peers - fixed) / per_value)
    if fitting < 1:
        raise SwarmError(f"{num_peers} peers need more than the {free / 1e9:.1f} GB of memory that are free")
    return min(num_values, fitting)


def _report(flags: argparse.Namespace, rows: Sequence[Row], samples: Mapping[int, Samples]) -> dict[str, Any]:
    """For fusion.json: nothing of it names the machine or a directory."""
    return {
        "settings": {
            "values": flags.values,
            "repeats": flags.repeats,
            "rule": flags.rule,
            "peers": flags.peers,
            "codecs": flags.codecs,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("hivemind", "numpy", "torch")},
        },
        "num_cores": os.cpu_count(),
        "rows": [asdict(row) for row in rows],
        "samples": [
            {"peers": num_peers, "method": method, "repeat": repeat, "peer": peer, **asdict(sample)}
            for num_peers, by_method in samples.items()
            for method, repeats in by_method.items()
            for repeat, each in enumerate(repeats)
            for peer, sample in enumerate(each)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
