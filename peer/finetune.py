"""How one peer turns a backbone, a head and its own examples into a finetuned backbone; no network.

`transformers.Trainer` runs the steps. What we replace, and why:
- the batches: exactly the budget, repeating the data, so that half an epoch or three cost the same
  per example. Trainer's own grouping sorts each mega-batch from long to short and would spend a
  small budget on long texts only; ours shuffles the batches.
- the schedule: it follows the budget, in examples or in time, not a number of steps.
- the loss: computed here in fp32 from the logits, the same for every family. (Trainer takes the
  `**kwargs` of these models for a loss that knows the accumulated batch and does not divide it.)
- its files, log lines, progress bar, FLOP count and checks for NaN at every step: left out.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from coordinator.errors import DataError, UsageError
from peer.evaluate import autocast, evaluate_classifier, model_columns
from peer.tasks import Task

StopReason = Literal["budget", "deadline", "early_stopping", "stopped"]
Schedule = Literal["linear", "cosine", "constant"]

# Texts are sorted by length within so many batches, or a quarter of the data, as in transformers; within
# all of a small data set, every epoch would have the same batches.
_MAX_GROUP_SIZE_BATCHES = 50
_EVALUATIONS_PER_WINDOW = 8  # how often early stopping looks within its window of examples
_MAX_STEPS = 1 << 40  # never reached: the budget ends training


@dataclass(frozen=True)
class FinetuneConfig:
    learning_rate: float = 5e-5  # the highest of a round; the paper's
    per_device_train_batch_size: int = 32  # examples per forward pass; one device is used
    gradient_accumulation_steps: int = 1  # forward passes per step of the optimizer
    weight_decay: float = 0.0  # AdamW's, not on biases and norms; transformers' default
    warmup_ratio: float = 0.1  # part of the budget over which the learning rate rises from 0
    lr_scheduler_type: Schedule = "linear"  # decay to 0 over the budget; the paper's
    max_grad_norm: float = 1.0  # 0: gradients are not clipped
    max_length: int = 128  # tokens; longer texts are cut (by peer.data.tokenize)
    head_init: Literal["probe", "keep", "fresh"] = (
        "probe"  # what the caller does with the head before `finetune`
    )
    bf16: bool | None = None  # autocast; None: where the processor supports it
    early_stopping: bool = False  # by the paper's rule, with the two numbers below; needs validation data
    early_stopping_examples: int = 256_000  # without a gain over so many training examples: stop
    early_stopping_gain: float = 0.001  # what counts as a gain, in units of the metric (accuracy 0 to 1)
    use_cpu: bool = False  # even where there is a GPU

    def __post_init__(self) -> None:
        positive = (
            "learning_rate",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
        )
        for name in (*positive, "early_stopping_examples"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm", "early_stopping_gain"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"warmup_ratio must be from 0 up to 1, not {self.warmup_ratio}")


@dataclass(frozen=True)
class Budget:
    """What one round may cost. With both, whichever is used up first."""

    num_examples: int | None = None  # exact: the last batch is cut
    seconds: float | None = None  # ends after the step in which they run out

    def __post_init__(self) -> None:
        if self.num_examples is None and self.seconds is None:
            raise UsageError("a budget needs a number of examples or of seconds")
        if (self.num_examples is not None and self.num_examples < 1) or (
            self.seconds is not None and self.seconds <= 0
        ):
            raise UsageError(f"a budget must be above 0, not {self}")


@dataclass(frozen=True)
class FinetuneResult:
    num_examples: int  # that a step of the optimizer has used; repeated ones count again
    seconds: float  # of the whole call
    mean_loss: float  # over the steps; NaN when there was none
    stop_reason: StopReason


def finetune(
    model: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: FinetuneConfig,
    budget: Budget,
    *,
    seed: int,
    validation: Dataset | None = None,
    deadline: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> FinetuneResult:
    """Finetunes `model` in place on tokenized examples (columns of `peer.data.tokenize`).

    deadline: instant of `time.monotonic()`; like `should_stop` it is checked after every step,
    and what was done until then stays. on_progress: gets the fraction of the budget used.
    The same model, data, seed, precision and number of threads give the same bits on a CPU. The
    random state of the process is left as it was: peers must not end up with equal draws
    elsewhere. Raises DataError for an empty data set, UsageError for early stopping without
    validation data.
    """
    if len(train) == 0:
        raise DataError("there is nothing to finetune on: the training data is empty")
    if config.early_stopping and not validation:
        raise UsageError("early stopping needs validation data")
    clock = _Clock(config, budget, deadline, should_stop, on_progress)
    if clock.check() is not None:  # too late for a single step
        return clock.result(mean_loss=float("nan"))
    with _own_random_state(), _training_memory(model):
        mean_loss = _train(model, train, tokenizer, config, clock, seed, validation)
    return clock.result(mean_loss=mean_loss)


def plan_batches(
    lengths: list[int], batch_size: int, num_examples: int | None, seed: int
) -> Iterator[list[int]]:
    """Batches of indices into the data set: `num_examples` in all (None: without end).

    Each epoch uses every example once, in a new order; a batch never mixes two epochs. Within
    groups of up to 50 batches texts are sorted by length, so that a batch needs little padding;
    then the batches are shuffled.
    """
    left = num_examples
    for epoch in itertools.count():
        for batch in _epoch_batches(lengths, batch_size, seed, epoch):
            if left is not None:
                batch = batch[:left]
                left -= len(batch)
            if batch:
                yield batch
            if left == 0:
                return


def learning_rate_factor(
    schedule: Schedule, fraction: float, warmup_ratio: float, *, step_fraction: float = 0.0
) -> float:
    """By what to multiply the learning rate of a step that begins at `fraction` (0 to 1) of the budget.

    `step_fraction`: what the step itself uses of it. A warmup counts it, so that the first step is no
    step of length 0: of a round of a single step nothing would be left.
    """
    if fraction < warmup_ratio:
        return min(1.0, (fraction + step_fraction) / warmup_ratio)
    decayed = min(1.0, (fraction - warmup_ratio) / (1.0 - warmup_ratio))
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1.0 + float(np.cos(np.pi * decayed)))
    return 1.0 - decayed


@dataclass
class EarlyStopping:
    """The paper's rule: stop when the score has gained less than `gain` over `num_examples` examples
    (Don-Yehiya et al. 2023, appendix on hyperparameters)."""

    num_examples: int
    gain: float
    best_score: float = -float("inf")
    best_at: int = 0  # number of training examples when best_score was reached

    def update(self, num_examples: int, score: float) -> bool:
        """True when training should end, `num_examples` after its start."""
        if score >= self.best_score + self.gain:
            self.best_score, self.best_at = score, num_examples
        return num_examples - self.best_at >= self.num_examples


# ---- budget, deadline and progress --------------------------------------------------------


@dataclass
class _Clock:
    """What has been used of the budget, and whether that is enough."""

    config: FinetuneConfig
    budget: Budget
    deadline: float | None  # instant of time.monotonic()
    should_stop: Callable[[], bool]
    on_progress: Callable[[float], None]
    score: Callable[[], float] | None = None  # of the model as it is, for early stopping
    started_at: float = field(default_factory=time.monotonic)
    num_examples: int = 0  # in finished steps
    num_pending: int = 0  # in passes whose step is still to come
    stop_reason: StopReason | None = None
    next_score_at: int = 0  # number of examples

    def __post_init__(self) -> None:
        self.early_stopping = EarlyStopping(
            self.config.early_stopping_examples, self.config.early_stopping_gain
        )

    @property
    def fraction(self) -> float:
        used = [0.0]
        if self.budget.num_examples is not None:
            used.append(self.num_examples / self.budget.num_examples)
        if self.budget.seconds is not None:
            used.append((time.monotonic() - self.started_at) / self.budget.seconds)
        return min(1.0, max(used))

    def step_done(self) -> None:
        self.num_examples += self.num_pending
        self.num_pending = 0
        self.on_progress(self.fraction)

    def check(self) -> StopReason | None:
        """Why training ends now, or None. The first reason stays."""
        if self.stop_reason is None:
            self.stop_reason = self._reason()
        return self.stop_reason

    def result(self, mean_loss: float) -> FinetuneResult:
        return FinetuneResult(
            num_examples=self.num_examples,
            seconds=time.monotonic() - self.started_at,
            mean_loss=mean_loss,
            stop_reason=self.stop_reason or "budget",
        )

    def _reason(self) -> StopReason | None:
        if self.should_stop():
            return "stopped"
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "deadline"
        if self.fraction >= 1.0:
            return "budget"
        return "early_stopping" if self._gains_too_little() else None

    def _gains_too_little(self) -> bool:
        if self.score is None or self.num_examples < self.next_score_at:
            return False
        self.next_score_at = self.num_examples + max(
            1, self.early_stopping.num_examples // _EVALUATIONS_PER_WINDOW
        )
        return self.early_stopping.update(self.num_examples, self.score())


class _ClockCallback(TrainerCallback):
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.check()  # the score before the first step is what early stopping compares with

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.step_done()
        control.should_training_stop = self.clock.check() is not None

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = self.clock.check() is not None


# ---- Trainer ------------------------------------------------------------------------------


class _Arguments(TrainingArguments):
    """Without files: Trainer makes its output directory only where it should save."""

    @property
    def should_save(self) -> bool:
        return False


class _BudgetTrainer(Trainer):
    """Replaces, of transformers 5.23: get_train_dataloader, compute_loss, floating_point_ops."""

    def __init__(
        self,
        model: PreTrainedModel,
        train: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        arguments: TrainingArguments,
        config: FinetuneConfig,
        clock: _Clock,
    ) -> None:
        self.config = config
        self.clock = clock
        optimizer = make_optimizer(model, config)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            callbacks=[_ClockCallback(clock)],
            optimizers=(optimizer, LambdaLR(optimizer, self._learning_rate_factor)),
        )
        self.remove_callback(PrinterCallback)  # it prints to standard output
        self.model_accepts_loss_kwargs = False  # compute_loss below gives the mean over its batch

    def get_train_dataloader(self) -> DataLoader[Any]:
        assert isinstance(self.train_dataset, Dataset)
        batches = _Plan(
            lengths=list(self.train_dataset["length"]),
            batch_size=self.config.per_device_train_batch_size,
            num_examples=self.clock.budget.num_examples,
            seed=self.args.seed,
        )
        return DataLoader(
            model_columns(self.model, self.train_dataset),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        labels = inputs.pop("labels")
        with autocast(self.args.device, self.config.bf16):
            logits = model(**inputs).logits
        self.clock.num_pending += len(labels)
        return task_loss(logits, labels)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nobody reads it, and counting the parameters at every step takes time

    def _learning_rate_factor(self, _step: int) -> float:
        # Asked after the optimizer's step and before the callback counts its examples.
        clock, config, total = self.clock, self.config, self.clock.budget.num_examples
        pending = 0.0 if total is None else clock.num_pending / total
        each = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return learning_rate_factor(
            config.lr_scheduler_type,
            min(1.0, clock.fraction + pending),
            config.warmup_ratio,
            step_fraction=0.0 if total is None else each / total,
        )


@dataclass
class _Plan:
    """`plan_batches` as a batch sampler."""

    lengths: list[int]
    batch_size: int
    num_examples: int | None
    seed: int

    def __iter__(self) -> Iterator[list[int]]:
        return plan_batches(self.lengths, self.batch_size, self.num_examples, self.seed)

    def __len__(self) -> int:
        """Trainer must know the last batch, to make a step of what has accumulated by then."""
        if self.num_examples is None:
            raise TypeError("a plan without end has no length")
        num_epochs, rest = divmod(self.num_examples, len(self.lengths))
        batches = _epoch_batches(self.lengths, self.batch_size, self.seed, num_epochs)
        sizes_before = itertools.accumulate((len(batch) for batch in batches), initial=0)
        return num_epochs * len(batches) + sum(1 for size in sizes_before if size < rest)


def make_optimizer(model: PreTrainedModel, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, as Trainer does it. Fused: one pass over the memory per step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def task_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of (n, num_labels) logits, or squared error where labels are floats; in fp32."""
    if labels.is_floating_point():
        return functional.mse_loss(logits.float().squeeze(-1), labels.float())
    return functional.cross_entropy(logits.float(), labels)


# ---- helpers ------------------------------------------------------------------------------


def _train(
    model: PreTrainedModel,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: FinetuneConfig,
    clock: _Clock,
    seed: int,
    validation: Dataset | None,
) -> float:
    """The mean loss. A function of its own, so that nothing refers to the trainer afterwards."""
    arguments = _training_arguments(config, seed)
    nn.Module.to(model, arguments.device)  # (transformers' own `to` is not typed)
    if config.early_stopping and validation is not None:
        clock.score = lambda: evaluate_classifier(
            _task_of(model), model, validation, tokenizer, bf16=config.bf16
        )
    trainer = _BudgetTrainer(model, train, tokenizer, arguments, config, clock)
    return float(trainer.train().training_loss)


def _epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    group_size = batch_size * max(1, min(_MAX_GROUP_SIZE_BATCHES, len(lengths) // (4 * batch_size)))
    batches: list[list[int]] = []
    for start in range(0, len(order), group_size):
        group = sorted(order[start : start + group_size], key=lambda i: lengths[i], reverse=True)
        batches.extend(group[i : i + batch_size] for i in range(0, len(group), batch_size))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _training_arguments(config: FinetuneConfig, seed: int) -> TrainingArguments:
    arguments = _Arguments(
        output_dir="unused",  # no file is written
        max_steps=_MAX_STEPS,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        seed=seed % 2**32,  # numpy takes no more
        use_cpu=config.use_cpu,
        dataloader_num_workers=0,  # worker processes would need shared memory and would outlive a kill
        dataloader_pin_memory=torch.cuda.is_available() and not config.use_cpu,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # a check per step that waits for the GPU and hides a diverged loss
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else Trainer splits batches over all GPUs with DataParallel
    return arguments


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Trainer seeds the generators of the whole process; put them back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _training_memory(model: PreTrainedModel) -> Iterator[None]:
    """Gives back gradients and AdamW's two moments: three times the model, held by reference cycles.

    What exists before is frozen meanwhile, so that a collection (Trainer makes one, too) looks
    at the objects of this training only: 0.28 s each otherwise, in a process with our imports.
    """
    gc.freeze()
    try:
        yield
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        gc.collect()
        gc.unfreeze()


def _task_of(model: PreTrainedModel) -> Task:
    id2label = model.config.id2label or {}
    if len(id2label) == 1:
        return Task(kind="regression", is_pair=False, label_names=())
    names = tuple(str(name) for name in id2label.values())
    return Task(kind="classification", is_pair=False, label_names=names)
