"""How do several peers finetune in one process, so that a study of fusion needs no network?

A `LocalPeer` is a `peer.learner.Learner` whose round depends on nothing but the state, the number of the
round and the seed: its head begins each round as it was made, with the last layer fitted to the state. So
rounds can be computed in any order, kept, and made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from datasets import Dataset

from coordinator.identity import Identity, peer_id_of
from peer.compression import Codec
from peer.data import DataConfig, TaskData, load_task_data, tokenize
from peer.evaluate import extract_features, fit_probe
from peer.finetune import Budget, FinetuneConfig
from peer.layout import TensorLayout
from peer.learner import Learner
from peer.manifest import Outgoing, prepare
from peer.model import final_linear, head_parameters

NUM_HELD_OUT_IN_TRAINING = 8  # the learner scores some at each round; what counts is scored apart


@dataclass(frozen=True)
class Sizes:
    """What every peer of a study does; small, so that hundreds of finetunings fit into minutes."""

    train_examples: int  # of each task, stratified
    eval_examples: int  # rows of the test file, stratified: what the figures are measured on
    round_examples: int  # budget of one round
    probe_examples: int  # of the training rows, that the head is fitted on at the start of a round
    learning_rate: float
    batch_size: int
    max_length: int  # tokens

    @property
    def finetune(self) -> FinetuneConfig:
        return FinetuneConfig(
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            max_length=self.max_length,
            use_cpu=True,
        )


class LocalPeer:
    """One contributor: its data, its model, its key."""

    def __init__(
        self,
        name: str,
        data: TaskData,
        encoder: Path,
        base: tuple[TensorLayout, torch.Tensor],
        sizes: Sizes,
        seed: int,
    ) -> None:
        few = data.validation.select(range(min(NUM_HELD_OUT_IN_TRAINING, len(data.validation))))
        self.name, self.task, self.identity = name, data.task, identity_of(name, seed)
        self._sizes = sizes
        self._learner = Learner(
            replace(data, validation=few),
            encoder,
            *base,
            sizes.finetune,
            eval_examples=max(1, sizes.probe_examples // 2),
            seed=seed,
        )
        self._first_head = self._learner.head_state()
        self._train, self._held_out = self._tokenize(data.train), self._tokenize(data.test)

    def delta(self, state: torch.Tensor, round_: int) -> torch.Tensor:
        """(num_values,) float32: what finetuning for one round from `state` adds to it."""
        self._learner.load_backbone(state)
        self._learner.load_head_state(self._first_head)
        self._learner.evaluate_base(round_)
        return self._finetuned(state, round_)

    def harmful_delta(self, state: torch.Tensor, round_: int, length: float) -> torch.Tensor:
        """The same, to do harm: of a peer that was made with `flipped_labels`. As long as `length`.

        The head is fitted to the true labels and held there; else it would learn the new names, and nothing
        would be wrong with the backbone. So finetuning drives the features of the classes into each other.
        """
        self._learner.load_backbone(state)
        self._learner.load_head_state(self._first_head)
        self._learner.evaluate_base(round_)
        last, head = final_linear(self._learner.model), head_parameters(self._learner.model).values()
        with torch.no_grad():  # row l was fitted to what was label l - 1
            last.weight.copy_(last.weight.roll(-1, 0))
            last.bias.copy_(last.bias.roll(-1, 0))
        for parameter in head:
            parameter.requires_grad_(False)
        try:
            delta = self._finetuned(state, round_)
        finally:
            for parameter in head:
                parameter.requires_grad_(True)
        return delta * (length / float(torch.linalg.vector_norm(delta)))

    def _finetuned(self, state: torch.Tensor, round_: int) -> torch.Tensor:
        self._learner.finetune(Budget(self._sizes.round_examples), round_=round_)
        delta = self._learner.export_backbone()
        delta -= state
        return delta

    def correct(self, state: torch.Tensor) -> np.ndarray:
        """(num held-out rows,) bool: which rows a linear probe on the features of `state` gets right.

        Its mean is `peer.evaluate.head_only_score` of a classification.
        """
        self._learner.load_backbone(state)
        train, held_out = (
            extract_features(self._learner.model, split, self._learner.tokenizer)
            for split in (self._train, self._held_out)
        )
        probe = fit_probe(self.task, train.pooled, train.labels, seed=0)
        right: np.ndarray = probe.predict(held_out.pooled).argmax(axis=1) == held_out.labels
        return right

    def prepare(self, delta: torch.Tensor, codec: Codec, round_: int) -> Outgoing:
        """Encoded and signed as in a real round. Raises ValueError for a delta that is not finite."""
        zeros = "0" * 64
        return prepare(delta, codec, self.identity, run=zeros, round=round_, previous=zeros)

    def _tokenize(self, split: Dataset) -> Dataset:
        return tokenize(split, self._learner.tokenizer, self._sizes.max_length, is_pair=self.task.is_pair)


def load_tasks(data_dir: Path, names: Sequence[str], sizes: Sizes, seed: int) -> dict[str, TaskData]:
    """`data_dir` holds a folder of train.csv, validation.csv, test.csv for each name. Raises DataError."""
    return {
        name: load_task_data(
            DataConfig(
                data=str(data_dir / name),
                task="classification",
                max_train_examples=sizes.train_examples,
                max_eval_examples=sizes.eval_examples,
                seed=seed,
            )
        )
        for name in names
    }


def identity_of(name: str, seed: int) -> Identity:
    """The same key for the same name and seed: of use in an experiment only."""
    secret = hashlib.sha256(f"{seed} {name}".encode()).digest()
    key = Ed25519PrivateKey.from_private_bytes(secret)
    return Identity(private_key=key, path=Path(), peer_id=peer_id_of(key.public_key()))


def shuffled_labels(data: TaskData, seed: int) -> TaskData:
    """The training labels, dealt out anew among the examples."""
    labels = data.train["label"][:]
    order = np.random.default_rng(seed).permutation(len(labels))
    columns = {**data.train[:], "label": [labels[i] for i in order]}
    return replace(data, train=Dataset.from_dict(columns, features=data.train.features))


def flipped_labels(data: TaskData) -> TaskData:
    """Each training label replaced by the next one, the last by the first."""
    num_labels = data.task.num_labels
    columns = {**data.train[:], "label": [(label + 1) % num_labels for label in data.train["label"]]}
    return replace(data, train=Dataset.from_dict(columns, features=data.train.features))


def noise_as_long_as(length: float, num_values: int, seed: int) -> torch.Tensor:
    """(num_values,) float32: normal noise of that norm."""
    noise = torch.randn(num_values, generator=torch.Generator().manual_seed(seed))
    noise *= length / float(torch.linalg.vector_norm(noise))
    return noise


def paired_difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> tuple[float, float]:
    """Points by which the accuracy of `one` is above `other`, mean over the tasks, and its standard error.

    one, other: per task, which of the same rows are right. The error is that of drawing these rows; that
    of drawing other training examples and batches comes on top.
    """
    gaps = [a.astype(float) - b.astype(float) for a, b in zip(one, other, strict=True)]
    mean = sum(float(gap.mean()) for gap in gaps) / len(gaps)
    variance = sum(float(gap.var()) / len(gap) for gap in gaps) / len(gaps) ** 2
    return 100 * mean, 100 * variance**0.5


def mean_accuracy(correct: Sequence[np.ndarray]) -> float:
    """Percent, mean over the tasks."""
    return 100 * sum(float(rows.mean()) for rows in correct) / len(correct)
