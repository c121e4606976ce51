"""What would one machine make of everybody's data? Centralized multitask training, the baseline of a swarm.

One shared backbone, one head per data set; every batch comes from one data set, the data sets take turns in a
random order. The rows, the number of examples in all, the loss, the optimizer, the schedule and the start of
the heads are those of the peers (`peer.finetune`, `peer.evaluate.init_head`); only the fusion is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from coordinator.errors import UsageError
from peer.data import DataConfig, TaskData, load_task_data, tokenize
from peer.evaluate import autocast, init_head, model_columns
from peer.finetune import FinetuneConfig, learning_rate_factor, make_optimizer, plan_batches, task_loss
from peer.layout import TensorLayout
from peer.model import (
    backbone_parameters,
    export_backbone,
    export_model,
    load_backbone,
    load_classifier,
    load_tokenizer,
)
from peer.state import replace_directory
from scripts.simulate import model_directory


@dataclass(frozen=True)
class MultitaskPlan:
    """All that decides the bits of the trained backbone, but for the number of threads."""

    datasets: tuple[str, ...]
    finetune: Mapping[str, Any]  # fields of FinetuneConfig
    num_examples: int  # in all; each data set gives the same number, to one
    model: str
    train_examples: int | None = None  # of each data set, stratified; None: all
    probe_examples: int = 256  # of each data set, to start its head
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_examples < len(self.datasets):
            raise UsageError(
                f"{self.num_examples} examples are not one for each of {len(self.datasets)} sets"
            )


def train_multitask(
    plan: MultitaskPlan, data_dir: Path, out: Path, on_progress: Callable[[float], None] = lambda _: None
) -> None:
    """Writes the encoder to `out`/model. `on_progress` may raise to end it: then nothing is written."""
    data = {name: _load(plan, data_dir, name) for name in plan.datasets}
    model_dir, _ = model_directory(plan.model)
    layout, flat = load_backbone(model_dir)
    trained = multitask(
        data,
        model_dir,
        layout,
        flat,
        FinetuneConfig(**plan.finetune),
        num_examples=plan.num_examples,
        probe_examples=plan.probe_examples,
        seed=plan.seed,
        on_progress=on_progress,
    )
    out.mkdir(parents=True, exist_ok=True)
    replace_directory(out / "model", lambda building: export_model(model_dir, layout, trained, building))


def multitask(
    data: Mapping[str, TaskData],
    model_dir: Path,
    layout: TensorLayout,
    flat: torch.Tensor,
    config: FinetuneConfig,
    *,
    num_examples: int,
    probe_examples: int,
    seed: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> torch.Tensor:
    """(num_values,) float32: the backbone `flat`, trained on all data sets. Deterministic on a CPU."""
    tokenizer = load_tokenizer(model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    train = {
        name: tokenize(one.train, tokenizer, config.max_length, is_pair=one.task.is_pair)
        for name, one in data.items()
    }
    models = _models(data, model_dir, layout, flat, device, seed)
    if config.head_init == "probe":
        for number, (name, model) in enumerate(models.items()):
            rows = _some(train[name], probe_examples, seed + number)
            init_head(model, data[name].task, rows, tokenizer, seed, bf16=config.bf16)
    lengths = {name: list(rows["length"]) for name, rows in train.items()}
    batches = plan_tasks(lengths, config.per_device_train_batch_size, num_examples, seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        _train(models, train, tokenizer, config, batches, num_examples, on_progress)
    return export_backbone(next(iter(models.values())), layout)


def plan_tasks(
    lengths: Mapping[str, list[int]], batch_size: int, num_examples: int, seed: int
) -> Iterator[tuple[str, list[int]]]:
    """(data set, indices of one batch), `num_examples` in all: the batches of a peer, in turns by lot."""
    names, share = list(lengths), divmod(num_examples, len(lengths))
    plans = {
        name: list(plan_batches(lengths[name], batch_size, share[0] + (number < share[1]), seed + number))
        for number, name in enumerate(names)
    }
    turns = [name for name in names for _ in plans[name]]
    queues = {name: iter(plan) for name, plan in plans.items()}
    for turn in np.random.default_rng(seed).permutation(len(turns)):
        yield turns[turn], next(queues[turns[turn]])


# ---- helpers ------------------------------------------------------------------------------


def _load(plan: MultitaskPlan, data_dir: Path, name: str) -> TaskData:
    """The rows of the contributor of that name, as `scripts.simulate` takes them."""
    return load_task_data(
        DataConfig(
            data=str(data_dir / name),
            task="classification",
            max_train_examples=plan.train_examples,
            seed=plan.seed,
        )
    )


def _models(
    data: Mapping[str, TaskData],
    model_dir: Path,
    layout: TensorLayout,
    flat: torch.Tensor,
    device: torch.device,
    seed: int,
) -> dict[str, PreTrainedModel]:
    """One classifier per data set. The parameters of the backbone are the same objects in all of them."""
    models: dict[str, PreTrainedModel] = {}
    shared: dict[str, nn.Parameter] = {}
    for number, (name, one) in enumerate(data.items()):
        model = load_classifier(model_dir, one.task, seed=seed + number, backbone=(layout, flat))
        nn.Module.to(model, device)  # (transformers' own `to` is not typed)
        shared = shared or backbone_parameters(model)
        _share(model, shared)
        models[name] = model
    return models


def _share(model: PreTrainedModel, shared: Mapping[str, nn.Parameter]) -> None:
    """A parameter of the backbone may stand at several places of a model (tied): all of them are replaced."""
    replaced = {id(old): shared[name] for name, old in backbone_parameters(model).items()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in replaced:
                setattr(module, name, replaced[id(parameter)])


def _some(rows: Dataset, num_rows: int, seed: int) -> Dataset:
    chosen = np.random.default_rng(seed).permutation(len(rows))[:num_rows]
    return rows.select(np.sort(chosen))


def _train(
    models: Mapping[str, PreTrainedModel],
    train: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    config: FinetuneConfig,
    batches: Iterator[tuple[str, Sequence[int]]],
    num_examples: int,
    on_progress: Callable[[float], None],
) -> None:
    whole = nn.ModuleDict({f"task{number}": model for number, model in enumerate(models.values())})
    whole.train()
    optimizer = make_optimizer(cast(PreTrainedModel, whole), config)  # it asks for the parameters only
    collate = DataCollatorWithPadding(tokenizer)
    columns = {name: model_columns(model, train[name]) for name, model in models.items()}
    num_done = 0
    for name, indices in batches:
        model = models[name]
        factor = learning_rate_factor(
            config.lr_scheduler_type,
            num_done / num_examples,
            config.warmup_ratio,
            step_fraction=len(indices) / num_examples,
        )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        rows = collate([columns[name][int(i)] for i in indices])
        batch = {key: values.to(model.device) for key, values in rows.items()}
        labels = batch.pop("labels")
        with autocast(model.device, config.bf16):
            logits = model(**batch).logits
        optimizer.zero_grad(set_to_none=True)  # the heads of the other data sets stay as they are
        task_loss(logits, labels).backward()
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(whole.parameters(), config.max_grad_norm)
        optimizer.step()
        num_done += len(indices)
        on_progress(num_done / num_examples)
