"""Join a swarm, or begin one, with your own data.

python -m peer.join --initial-peers ADDR [ADDR ...] --data FILE --output-dir DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.cli import (
    EXIT_CODES,
    Parser,
    add_invite_argument,
    add_network_arguments,
    add_output_arguments,
    add_private_arguments,
    add_run_arguments,
    default_run_name,
    positive,
    positive_int,
    run_main,
    spec_options,
    trusted_digest,
    with_invite,
)
from coordinator.errors import UsageError
from coordinator.identity import load_identity
from coordinator.organizer import load_organizer

if TYPE_CHECKING:
    from coordinator.spec import RunSpec
    from peer.checkup import Check
    from peer.config import PeerConfig
    from peer.display import Reporter
    from peer.genesis import State
    from peer.manners import Manners
    from peer.stopping import StopSwitch

THREAD_VARIABLES = (  # which each library reads once, when it is loaded or first used
    "OMP_NUM_THREADS",  # torch, pyarrow
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",  # numpy, scipy
    "RAYON_NUM_THREADS",  # tokenizers
)
MIN_UPLOAD_MBPS = 1.0  # `coordinator.pace` takes a peer below it for a silent one

EPILOG = f"""examples:
  join a swarm with a file of examples (columns text and label):
    python -m peer.join --initial-peers /ip4/203.0.113.5/tcp/4001/p2p/12D3Koo... \\
        --data reviews.csv --output-dir mine
  the same, with sentence pairs and a separate file to validate on:
    python -m peer.join --initial-peers ADDR --data train.jsonl --validation-data dev.jsonl \\
        --text-column premise --text-pair-column hypothesis --label-column label --output-dir mine
  a private swarm, with the string that its organizer sent you:
    python -m peer.join --invite STRING --data reviews.csv --output-dir mine
  begin a swarm; others join through the address that it prints:
    python -m peer.join --model sentence-transformers/all-MiniLM-L6-v2 --data reviews.csv --output-dir mine
  go on after a stop, a crash or a power cut: the same command again.
  will it work here? the same flags, nothing is spent: python -m peer.doctor --initial-peers ...

what you find in the output directory:
  model/         the fused encoder: AutoModel.from_pretrained("DIR/model")
  task_model/    your own classifier: pipeline("text-classification", model="DIR/task_model")
  rounds.jsonl   what was measured in every round
  run.toml       the run's spec, checkpoints/, identity.key (private: it is you)

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(lambda: _join(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m peer.join",
        usage="python -m peer.join [--initial-peers ADDR ...] --data FILE --output-dir DIR [option ...]",
        description="Finetune the swarm's shared model on your own data; the data never leaves.",
        epilog=EPILOG,
    )
    add_join_arguments(parser)
    return read_flags(parser.parse(argv))


def read_flags(args: argparse.Namespace) -> argparse.Namespace:
    """With the invite read, and what one flag says against another refused. Raises SwarmError."""
    args = with_invite(args)
    if args.private and args.initial_peers:
        raise UsageError("--private begins a run; to join one that is private, give --invite STRING alone")
    return args


def add_join_arguments(parser: argparse.ArgumentParser, *, needs_output_dir: bool = True) -> None:
    """The flags of `join`, which `peer.doctor` takes as well."""
    parser.add_argument(
        "--initial-peers",
        nargs="+",
        default=[],
        metavar="ADDR",
        help="address of any peer of the swarm; none: begin a swarm",
    )
    add_invite_argument(parser)
    parser.add_argument(
        "--run",
        metavar="DIGEST",
        help="the run to trust (64 hex digits); default: ask the entry point, and print it",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=needs_output_dir,
        metavar="DIR",
        help="checkpoints and results; to resume, give it again",
    )
    parser.add_argument("--max-seconds", type=positive, metavar="S", help="leave after this time")
    parser.add_argument(
        "--linger-seconds",
        type=positive,
        default=60.0,
        metavar="S",
        help="after the last round: serve those that lack its state, at most so long (default: 60)",
    )
    parser.add_argument(
        "--name", default="", metavar="NAME", help="how people who watch see this peer (default: no name)"
    )
    parser.add_argument(
        "--share-metrics",
        action="store_true",
        help="tell the swarm the scores of base, own and fused backbone on your held-out data",
    )
    _add_data_arguments(parser)
    _add_training_arguments(parser)
    _add_manners_arguments(parser)
    add_network_arguments(parser)
    parser.add_argument(
        "--no-listen",
        action="store_true",
        help="take no connections, only make them; with --reachability private others come by relay",
    )
    add_private_arguments(parser)
    add_output_arguments(parser)
    add_run_arguments(
        parser,
        title="a new run (without --initial-peers); --rounds N of one joined or resumed: leave after N",
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        "--train-file",
        required=True,
        metavar="FILE",
        help="CSV, TSV, JSON lines, Parquet; folder of train/validation/test files; saved or hub data set",
    )
    group.add_argument(
        "--validation-data", "--validation-file", metavar="FILE", help="default: cut from --data"
    )
    group.add_argument("--test-data", "--test-file", metavar="FILE", help="default: cut from --data")
    group.add_argument(
        "--dataset-config",
        "--dataset-config-name",
        metavar="NAME",
        help="config of a hub data set, such as sst2 of glue",
    )
    group.add_argument("--split", metavar="NAME", help="split to train on, if it is not called train")
    group.add_argument("--text-column", metavar="NAME", help="default: guessed, and said")
    group.add_argument("--text-pair-column", metavar="NAME", help="second text of sentence pairs")
    group.add_argument("--label-column", metavar="NAME", help="class, or number for regression")
    group.add_argument("--task", choices=("auto", "classification", "regression"), default="auto")
    group.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="of the examples, where there is no file (default: 0.1)",
    )
    group.add_argument(
        "--test-fraction", type=float, default=0.1, metavar="F", help="the same (default: 0.1)"
    )
    group.add_argument(
        "--max-train-examples",
        "--max-train-samples",
        type=positive_int,
        metavar="N",
        help="a stratified sample of the training data",
    )
    group.add_argument(
        "--eval-examples",
        "--max-eval-samples",
        type=positive_int,
        default=1000,
        metavar="N",
        help="held-out examples scored per backbone (default: 1000)",
    )


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("finetuning (Hugging Face names)")
    group.add_argument(
        "--learning-rate", type=float, metavar="LR", help="the highest of a round (default: 5e-5)"
    )
    group.add_argument(
        "--per-device-train-batch-size", "--batch-size", type=int, metavar="N", help="default: 32"
    )
    group.add_argument("--gradient-accumulation-steps", type=int, metavar="N", help="default: 1")
    group.add_argument("--weight-decay", type=float, metavar="W")
    group.add_argument(
        "--warmup-ratio",
        type=float,
        metavar="F",
        help="part of a round in which the learning rate rises (default: 0.1; the paper: 0)",
    )
    group.add_argument(
        "--lr-scheduler-type", choices=("linear", "constant", "cosine"), help="default: linear"
    )
    group.add_argument("--max-grad-norm", type=float, metavar="G")
    group.add_argument(
        "--max-length",
        "--max-seq-length",
        type=int,
        metavar="N",
        help="tokens of a text, as far as the model takes them (default: 128)",
    )
    group.add_argument(
        "--head-init",
        choices=("probe", "keep", "fresh"),
        help="head at the start of a round: fitted, kept, or new as in the paper (default: probe)",
    )
    group.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="default: where the processor supports it"
    )
    group.add_argument(
        "--early-stopping",
        action=argparse.BooleanOptionalAction,
        help="the paper's rule: no gain of 0.001 in 256K examples",
    )
    group.add_argument("--early-stopping-examples", type=int, metavar="N")
    group.add_argument("--early-stopping-gain", type=float, metavar="G")
    group.add_argument("--use-cpu", action=argparse.BooleanOptionalAction, help="even where there is a GPU")
    group.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="processor threads (default: all; share them between peers of one machine)",
    )
    group.add_argument("--seed", type=int, default=0, help="of this peer's own draws (default: 0)")


def _add_manners_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "manners (SIGUSR1 pauses a running peer, SIGUSR2 lets it go on; a paused peer holds nobody up)"
    )
    group.add_argument(
        "--pause-when-busy",
        nargs="?",
        type=float,
        const=50.0,
        metavar="PERCENT",
        help="rest while other programs use more than so much of the processors or the GPU (default: 50)",
    )
    group.add_argument("--schedule", metavar="HH:MM-HH:MM", help="work only in this window of the day")
    group.add_argument(
        "--max-upload-mbps",
        type=float,
        metavar="M",
        help="send at most so many megabits per second, on average; "
        f"at least {MIN_UPLOAD_MBPS:g}, and more in groups of more than four",
    )
    group.add_argument(
        "--nice", type=int, metavar="N", help="lower priority of this process and its daemon: 0 to 19"
    )


def _join(args: argparse.Namespace) -> int:
    lower_priority(args.nice)
    limit_threads(args.threads)
    # Imported after the flags are read: torch and transformers take seconds, --help should not.
    # The data come first: what is wrong with them is told before anything slow is even imported.
    from peer.data import load_task_data
    from peer.display import Reporter, claim_stdout, setup_logging

    setup_logging(args.log_level, args.log_file)
    reporter = Reporter(args.json, stream=claim_stdout() if args.json else None)
    if not (args.initial_peers or args.model or (args.output_dir / "run.toml").exists()):
        raise UsageError("give --initial-peers to join a swarm, or --model to begin one")
    config, manners = make_config(args), make_manners(args)
    data = load_task_data(config.data)
    for note in data.notes:
        reporter.note(note)

    from peer.session import Session
    from peer.state import CheckpointStore
    from peer.stopping import StopSwitch

    with (
        manners.listening(),
        StopSwitch(args.max_seconds).listening() as stop,
        CheckpointStore(config.output_dir) as store,
    ):
        spec, state = _begin_run(args, config, store)
        _check_quickly(config, spec, reporter, stop)
        Session(config, data, store, reporter, stop, manners).run(spec, state)
    return stop.exit_code


def lower_priority(nice: int | None) -> None:
    """Of this thread, and of all threads and processes that it starts from now on. Raises UsageError.

    Linux has a priority for each thread; so it is lowered before libraries start theirs.
    """
    _check_nice(nice)
    if nice is not None:
        os.nice(nice)


def _check_nice(nice: int | None) -> None:
    if nice is not None and not 0 <= nice <= 19:
        raise UsageError(f"--nice {nice}: give a number from 0 (as others) to 19 (after all others)")


def limit_threads(num_threads: int | None) -> None:
    """Of libraries that are imported later; what was said on the command line beats the environment."""
    if num_threads is not None:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(num_threads)))


def make_manners(args: argparse.Namespace) -> Manners:
    """Changes nothing: `--nice` is looked at only. Raises UsageError."""
    from peer.gpu_use import GpuWatch, uses_gpu
    from peer.manners import Manners, Schedule

    percent = args.pause_when_busy
    if percent is not None and not 1 <= percent <= 99:
        raise UsageError(f"--pause-when-busy {percent:g}: give a percentage from 1 to 99")
    _check_nice(args.nice)
    schedule = None if args.schedule is None else Schedule.parse(args.schedule)
    if percent is None:
        return Manners(schedule)
    gpu = GpuWatch(is_used=uses_gpu(bool(args.use_cpu)))
    gpu.others_share()  # what it does not see is said now, not in the middle of the work
    return Manners(schedule, percent / 100, gpu_share=gpu.others_share)


def make_config(args: argparse.Namespace) -> PeerConfig:
    """Raises UsageError."""
    from peer.about import tidy_name
    from peer.config import PeerConfig
    from peer.data import DataConfig
    from peer.finetune import FinetuneConfig

    data = DataConfig(
        data=args.data,
        validation_data=args.validation_data,
        test_data=args.test_data,
        dataset_config=args.dataset_config,
        split=args.split,
        text_column=args.text_column,
        text_pair_column=args.text_pair_column,
        label_column=args.label_column,
        task=args.task,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
        max_train_examples=args.max_train_examples,
        max_eval_examples=args.eval_examples,
        seed=args.seed,
    )
    chosen: dict[str, Any] = {
        name: value
        for name in FinetuneConfig.__dataclass_fields__
        if (value := getattr(args, name, None)) is not None
    }
    return PeerConfig(
        output_dir=args.output_dir,
        data=data,
        finetune=FinetuneConfig(**chosen),
        initial_peers=tuple(args.initial_peers),
        run_digest=trusted_digest(args.run),
        invite=args.invite,
        organizer_key=args.organizer_key,
        identity_path=args.identity_path,
        host_maddrs=tuple(args.host_maddrs),
        listens=not args.no_listen,
        reachability=args.reachability,
        announce_maddrs=tuple(args.announce_maddrs),
        num_rounds=None if _begins(args) else args.rounds,
        max_seconds=args.max_seconds,
        linger_seconds=args.linger_seconds,
        name=tidy_name(args.name),
        shares_metrics=args.share_metrics,
        eval_examples=args.eval_examples,
        num_threads=args.threads,
        max_upload_bytes_per_second=_upload_rate(args.max_upload_mbps),
        seed=args.seed,
    )


def _begins(args: argparse.Namespace) -> bool:
    """A run, whose rounds are then meant by `--rounds`, and not those of this peer."""
    return not args.initial_peers and not (args.output_dir / "run.toml").exists()


def _check_quickly(config: PeerConfig, spec: RunSpec | None, reporter: Reporter, stop: StopSwitch) -> None:
    """What `peer.doctor` looks at and takes a second. Raises SwarmError; warnings are told and it goes on."""
    from coordinator.spec import load_spec
    from peer.checkup import judge_clock_at_a_glance, raise_failure
    from peer.ledger_file import LEDGER_NAME, Ledger
    from peer.probes import quick_checks
    from peer.stopping import StopRequested
    from peer.swarm_probes import glance

    clock: list[Check] = []
    if spec is None and config.initial_peers:
        try:
            with Ledger(config.output_dir / LEDGER_NAME) as ledger:
                spec, clocks = glance(config, stop.check, ledger.sent)
        except StopRequested:
            return  # the session stops in order
        if spec is not None and clocks is not None:
            clock = [judge_clock_at_a_glance(clocks, lease_seconds=spec.lease_seconds)]
    elif spec is None and (config.output_dir / "run.toml").exists():
        spec = load_spec(config.output_dir / "run.toml")
    checks = [*quick_checks(config, spec), *clock]
    raise_failure(checks)
    for check in checks:
        if check.status == "warning":
            reporter.warning(f"{check.name}: {check.message}; {check.fix}")


def _upload_rate(mbps: float | None) -> float | None:
    """Bytes per second. Raises UsageError."""
    if mbps is None:
        return None
    if not MIN_UPLOAD_MBPS <= mbps <= 1e6:
        raise UsageError(
            f"--max-upload-mbps {mbps:g}: give at least {MIN_UPLOAD_MBPS:g}; "
            "slower peers would be taken for silent by the others"
        )
    return mbps * 1e6 / 8


def _begin_run(
    args: argparse.Namespace, config: PeerConfig, store: Any
) -> tuple[RunSpec | None, State | None]:
    """The spec and the first state of a new run; (None, None) when there is one to join or to resume."""
    from peer.genesis import make_run

    if args.private and store.run_digest is not None:
        check_private(config)
    if config.initial_peers or store.run_digest is not None:
        return None, None
    if args.model is None:
        raise UsageError(
            f"{config.output_dir} holds no checkpoint to resume; give --initial-peers or --model"
        )
    options = spec_options(args, seed=args.seed)
    options.setdefault("run_name", default_run_name(args.model))
    if args.private:
        options["organizer"] = load_organizer(args.organizer_key).peer_id
    options["starter"] = load_identity(config.identity_file).peer_id
    return make_run(args.model, args.revision, options, config.output_dir / "base")


def check_private(config: PeerConfig) -> None:
    """Raises UsageError rather than go on with an open run as if it were private."""
    from coordinator.spec import load_spec

    if load_spec(config.output_dir / "run.toml").organizer is None:
        raise UsageError(
            f"{config.output_dir} holds a public run, and a run's spec is frozen; "
            "choose another --output-dir for a private one"
        )


if __name__ == "__main__":
    sys.exit(main())
