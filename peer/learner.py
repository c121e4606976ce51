"""What does a peer do with its own data? One contributor's round of ColD Fusion, without a network.

    evaluate the round's base model  ->  start the head  ->  finetune  ->  delta  ->  score own and fused

The same object serves a real peer and a simulated one. Head, labels and label names stay in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peer.data import TaskData, tokenize
from peer.evaluate import (
    Features,
    Probe,
    evaluate_classifier,
    extract_features,
    fit_head,
    fit_probe,
    write_probe,
)
from peer.finetune import Budget, FinetuneConfig, FinetuneResult, finetune
from peer.layout import TensorLayout
from peer.memory import release_freed_memory
from peer.model import (
    export_backbone,
    final_linear,
    head_state,
    import_backbone,
    load_classifier,
    load_head_state,
    load_saved_classifier,
    load_tokenizer,
    reset_head,
    save_task_model,
)
from peer.tasks import Task, errors, score

Progress = Callable[[float], None]  # gets the fraction done
MAX_HEAD_EXAMPLES = 512
MAX_TEST_EXAMPLES = 10_000  # of a data set of the hub there may be hundreds of thousands


@dataclass(frozen=True)
class Evaluation:
    """A backbone, scored on the held-out split."""

    head_only: float  # accuracy or Pearson r of a linear probe on mean-pooled features
    classifier: float  # the same of the classifier as it stands, with its own head
    # (n,) of the linear probe, row by row: see `peer.tasks.errors`
    errors: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    fitted: float | None = None  # score of the classifier with its last layer fitted; None: was not asked
    probe: Probe | None = field(default=None, compare=False, repr=False)  # that layer


class Learner:
    """The model, the head and the tokenized data of one peer. Not thread-safe."""

    def __init__(
        self,
        data: TaskData,
        model_dir: Path,
        layout: TensorLayout,
        flat: torch.Tensor,
        config: FinetuneConfig,
        *,
        eval_examples: int,
        seed: int,
        on_progress: Progress = lambda _: None,
    ) -> None:
        """`model_dir` holds config and tokenizer; `flat` (num_values,) is the backbone to begin with."""
        self.task: Task = data.task
        self._config, self._seed, self._layout, self._model_dir = config, seed, layout, model_dir
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_dir)
        self._model: PreTrainedModel | None = load_classifier(
            model_dir, data.task, seed=seed, backbone=(layout, flat)
        )
        self._sleeping_head: dict[str, torch.Tensor] = {}  # while there is no model
        self._held_out = self._tokenize(data.validation, lambda f: on_progress(0.2 * f))
        self._train = self._tokenize(data.train, lambda f: on_progress(0.2 + 0.8 * f))
        self._test = _sample(data.test, MAX_TEST_EXAMPLES, seed)  # not tokenized: needed once, at the end
        self._probe_train = _sample(self._train, num_head_examples(eval_examples), seed)

    @property
    def num_held_out(self) -> int:
        return len(self._held_out)

    @property
    def num_test(self) -> int:
        return len(self._test)

    @property
    def model(self) -> PreTrainedModel:
        """Raises RuntimeError between `unload` and the next `load_backbone`."""
        if self._model is None:
            raise RuntimeError("the model is unloaded: load_backbone first")
        return self._model

    def unload(self) -> None:
        """Give up the memory of the model, but for the head. So that many learners fit into one process."""
        if self._model is not None:
            self._sleeping_head, self._model = self.head_state(), None
            release_freed_memory()

    def load_backbone(self, flat: torch.Tensor) -> None:
        """(num_values,) float32, copied into the model, which is made anew where it was unloaded."""
        if self._model is None:
            backbone = (self._layout, flat)
            self._model = load_classifier(self._model_dir, self.task, seed=self._seed, backbone=backbone)
            self.load_head_state(self._sleeping_head)
        else:
            import_backbone(self._model, self._layout, flat)

    def export_backbone(self) -> torch.Tensor:
        """(num_values,) float32 copy."""
        return export_backbone(self.model, self._layout)

    def head_state(self) -> dict[str, torch.Tensor]:
        """Copies, by name; also of a learner that is unloaded."""
        return dict(self._sleeping_head) if self._model is None else head_state(self._model)

    def load_head_state(self, state: Mapping[str, torch.Tensor]) -> None:
        if self._model is None:
            self._sleeping_head = dict(state)
        else:
            load_head_state(self._model, state)

    def evaluate_base(self, round_: int, *, on_progress: Progress = lambda _: None) -> Evaluation:
        """Score the backbone that a round begins with, and leave the head where that round begins.

        That is: fitted to the backbone (`probe`; Kumar et al. 2022), as the last round left it
        (`keep`), or drawn anew (`fresh`, the paper's).
        """
        if self._config.head_init == "fresh":
            reset_head(self.model, self._seed + round_)
        return self._evaluate(is_base=True, on_progress=on_progress)

    def evaluate_own(self, *, on_progress: Progress = lambda _: None) -> Evaluation:
        """Score the finetuned backbone, with the head that was finetuned with it."""
        return self._evaluate(is_base=False, on_progress=on_progress)

    def _evaluate(self, *, is_base: bool, on_progress: Progress) -> Evaluation:
        end = 0.6 if is_base else 1.0  # then a head is fitted, to features of its own
        share = end * len(self._probe_train) / (len(self._probe_train) + len(self._held_out))
        train = self._features(self._probe_train, lambda f: on_progress(f * share))
        held_out = self._features(self._held_out, lambda f: on_progress(share + f * (end - share)))
        if not all(np.isfinite(f).all() for s in (train, held_out) for f in (s.pooled, s.head_input)):
            return self._ruined(held_out)
        probe, logits = None, self._logits(held_out)
        if is_base:
            probe = fit_head(
                self.model,
                self.task,
                self._probe_train,
                self.tokenizer,
                self._seed,
                bf16=self._config.bf16,
                on_progress=lambda f: on_progress(0.6 + 0.4 * f),
            )
        if probe is not None and self._config.head_init == "probe":
            write_probe(self.model, probe)
            logits = probe.predict(held_out.head_input)
        probed = fit_probe(self.task, train.pooled, train.labels, seed=0).predict(held_out.pooled)
        evaluation = Evaluation(
            head_only=score(self.task, probed, held_out.labels),  # as `peer.evaluate.head_only_score`
            classifier=score(self.task, logits, held_out.labels),
            errors=errors(self.task, probed, held_out.labels),
            fitted=None if probe is None else self._score(probe, held_out),
            probe=probe,
        )
        release_freed_memory()
        return evaluation

    def _score(self, probe: Probe, held_out: Features) -> float:
        return score(self.task, probe.predict(held_out.head_input), held_out.labels)

    def _ruined(self, held_out: Features) -> Evaluation:
        """Of a backbone whose features are not finite: right about nothing, and no head fits it."""
        nothing = np.full((len(held_out.labels), self.task.num_labels), np.nan)
        return Evaluation(0.0, 0.0, errors(self.task, nothing, held_out.labels))

    def finetune(
        self,
        budget: Budget,
        *,
        round_: int,
        part: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Progress = lambda _: None,
    ) -> FinetuneResult:
        """One budget, in place; `part` counts the budgets of a round that lasts longer (a peer alone)."""
        result = finetune(
            self.model,
            self._train,
            self.tokenizer,
            self._config,
            budget,
            seed=self._seed + 1_000 * round_ + part,
            validation=self._held_out,
            should_stop=should_stop,
            on_progress=on_progress,
        )
        release_freed_memory()  # of gradients and optimizer; the all-reduce comes next
        return result

    def save_task_model(self, directory: Path, probe: Probe | None = None) -> None:
        """The classifier as it is, or with this last layer instead of its own."""
        own_head = self.head_state()
        if probe is not None:
            write_probe(self.model, probe)
        try:
            save_task_model(self.model, self.tokenizer, directory)
        finally:
            self.load_head_state(own_head)

    def score_saved(self, directory: Path, *, on_progress: Progress = lambda _: None) -> float:
        """A classifier that `save_task_model` wrote, on the test examples: no choice was made by them.

        Raises ModelError.
        """
        saved = load_saved_classifier(directory)
        if self._model is not None:
            torch.nn.Module.to(saved, self._model.device)  # (transformers' own `to` is not typed)
        return evaluate_classifier(
            self.task,
            saved,
            self._tokenize(self._test, lambda _: None),
            self.tokenizer,
            bf16=self._config.bf16,
            on_progress=on_progress,
        )

    def _tokenize(self, split: Dataset, on_progress: Progress) -> Dataset:
        length, is_pair = self._config.max_length, self.task.is_pair
        return tokenize(split, self.tokenizer, length, is_pair=is_pair, on_progress=on_progress)

    def _features(self, dataset: Dataset, on_progress: Progress) -> Features:
        bf16 = self._config.bf16
        return extract_features(self.model, dataset, self.tokenizer, bf16=bf16, on_progress=on_progress)

    @torch.no_grad()
    def _logits(self, features: Features) -> np.ndarray:
        """(n, num_labels): what the classifier says, from the features that its last Linear sees."""
        last = final_linear(self.model)
        head_input = torch.from_numpy(features.head_input).to(last.weight.device)
        logits: np.ndarray = last(head_input).float().cpu().numpy()
        return logits


def num_head_examples(eval_examples: int) -> int:
    """To so many training rows a head is fitted, where `eval_examples` held-out rows are scored.

    More would cost time and change little, while the gate gains from each row that votes.
    """
    return min(2 * eval_examples, MAX_HEAD_EXAMPLES)


def _sample(dataset: Dataset, num_examples: int, seed: int) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_examples]
    return dataset.select(np.sort(order))
