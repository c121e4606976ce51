"""What would a swarm make of these data? A whole run in one process, for research.

    python -m scripts.simulate --data-dir DATA --datasets sst2 cola mnli --out DIR --rounds 30 --max-peers 8

DATA holds a folder of train.csv, validation.csv and test.csv for each name. Every data set is one contributor
(--split N: N of them, each with its share of the rows); the flags of the run are those of coordinator.start.
DIR gets run.toml, rounds.jsonl (one line a round), model/ (the fused encoder, for AutoModel.from_pretrained)
and checkpoint.safetensors. Stopped, it goes on where it was: the same command gives the same bits.

    --straggler cola=0.5          cola has done half of its budget when a round closes; 2: twice
    --harm mnli=flipped           mnli sends minus what it learned (none, noise, flipped, x100, shuffled)
    --churn 0.2                   each contributor misses a fifth of the rounds
    --drop 0.9, --trim 0.8        of each delta a tenth, by chance (DARE), or the largest fifth (TIES)
    --keep-every 5                models/round-0005/ and so on, besides the last
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import datasets
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from coordinator.cli import Parser, add_run_arguments, positive, positive_int, run_main, spec_options
from coordinator.errors import UsageError
from coordinator.spec import RunSpec
from peer.data import DataConfig, TaskData, load_task_data
from peer.finetune import FinetuneConfig
from peer.genesis import State, make_run
from peer.model import check_revision, export_model, resolve_model
from peer.state import append_json_line, repair_json_lines, replace_directory, write_text
from peer.stopping import StopSwitch
from scripts.demo import embedded_encoder
from scripts.simulation import Contributor, Harm, Outcome, SimulatedSwarm

PACKAGED = "packaged"
PACKAGED_NAME = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Plan:
    """All that decides the bits of a simulated run, but for the number of threads."""

    datasets: tuple[str, ...]
    run: Mapping[str, Any]  # keys of the spec
    finetune: Mapping[str, Any]  # fields of FinetuneConfig
    model: str = PACKAGED  # the encoder of the demo; or a directory, or a hub id
    revision: str | None = None  # of the model on the hub
    train_examples: int | None = None  # of each data set, stratified; None: all
    eval_examples: int = 128  # held out by a contributor; twice as many start the head
    split: int = 1  # contributors that share a data set
    churn: float = 0.0
    drop: float = 0.0  # part of each delta that is dropped by chance, as DARE does
    trim: float = 0.0  # part of each delta that is left out as small, as TIES does
    stragglers: Mapping[str, float] = field(default_factory=dict)  # speed by contributor
    harm: Mapping[str, Harm] = field(default_factory=dict)  # by contributor
    seed: int = 0

    def contributors(self) -> tuple[str, ...]:
        if self.split == 1:
            return self.datasets
        return tuple(f"{name}.{share + 1}" for name in self.datasets for share in range(self.split))


def settings_of(plan: Plan) -> dict[str, Any]:
    """What a run and its scores are known by; what was added later counts only where it does something."""
    added = {"drop", "trim", "revision"}
    return {key: value for key, value in asdict(plan).items() if key not in added or value}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_main(lambda: _main(_parse(arguments)))


def simulate(
    plan: Plan,
    data_dir: Path,
    out: Path,
    *,
    keep_every: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_round: Callable[[Outcome], None] = lambda _: None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> bool:
    """Run it to the end, or go on with what lies in `out`; False when `should_stop` ended it before.

    on_progress gets the fraction of the whole run. Raises UsageError where `out` holds another run, and other
    SwarmErrors.
    """
    _check_names(plan)
    out.mkdir(parents=True, exist_ok=True)
    spec, first = _begin(plan, out)
    swarm = SimulatedSwarm(
        spec,
        out / "base",
        first,
        [_contributor(plan, data_dir, name, i) for i, name in enumerate(plan.contributors())],
        FinetuneConfig(**plan.finetune),
        eval_examples=plan.eval_examples,
        seed=plan.seed,
        churn=plan.churn,
        drop=plan.drop,
        trim=plan.trim,
    )
    checkpoint, lines = out / "checkpoint.safetensors", out / "rounds.jsonl"
    if checkpoint.exists():
        swarm.load(checkpoint)
    _keep_lines(lines, swarm.tick)
    last_tick = swarm.tick + 20 * spec.num_rounds + 100  # a swarm that never has a quorum ends, too
    while not swarm.is_done:
        if swarm.tick >= last_tick:
            raise UsageError(
                f"only {swarm.chain.round} rounds came about in {swarm.tick} tries: lower --churn"
            )
        started = time.monotonic()
        outcome = swarm.step(
            should_stop=should_stop,
            on_progress=lambda fraction: on_progress((swarm.chain.round + fraction) / spec.num_rounds),
        )
        if outcome is None:
            return False
        append_json_line(lines, _line(outcome, time.monotonic() - started))
        if keep_every and outcome.committed and outcome.round % keep_every == 0:
            _export(out, swarm.state, out / "models" / f"round-{outcome.round:04d}")
        swarm.save(checkpoint)
        on_round(outcome)
    if not (out / "model").exists():
        _export(out, swarm.state, out / "model")
    return True


def read_rounds(out: Path) -> list[dict[str, Any]]:
    """What `simulate` wrote, one entry a tick."""
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]


def model_directory(model: str, revision: str | None = None) -> tuple[Path, str]:
    """Where an encoder lies, and its name in the spec. Raises ModelError, UsageError."""
    if model == PACKAGED:
        packaged = embedded_encoder()
        check_revision(str(packaged), revision)
        return packaged, PACKAGED_NAME
    check_revision(model, revision)
    return resolve_model(model, revision), Path(model).name if Path(model).exists() else model


# ---- helpers ------------------------------------------------------------------------------


def _check_names(plan: Plan) -> None:
    names = plan.contributors()
    for flag, given in (("--straggler", plan.stragglers), ("--harm", plan.harm)):
        if unknown := sorted(set(given) - set(names)):
            raise UsageError(f"{flag} {unknown[0]}: no such contributor; there are {', '.join(names)}")
    for name, harm in plan.harm.items():
        if harm not in get_args(Harm):
            raise UsageError(f"--harm {name}={harm}: choose one of {', '.join(get_args(Harm))}")


def _begin(plan: Plan, out: Path) -> tuple[RunSpec, State]:
    """The run of `plan`; `out` holds the same one, or nothing."""
    settings, text = out / "settings.json", json.dumps(settings_of(plan), indent=2, sort_keys=True) + "\n"
    if settings.exists() and settings.read_text() != text:
        raise UsageError(f"{out} holds a run with other settings; name another --out, or delete it")
    model_dir, name = model_directory(plan.model, plan.revision)
    options = {"created_at": 0.0, "run_name": "simulated", "seed": plan.seed, **plan.run, "model": name}
    options["revision"] = plan.revision
    spec, first = make_run(str(model_dir), None, options, out / "base")
    write_text(out / "run.toml", spec.to_toml())
    write_text(settings, text)
    return spec, first


def _contributor(plan: Plan, data_dir: Path, name: str, number: int) -> Contributor:
    dataset, _, share = name.rpartition(".") if plan.split > 1 else (name, "", "1")
    data = load_task_data(
        DataConfig(
            data=str(data_dir / dataset),
            task="classification",
            max_train_examples=plan.train_examples,
            max_eval_examples=plan.eval_examples,
            seed=plan.seed,
        )
    )
    data = _share(data, int(share) - 1, plan.split)
    speed, harm = plan.stragglers.get(name, 1.0), plan.harm.get(name, "none")
    return Contributor(name, data, plan.seed + number, speed, harm)


def _share(data: TaskData, share: int, num_shares: int) -> TaskData:
    """Every n-th training row: the rows are in a random order."""
    if num_shares == 1:
        return data
    return dataclasses.replace(data, train=data.train.select(range(share, len(data.train), num_shares)))


def _keep_lines(path: Path, num_ticks: int) -> None:
    """Of the ticks that the checkpoint holds: a crash may have come between a line and its checkpoint."""
    repair_json_lines(path)
    if path.exists():
        lines = [x for x in path.read_text().splitlines() if json.loads(x)["tick"] <= num_ticks]
        write_text(path, "".join(line + "\n" for line in lines))


def _export(out: Path, state: State, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    layout = state.manifest.layout.backbone
    replace_directory(
        directory, lambda building: export_model(out / "base", layout, state.backbone, building)
    )


def _line(outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "tick": outcome.tick,
        "round": outcome.round,
        "committed": outcome.committed,
        "state_hash": outcome.state_hash,
        "seconds": round(seconds, 2),
        "present": list(outcome.present),
        "fused_norm": outcome.fused_norm,
        "contributors": [
            {
                "name": work.name,
                "num_examples": work.result.num_examples,
                "mean_loss": work.result.mean_loss,
                "norm": work.norm,
                "factor": work.factor,
                "base_head_only": work.base.head_only,
            }
            for work in outcome.works
        ],
    }


def _pairs(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    def parse(text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
        return name, kind(value)

    return parse


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.simulate", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds NAME/train.csv and so on")
    parser.add_argument("--datasets", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="goes on where it stopped")
    parser.add_argument(
        "--split", type=positive_int, default=1, metavar="N", help="contributors per data set"
    )
    parser.add_argument(
        "--train-examples", type=positive_int, metavar="N", help="per data set (default: all)"
    )
    parser.add_argument("--eval-examples", type=positive_int, default=128, metavar="N")
    parser.add_argument("--churn", type=float, default=0.0, metavar="P")
    parser.add_argument("--drop", type=float, default=0.0, metavar="P", help="of each delta, by chance: DARE")
    parser.add_argument("--trim", type=float, default=0.0, metavar="P", help="of each delta, the least: TIES")
    parser.add_argument("--straggler", nargs="+", type=_pairs(float), default=[], metavar="NAME=SPEED")
    parser.add_argument("--harm", nargs="+", type=_pairs(str), default=[], metavar="NAME=KIND")
    parser.add_argument("--keep-every", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive_int, help="of PyTorch (default: its own choice)")
    training = parser.add_argument_group("finetuning (Hugging Face names)")
    training.add_argument("--learning-rate", type=positive, default=5e-5)
    training.add_argument("--per-device-train-batch-size", type=positive_int, default=32, metavar="N")
    training.add_argument("--max-length", type=positive_int, default=128, metavar="TOKENS")
    training.add_argument("--head-init", choices=("probe", "keep", "fresh"), default="probe")
    training.add_argument("--lr-scheduler-type", choices=("linear", "cosine", "constant"), default="linear")
    training.add_argument("--use-cpu", action="store_true", help="even where there is a GPU")
    add_run_arguments(parser, title="the run")
    return parser.parse(arguments)


def _plan(flags: argparse.Namespace) -> Plan:
    fields = ("learning_rate", "per_device_train_batch_size", "max_length", "head_init", "lr_scheduler_type")
    run = spec_options(flags, seed=flags.seed)
    run.pop("created_at")  # the same command is the same run
    return Plan(
        datasets=tuple(flags.datasets),
        run=run,
        finetune={**{name: getattr(flags, name) for name in fields}, "use_cpu": flags.use_cpu},
        model=flags.model or PACKAGED,
        revision=flags.revision,
        train_examples=flags.train_examples,
        eval_examples=flags.eval_examples,
        split=flags.split,
        churn=flags.churn,
        drop=flags.drop,
        trim=flags.trim,
        stragglers=dict(flags.straggler),
        harm=dict(flags.harm),
        seed=flags.seed,
    )


def _main(flags: argparse.Namespace) -> int:
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    datasets.disable_progress_bars()
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    switch = StopSwitch()
    with switch.listening(), Progress(*columns, console=console) as bar:
        task = bar.add_task("simulating", total=1.0)
        is_done = simulate(
            _plan(flags),
            flags.data_dir,
            flags.out,
            keep_every=flags.keep_every,
            should_stop=lambda: switch.is_set,
            on_round=lambda outcome: console.print(_told(outcome)),
            on_progress=lambda fraction: bar.update(task, completed=fraction),
        )
    if not is_done:
        console.print(f"{switch.reason}; the same command goes on after the last round")
        return switch.exit_code
    console.print(f"the fused encoder: {flags.out / 'model'}")
    return 0


def _told(outcome: Outcome) -> str:
    if not outcome.committed:
        return f"too few peers: {', '.join(outcome.present) or 'nobody is here'}"
    scores = [work.base.head_only for work in outcome.works]
    losses = [w.result.mean_loss for w in outcome.works if math.isfinite(w.result.mean_loss)]
    left_out = [work.name for work in outcome.works if work.factor == 0.0]
    loss = sum(losses) / max(1, len(losses))
    return (
        f"round {outcome.round}: {len(outcome.works)} contributors, loss {loss:.3f}, "
        f"their base model {100 * sum(scores) / len(scores):.1f} % head-only"
        + (f", left out: {', '.join(left_out)}" if left_out else "")
    )


if __name__ == "__main__":
    sys.exit(main())
