"""What is on this machine? Disk, memory, device, the data, and the speed of a few real steps.

Only measures; `peer/checkup.py` judges. Nothing is written outside the directory given.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from coordinator.errors import ModelError, SpecError, StateError
from coordinator.identity import load_identity
from coordinator.spec import RunSpec
from peer.checkup import (
    Batch,
    Check,
    DataFigures,
    Device,
    ModelSize,
    ModelSource,
    RoundBudget,
    judge_disk,
    judge_memory,
)
from peer.compression import CODECS
from peer.config import PeerConfig
from peer.data import TaskData
from peer.evaluate import bf16_supported
from peer.finetune import Budget
from peer.genesis import State, has_files, kept_spec, load_first_state, run_file
from peer.layout import TensorLayout
from peer.learner import Learner, num_head_examples
from peer.model import encoder_shape, load_tokenizer
from peer.outer import num_buffers
from peer.state import Checkpoint, kept_checkpoint
from peer.versions import check_versions

NUM_ROWS_LOOKED_AT = 2000  # for lengths; tokenizing them takes a second
NUM_ROWS_TRIED = 500  # for speed
WARM_UP_EXAMPLES = 8
SLOW_WARM_UP_SECONDS = 4.0
SPEED_SECONDS = 5.0  # of finetuning
_EXPORTS = ("checkpoints", "model", "task_model")


def quick_checks(config: PeerConfig, spec: RunSpec | None) -> list[Check]:
    """What takes milliseconds; without a spec, what does not depend on the model."""
    checks = check_versions()
    if spec is None:
        return checks
    size, device = size_of(spec), find_device(config.finetune.use_cpu, config.num_threads)
    batch = batch_of(config, find_config(spec, config.output_dir))
    return [*checks, check_disk(config.output_dir, size), check_memory(size, batch, on_gpu=device.is_gpu)]


# ---- disk and memory ------------------------------------------------------------------------------


def size_of(spec: RunSpec) -> ModelSize:
    return ModelSize(
        num_parameters=spec.num_parameters,
        num_state_values=spec.num_parameters * (1 + num_buffers(spec.outer_optimizer)),
        files_bytes=sum(file.size_bytes for file in spec.files.values()),
        is_lossy=CODECS[spec.compression].is_lossy,
    )


def find_config(spec: RunSpec, output_dir: Path) -> Path | None:
    """A directory on this machine that holds the config of the run's model."""
    if "config.json" not in spec.files:
        return None
    for directory in (output_dir / "base", _local_directory(spec)):
        if directory is not None and run_file(spec, directory, "config.json") is not None:
            return directory
    return None


def batch_of(config: PeerConfig, model_dir: Path | None) -> Batch:
    """`model_dir`: that holds the model's config; None, or a config that does not say: as of a small one."""
    chosen, usual = config.finetune, Batch()
    try:
        shape = {} if model_dir is None else encoder_shape(model_dir)
    except ModelError:  # told by the check of the model
        shape = {}
    return Batch(
        num_texts=chosen.per_device_train_batch_size,
        num_tokens=min(chosen.max_length, shape.get("max_position_embeddings", chosen.max_length)),
        num_layers=shape.get("num_hidden_layers", usual.num_layers),
        hidden_size=shape.get("hidden_size", usual.hidden_size),
        num_heads=shape.get("num_attention_heads", usual.num_heads),
    )


def check_output(config: PeerConfig) -> Check:
    """Whether the directory can be written, and the identity be read, where there is one. Makes neither."""
    folder = _nearest(config.output_dir)
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        what = f"{config.output_dir} cannot be written"
        return Check("output", "failure", what, "choose another --output-dir, or change its rights")
    if not config.identity_file.exists():
        return Check("output", "ok", "can be written; a new identity will be made")
    try:
        identity = load_identity(config.identity_file)
    except StateError as error:
        what, _, fix = str(error).partition("; ")
        return Check("output", "failure", what, fix or "give another --identity-path")
    return Check("output", "ok", f"can be written; you are …{identity.peer_id[-8:]}")


def check_disk(output_dir: Path, size: ModelSize) -> Check:
    return judge_disk(free_disk_bytes(output_dir), _used_bytes(output_dir), size)


def check_memory(size: ModelSize, batch: Batch, *, on_gpu: bool) -> Check:
    return judge_memory(available_memory_bytes(), size, batch, on_gpu=on_gpu)


def free_disk_bytes(directory: Path) -> int:
    """Where `directory` is, or would be made."""
    return shutil.disk_usage(_nearest(directory)).free


def available_memory_bytes() -> int:
    """Of this process in all: what it has, and what is left on the machine and in its container."""
    left = [psutil.virtual_memory().available, *_left_in_container()]
    return min(left) + psutil.Process().memory_info().rss


def _left_in_container() -> list[int]:
    """Of control groups, version 2; empty where there is no limit."""
    try:
        path = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        group = Path("/sys/fs/cgroup") / path.strip("/")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [] if limit == "max" else [int(limit) - used + int(stat["inactive_file"])]
    except (OSError, ValueError, KeyError):
        return []  # another system, or an older kernel


def _nearest(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _used_bytes(directory: Path) -> int:
    files = (file for name in _EXPORTS for file in (directory / name).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


# ---- device, data, speed --------------------------------------------------------------------------


def find_device(use_cpu: bool, num_threads: int | None) -> Device:
    has_gpu = torch.cuda.is_available()
    if has_gpu and not use_cpu:
        device = torch.device("cuda")
        free, _ = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return Device(name, True, torch.get_num_threads(), bf16_supported(device), free)
    threads = num_threads or torch.get_num_threads()
    return Device("cpu", False, threads, bf16_supported(torch.device("cpu")), None, has_gpu)


def data_figures(data: TaskData) -> DataFigures:
    known = set(_texts(data, "train"))
    return DataFigures(
        kind=data.task.kind,
        is_pair=data.task.is_pair,
        num_train=len(data.train),
        num_validation=len(data.validation),
        num_test=len(data.test),
        train_counts=_class_counts(data, "train"),
        validation_counts=_class_counts(data, "validation"),
        num_overlap=sum(text in known for role in ("validation", "test") for text in _texts(data, role)),
        notes=data.notes,
    )


def _texts(data: TaskData, role: str) -> list[tuple[str, ...]]:
    split = getattr(data, role)
    names = ("text", "text_pair") if data.task.is_pair else ("text",)
    return list(zip(*(split[name] for name in names), strict=True))


def _class_counts(data: TaskData, role: str) -> dict[str, int]:
    if data.task.kind == "regression":
        return {}
    counts = Counter(getattr(data, role)["label"])
    return {name: counts[index] for index, name in enumerate(data.task.label_names)}


def token_lengths(data: TaskData, model_dir: Path) -> list[int]:
    """Of the first rows for training, before anything is cut."""
    tokenizer = load_tokenizer(model_dir)
    rows = data.train[:NUM_ROWS_LOOKED_AT]
    texts = [rows["text"], rows["text_pair"]] if data.task.is_pair else [rows["text"]]
    return [
        len(ids) for ids in tokenizer(*texts, truncation=False, padding=False, verbose=False)["input_ids"]
    ]


def max_tokens(model_dir: Path) -> int:
    """The most that `peer.data.tokenize` leaves of a text, whatever `--max-length` says."""
    return load_tokenizer(model_dir).model_max_length


@dataclass(frozen=True)
class FoundModel:
    source: ModelSource
    directory: Path | None = None  # that holds its files
    state: State | None = None  # of the checkpoint, or round 0; None: the weights are not here


@dataclass(frozen=True)
class KeptRun:
    """What an output directory holds of a run, which `join` resumes."""

    spec: RunSpec
    checkpoint: Checkpoint


def find_kept_run(config: PeerConfig) -> KeptRun | None:
    """None: there is nothing to resume. Nothing is written. Raises StateError, SpecError."""
    spec = kept_spec(config.output_dir)
    if spec is None:
        return None
    if config.run_digest not in (None, spec.digest):
        raise SpecError(
            f"{config.output_dir} holds the run {spec.digest}, not {config.run_digest}, which --run names; "
            "choose another --output-dir"
        )
    checkpoint = kept_checkpoint(config.output_dir)
    return None if checkpoint is None else KeptRun(spec, checkpoint)


def find_model(spec: RunSpec, kept: KeptRun | None, output_dir: Path) -> FoundModel:
    """What an output directory holds, a model directory, or what an earlier download from the hub left.

    Nothing is downloaded now.
    """
    if kept is not None and has_files(spec, output_dir / "base"):
        resumed = State.of(kept.checkpoint.layout, kept.checkpoint.flat)
        return FoundModel("kept", output_dir / "base", resumed)
    directory = _local_directory(spec)
    if directory is None:
        return FoundModel("nowhere")
    try:
        if not has_files(spec, directory):
            return FoundModel("other files")
        state = load_first_state(spec, directory)
    except ModelError:
        return FoundModel("other files")
    return FoundModel("other weights") if state is None else FoundModel("here", directory, state)


def _local_directory(spec: RunSpec) -> Path | None:
    path = Path(spec.model).expanduser()
    if path.is_dir():
        return path
    try:
        cached = try_to_load_from_cache(spec.model, "config.json", revision=spec.revision)
    except HFValidationError:  # a path of the machine on which the run began
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def random_backbone(layout: TensorLayout, seed: int) -> torch.Tensor:
    """(num_values,) as fast as the real one, which is still with the peers."""
    return 0.02 * torch.randn(layout.num_values, generator=torch.Generator().manual_seed(seed))


def measure_speed(
    config: PeerConfig,
    data: TaskData,
    model_dir: Path,
    layout: TensorLayout,
    flat: torch.Tensor,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Examples/s of a few steps as a round makes them, on the person's own rows. flat: (num_values,)."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    few = replace(data, train=_first_rows(data.train), validation=_first_rows(data.validation))
    eval_examples, seed = config.eval_examples, config.seed
    learner = Learner(few, model_dir, layout, flat, config.finetune, eval_examples=eval_examples, seed=seed)
    # A few examples allocate, and set up what Trainer needs: not what is measured, but where even they take
    # long, they have to do.
    result = learner.finetune(Budget(num_examples=WARM_UP_EXAMPLES), round_=0, should_stop=should_stop)
    if result.seconds < SLOW_WARM_UP_SECONDS:
        result = learner.finetune(Budget(seconds=SPEED_SECONDS), round_=1, should_stop=should_stop)
    return max(1, result.num_examples) / result.seconds


def _first_rows(split: Dataset) -> Dataset:
    return split.select(range(min(NUM_ROWS_TRIED, len(split))))


def round_budget(spec: RunSpec, num_trainers: int, config: PeerConfig) -> RoundBudget:
    return RoundBudget(
        num_examples=spec.round_examples,
        seconds=spec.round_seconds,
        limit_seconds=spec.round_limit_seconds,
        part_bytes=CODECS[spec.compression].size_bytes(spec.num_parameters),
        num_peers=min(spec.max_peers, max(spec.min_peers, num_trainers + 1)),
        num_scored=config.eval_examples + num_head_examples(config.eval_examples),
        upload_bytes_per_second=config.max_upload_bytes_per_second,
    )
