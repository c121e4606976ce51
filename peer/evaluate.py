"""How good is a backbone on this peer's task: features, the probe on them, and the classifier as it is."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from coordinator.errors import DataError
from peer.model import final_linear
from peer.tasks import Task, score

Array = NDArray[Any]

# Inverse strength of the L2 penalty on standardised features. Measured on all-MiniLM-L6-v2, pooled, 800
# training rows, accuracy on test rows at 0.01 / 0.03 / 1.0 (scikit-learn's default): sst2 79.8 / 80.0 / 77.2,
# tweet_emotion 65.8 / 64.6 / 61.4, ag_news 84.8 / 83.8 / 81.6, clinc150 74.3 / 77.9 / 78.7. Chosen on these
# rows, so good for a peer's own score; what is reported (peer.benchmark) chooses its own on validation rows.
LOGISTIC_C = 0.03
HEAD_SCALES = tuple(np.linspace(0.05, 1.0, 20).tolist())  # of the logits of a head to start from
RIDGE_ALPHAS = tuple(float(10.0**exponent) for exponent in range(5))  # chosen among by leave-one-out error
_MAX_ITERATIONS = 300
_DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Features:
    pooled: Array  # (n, hidden) float32: mean over the tokens of the last hidden state
    head_input: Array  # (n, k) float32: what the last Linear of the standard head sees
    labels: Array  # (n,) int64 label ids, or float32 targets


@dataclass(frozen=True)
class Probe:
    weight: Array  # (num_labels, k) float64; the scaling of the features is folded in
    bias: Array  # (num_labels,) float64

    def predict(self, features: Array) -> Array:
        """(n, num_labels) logits, or (n, 1) predictions of a regression, from (n, k) features."""
        logits: Array = features.astype(np.float64) @ self.weight.T + self.bias
        return logits


def extract_features(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = _DEFAULT_BATCH_SIZE,
    bf16: bool | None = None,
    dropout_seed: int | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Features:
    """Both kinds of features of a tokenized data set, from one forward pass, in the order of the data set.

    `bf16` None means: where the processor computes in it. `on_progress` gets the fraction
    done. With `dropout_seed` the features are those of training: with dropout, drawn from that seed.
    Raises DataError when `dataset` is empty.
    """
    pooled: list[torch.Tensor] = []
    head_input: list[torch.Tensor] = []
    mask: list[torch.Tensor] = []

    def keep_pooled(_module: object, _inputs: object, output: Any) -> None:
        pooled.append(mean_over_tokens(output[0], mask[-1]).cpu())

    def keep_head_input(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        head_input.append(inputs[0].float().cpu())

    hooks = (
        model.base_model.register_forward_hook(keep_pooled),
        final_linear(model).register_forward_pre_hook(keep_head_input),
    )
    try:
        order: list[int] = []
        with _dropout(model, dropout_seed):
            for indices, batch in _batches(model, dataset, tokenizer, batch_size, on_progress):
                mask[:] = [batch["attention_mask"]]
                _forward(model, batch, bf16, with_dropout=dropout_seed is not None)
                order.extend(indices)
    finally:
        for hook in hooks:
            hook.remove()
    return Features(
        pooled=_in_dataset_order(pooled, order),
        head_input=_in_dataset_order(head_input, order),
        labels=_labels(dataset),
    )


def fit_probe(task: Task, features: Array, labels: Array, *, seed: int, c: float = LOGISTIC_C) -> Probe:
    """Multinomial logistic regression, or ridge regression, on standardised (n, k) features. Deterministic.

    `c` is the inverse strength of the logistic regression's penalty. A binary task gives two rows,
    as a classifier has. A label that `labels` lacks gets a zero row and a bias below what one
    example among n + 1 would earn it.

    One thread of BLAS: a step of the solver takes a millisecond, so more threads mostly wait for one another,
    and on a machine with other work to do they make it some ten times slower.
    """
    scaler = StandardScaler().fit(features.astype(np.float64))
    scaled = scaler.transform(features.astype(np.float64))
    with threadpool_limits(limits=1, user_api="blas"):
        if task.kind == "regression":
            weight, bias = _fit_ridge(scaled, labels)
        else:
            weight, bias = _fit_logistic(task, scaled, labels, seed, c)
    weight = weight / scaler.scale_
    return Probe(weight=weight, bias=bias - weight @ scaler.mean_)


def head_only_score(task: Task, train: Features, test: Features) -> float:
    """Accuracy (0 to 1) or Pearson r on `test` of a linear probe fitted on `train`, on pooled features.

    The measure of ColD-Frozen (Don-Yehiya et al. 2023, section 5): the backbone stays as it
    is, only a linear head is fitted; by a convex solver here, so that it is exact and has no
    learning rate. Pooled features, because they probe 4 to 6 points better than the first token.
    """
    return score(task, fit_probe(task, train.pooled, train.labels, seed=0).predict(test.pooled), test.labels)


def init_head(
    model: PreTrainedModel,
    task: Task,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    bf16: bool | None = None,
) -> Probe:
    """Fits a head to the backbone as it is and writes it there, so that finetuning starts from it."""
    probe = fit_head(model, task, train, tokenizer, seed, bf16=bf16)
    write_probe(model, probe)
    return probe


def fit_head(
    model: PreTrainedModel,
    task: Task,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    bf16: bool | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Probe:
    """A linear head on what the last Linear sees in training, to begin finetuning with; `train` is tokenized.

    Linear probing, then finetuning (Kumar et al. 2022, arXiv 2202.10054): a random head's gradients
    distort the features before the head has learnt anything. So do those of a head that is too sure of
    itself, and it gets worse from round to round: fitted to features without dropout, it weighs what varies
    little very much; under dropout its loss is then above chance, the gradient shrinks the features to calm
    it, and the next head weighs them more (docs/experiments.md: 0.18 to 0.01 in 8 rounds). So the head is
    fitted to features with dropout, and scaled down by what lowers its loss on a quarter that it has not
    seen.
    """
    features = extract_features(
        model, train, tokenizer, bf16=bf16, dropout_seed=seed, on_progress=on_progress
    )
    probe = fit_probe(task, features.head_input, features.labels, seed=seed)
    if task.kind == "regression" or not np.isfinite(features.head_input).all():
        return probe
    scale = _calibrating_scale(task, features, seed)
    return Probe(weight=scale * probe.weight, bias=scale * probe.bias)


def _calibrating_scale(task: Task, features: Features, seed: int) -> float:
    """By how much the logits of a probe that is fitted to three quarters should shrink on the rest: 0 to 1.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599).
    """
    order = np.random.default_rng(seed).permutation(len(features.labels))
    fitted, rest = np.array_split(order, [3 * len(order) // 4])
    if len(fitted) == 0:
        return 1.0
    logits = fit_probe(task, features.head_input[fitted], features.labels[fitted], seed=seed).predict(
        features.head_input[rest]
    )
    return min(HEAD_SCALES, key=lambda scale: cross_entropy(scale * logits, features.labels[rest]))


def cross_entropy(logits: Array, labels: Array) -> float:
    """Mean over (n, num_labels) logits and (n,) label ids, in nats."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen))


@torch.no_grad()
def write_probe(model: PreTrainedModel, probe: Probe) -> None:
    """Into the last Linear; the rest of the head stays as it is."""
    last = final_linear(model)
    last.weight.copy_(torch.from_numpy(probe.weight))
    last.bias.copy_(torch.from_numpy(probe.bias))


def predict(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = _DEFAULT_BATCH_SIZE,
    bf16: bool | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Array:
    """(n, num_labels) float32 logits of the classifier, in the order of the data set."""
    logits: list[torch.Tensor] = []
    order: list[int] = []
    for indices, batch in _batches(model, dataset, tokenizer, batch_size, on_progress):
        logits.append(_forward(model, batch, bf16).float().cpu())
        order.extend(indices)
    return _in_dataset_order(logits, order)


def evaluate_classifier(
    task: Task,
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = _DEFAULT_BATCH_SIZE,
    bf16: bool | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> float:
    """Accuracy (0 to 1) or Pearson r of the classifier as it is, on a tokenized data set."""
    logits = predict(model, dataset, tokenizer, batch_size=batch_size, bf16=bf16, on_progress=on_progress)
    return score(task, logits, _labels(dataset))


def mean_over_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, hidden) float32 mean of (batch, tokens, hidden) over the tokens that `mask` keeps."""
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def bf16_supported(device: torch.device) -> bool:
    """Whether the processor computes in bfloat16 itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    return False


@contextmanager
def autocast(device: torch.device, bf16: bool | None) -> Iterator[None]:
    """bfloat16 autocast where `bf16` is true, or is None and the processor supports it."""
    enabled = bf16_supported(device) if bf16 is None else bf16
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        yield


def model_columns(model: PreTrainedModel, dataset: Dataset) -> Dataset:
    """Without the columns that the model does not take (length; token types, for some families)."""
    accepted = inspect.signature(model.forward).parameters
    return dataset.select_columns([name for name in dataset.column_names if name in accepted])


@contextmanager
def _dropout(model: PreTrainedModel, seed: int | None) -> Iterator[None]:
    """The generators of dropout begin at `seed`, and afterwards are as if nothing had been drawn."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# ---- helpers ------------------------------------------------------------------------------


def _batches(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    on_progress: Callable[[float], None] | None,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    if len(dataset) == 0:
        raise DataError("there is nothing to evaluate: the data set is empty")
    # Longest first: little padding, and a lack of memory shows at once.
    order = np.argsort(-np.asarray(dataset["length"]), kind="stable").tolist()
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    loader = DataLoader(
        model_columns(model, dataset),
        batch_sampler=groups,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator(),  # else the loader draws from the generator that dropout uses
    )
    for number, (indices, batch) in enumerate(zip(groups, loader, strict=True), start=1):
        yield indices, {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        if on_progress is not None:
            on_progress(number / len(groups))


@torch.no_grad()
def _forward(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], bf16: bool | None, *, with_dropout: bool = False
) -> torch.Tensor:
    was_training = model.training
    model.train(with_dropout)
    with autocast(model.device, bf16):
        logits = model(**batch).logits
    model.train(was_training)
    assert isinstance(logits, torch.Tensor)
    return logits


def _in_dataset_order(parts: list[torch.Tensor], order: list[int]) -> Array:
    values = torch.cat(parts)
    ordered = torch.empty_like(values)
    ordered[torch.tensor(order)] = values
    return ordered.numpy()


def _labels(dataset: Dataset) -> Array:
    labels = np.asarray(dataset["labels"])
    return labels.astype(np.int64) if np.issubdtype(labels.dtype, np.integer) else labels.astype(np.float32)


def _fit_ridge(scaled: Array, targets: Array) -> tuple[Array, Array]:
    ridge = RidgeCV(alphas=RIDGE_ALPHAS).fit(scaled, targets.astype(np.float64))
    return np.asarray(ridge.coef_).reshape(1, -1), np.asarray([ridge.intercept_])


def _fit_logistic(task: Task, scaled: Array, labels: Array, seed: int, c: float) -> tuple[Array, Array]:
    present = np.unique(labels)
    weight = np.zeros((task.num_labels, scaled.shape[1]))
    bias = np.zeros(task.num_labels)
    if len(present) > 1:
        regression = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS, random_state=seed % 2**32)
        with warnings.catch_warnings():  # 150 labels and 200 rows: it asks whether that is a regression
            warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
            regression.fit(scaled, labels)
        rows, intercepts = regression.coef_, regression.intercept_
        if len(present) == 2:  # one row r with probability 1 / (1 + exp(-r)): the softmax of -r/2 and r/2
            rows, intercepts = (
                np.concatenate([-rows, rows]) / 2,
                np.concatenate([-intercepts, intercepts]) / 2,
            )
        weight[present], bias[present] = rows, intercepts
    absent = np.setdiff1d(np.arange(task.num_labels), present)
    bias[absent] = bias[present].min() - np.log(len(labels) + 1)
    return weight, bias
