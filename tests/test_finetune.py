"""Does finetuning keep to its budget, its deadline and its seed, and does it learn?"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coordinator.errors import DataError, UsageError
from peer.evaluate import evaluate_classifier
from peer.finetune import (
    Budget,
    EarlyStopping,
    FinetuneConfig,
    FinetuneResult,
    _Plan,
    finetune,
    learning_rate_factor,
    make_optimizer,
    plan_batches,
    task_loss,
)
from peer.model import export_backbone, load_classifier, load_tokenizer
from peer.tasks import Task
from tests.tiny_models import FAMILIES, make_dataset, make_model_dir

BINARY = Task(kind="classification", is_pair=False, label_names=("bad", "good"))
REGRESSION = Task(kind="regression", is_pair=False, label_names=())
CONFIG = FinetuneConfig(learning_rate=1e-2, per_device_train_batch_size=8, bf16=False, use_cpu=True)


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tokenizer(bert_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(bert_dir)


@pytest.fixture(scope="module")
def train(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return make_dataset(tokenizer, 40, seed=1)


@pytest.fixture
def model(bert_dir: Path) -> PreTrainedModel:
    return load_classifier(bert_dir, BINARY, seed=0)


# ---- the plan of batches ------------------------------------------------------------------


def test_plan_is_exact_and_uses_every_example_once_per_epoch() -> None:
    lengths = [5, 3, 8, 1, 9, 2, 7]
    batches = list(plan_batches(lengths, batch_size=3, num_examples=17, seed=0))
    indices = [index for batch in batches for index in batch]
    assert len(indices) == 17
    assert max(len(batch) for batch in batches) == 3
    assert sorted(indices[:7]) == sorted(indices[7:14]) == list(range(7))
    assert indices[:7] != indices[7:14]


def test_plan_groups_by_length() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 101, size=1600)]
    batches = list(plan_batches(lengths, batch_size=10, num_examples=1600, seed=0))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # 1.8 times without grouping


def test_a_small_budget_is_not_spent_on_long_texts_only() -> None:
    lengths = list(range(320))
    means = [
        float(np.mean([lengths[i] for batch in plan_batches(lengths, 8, 80, seed) for i in batch]))
        for seed in range(20)
    ]
    assert 140 < np.mean(means) < 180  # 159.5 over all texts; 280 where the long ones come first


def test_plan_follows_its_seed_and_need_not_end() -> None:
    endless = plan_batches([1] * 10, 4, None, seed=3)
    first = list(itertools.islice(endless, 50))
    assert first == list(itertools.islice(plan_batches([1] * 10, 4, None, seed=3), 50))
    assert first != list(itertools.islice(plan_batches([1] * 10, 4, None, seed=4), 50))


@pytest.mark.parametrize("num_examples", [1, 39, 40, 41, 79, 97, 120])
def test_length_of_the_plan_is_known_without_making_it(num_examples: int) -> None:
    plan = _Plan(lengths=[3] * 39, batch_size=4, num_examples=num_examples, seed=2)
    assert len(plan) == len(list(plan))


# ---- schedule and early stopping ----------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "fraction", "warmup", "expected"),
    [
        ("linear", 0.0, 0.0, 1.0),
        ("linear", 0.25, 0.0, 0.75),
        ("linear", 1.0, 0.0, 0.0),
        ("linear", 0.05, 0.1, 0.5),
        ("linear", 0.55, 0.1, 0.5),
        ("cosine", 0.5, 0.0, 0.5),
        ("cosine", 1.0, 0.0, 0.0),
        ("constant", 0.9, 0.0, 1.0),
        ("constant", 0.1, 0.2, 0.5),
    ],
)
def test_learning_rate_factor(schedule: str, fraction: float, warmup: float, expected: float) -> None:
    assert learning_rate_factor(schedule, fraction, warmup) == pytest.approx(expected)  # type: ignore[arg-type]


def test_no_step_of_a_warmup_has_length_zero() -> None:
    factors = [learning_rate_factor("linear", step / 10, 0.3, step_fraction=0.1) for step in range(5)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 6 / 7])
    assert learning_rate_factor("linear", 0.0, 0.1, step_fraction=1.0) == 1.0  # a round of one step


def test_a_round_of_one_step_learns(model: PreTrainedModel, train: Dataset, bert_dir: Path) -> None:
    before = export_backbone(model)
    result = finetune(model, train, load_tokenizer(bert_dir), CONFIG, Budget(num_examples=8), seed=5)
    assert result.num_examples == 8
    assert float((export_backbone(model) - before).abs().max()) == pytest.approx(
        CONFIG.learning_rate, rel=0.01
    )


def test_early_stopping_rule() -> None:
    rule = EarlyStopping(num_examples=100, gain=0.001)
    assert not rule.update(0, 0.5)
    assert not rule.update(50, 0.502)  # a gain: the window starts again
    assert not rule.update(100, 0.5025)  # too small to count
    assert rule.update(150, 0.5029)
    assert not rule.update(150, 0.503)


# ---- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str, tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path, family)
    tokenizer = load_tokenizer(model_dir)
    model = load_classifier(model_dir, BINARY, seed=0)
    train = make_dataset(tokenizer, 40, seed=1)
    before = export_backbone(model)
    result = finetune(model, train, tokenizer, CONFIG, Budget(num_examples=960), seed=0)
    assert (result.num_examples, result.stop_reason) == (960, "budget")
    assert evaluate_classifier(BINARY, model, train, tokenizer, bf16=False) > 0.85
    assert not torch.equal(export_backbone(model), before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_the_hand_written_loop(model: PreTrainedModel, train: Dataset, bert_dir: Path) -> None:
    """Same batches, loss, clipping, decay and accumulation: the same weights, up to rounding."""
    tokenizer = load_tokenizer(bert_dir)
    config = replace(CONFIG, gradient_accumulation_steps=2, weight_decay=0.1, warmup_ratio=0.0)
    _without_dropout(model)
    finetune(model, train, tokenizer, config, Budget(num_examples=44), seed=5)
    by_hand = load_classifier(bert_dir, BINARY, seed=0)
    optimizer = make_optimizer(by_hand, config)
    num_done = 0
    plan = _planned(train, config, 44, seed=5)
    for pair in (plan[i : i + 2] for i in range(0, len(plan), 2)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - num_done / 44)  # without a warmup
        for batch in pair:
            inputs = tokenizer.pad({"input_ids": [train[i]["input_ids"] for i in batch]}, return_tensors="pt")
            loss = task_loss(by_hand(**inputs).logits, torch.tensor([train[i]["labels"] for i in batch]))
            (loss / len(pair)).backward()
            num_done += len(batch)
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(export_backbone(model), export_backbone(by_hand), atol=1e-5, rtol=1e-4)


def test_same_seed_gives_the_same_bits(
    bert_dir: Path, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    def run(seed: int) -> bytes:
        model = load_classifier(bert_dir, BINARY, seed=0)
        torch.manual_seed(random.randrange(1000))  # what the process drew before must not matter
        finetune(model, train, tokenizer, CONFIG, Budget(num_examples=60), seed=seed)
        return export_backbone(model).numpy().tobytes()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_random_state_of_the_process_is_left_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    finetune(model, train, tokenizer, CONFIG, Budget(num_examples=16), seed=0)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert after == before


def test_it_writes_nothing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    finetune(model, train, tokenizer, CONFIG, Budget(num_examples=16), seed=0)
    assert list(tmp_path.iterdir()) == []
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_signal_handlers_stay_and_other_threads_go_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    """The session's handlers must work during training, and so must the network's asyncio thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        during: list[object] = []
        answers: list[int] = []

        def on_progress(_fraction: float) -> None:
            during.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
            answers.append(asyncio.run_coroutine_threadsafe(asyncio.sleep(0, 7), loop).result(timeout=30))

        finetune(
            model, train, tokenizer, CONFIG, Budget(num_examples=16), seed=2**40, on_progress=on_progress
        )
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert during == [handlers, handlers]
    assert answers == [7, 7]


def test_budget_of_seconds_ends_in_time_and_decays_to_zero(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    seen: list[float] = []
    result = finetune(model, train, tokenizer, CONFIG, Budget(seconds=0.5), seed=0, on_progress=seen.append)
    assert result.stop_reason == "budget"
    assert result.num_examples > 40 or result.seconds < 5.0  # more than an epoch on any usual machine
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert result.num_examples % 8 == 0


def test_what_was_done_until_the_deadline_stays(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    deadline = time.monotonic() + 0.3
    result = finetune(model, train, tokenizer, CONFIG, Budget(num_examples=10**7), seed=0, deadline=deadline)
    assert result.stop_reason == "deadline"
    assert 0 < result.num_examples < 10**7
    assert math.isfinite(result.mean_loss)


def test_a_deadline_that_has_passed_costs_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    before = export_backbone(model)
    result = finetune(
        model, train, tokenizer, CONFIG, Budget(num_examples=16), seed=0, deadline=time.monotonic()
    )
    assert (result.num_examples, result.stop_reason) == (0, "deadline")
    assert torch.equal(export_backbone(model), before)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_should_stop_is_asked_at_every_step(
    accumulation: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    asked = itertools.count()
    config = replace(CONFIG, gradient_accumulation_steps=accumulation)
    result = finetune(
        model,
        train,
        tokenizer,
        config,
        Budget(num_examples=400),
        seed=0,
        should_stop=lambda: next(asked) >= 5,
    )
    assert result.stop_reason == "stopped"
    # Asked before the start, at its beginning, then after each pass: the fifth answer comes after 4 passes.
    assert result.num_examples == 32


def test_early_stopping_ends_training(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    config = replace(CONFIG, learning_rate=1e-12, early_stopping=True, early_stopping_examples=64)
    result = finetune(
        model,
        train,
        tokenizer,
        config,
        Budget(num_examples=4000),
        seed=0,
        validation=make_dataset(tokenizer, 20, seed=2),
    )
    assert (result.stop_reason, result.num_examples) == ("early_stopping", 64)
    with pytest.raises(UsageError, match="validation"):
        finetune(model, train, tokenizer, config, Budget(num_examples=16), seed=0)


def test_regression_learns(bert_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_classifier(bert_dir, REGRESSION, seed=0)
    train = make_dataset(tokenizer, 40, seed=1, is_regression=True)
    result = finetune(
        model, train, tokenizer, CONFIG, Budget(num_examples=961), seed=0
    )  # a last batch of one
    assert result.num_examples == 961
    assert evaluate_classifier(REGRESSION, model, train, tokenizer, bf16=False) > 0.7


def test_bf16_learns_too(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset) -> None:
    result = finetune(model, train, tokenizer, replace(CONFIG, bf16=True), Budget(num_examples=960), seed=0)
    assert isinstance(result, FinetuneResult)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert evaluate_classifier(BINARY, model, train, tokenizer, bf16=True) > 0.85


@pytest.mark.parametrize(
    ("labels", "logits", "expected"),
    [
        (torch.tensor([0]), torch.tensor([[0.0, 0.0]]), math.log(2)),
        (torch.tensor([3.0]), torch.tensor([[1.0]]), 4.0),
        (torch.tensor([3.0, 1.0]), torch.tensor([[1.0], [1.0]]), 2.0),
    ],
)
def test_task_loss(labels: torch.Tensor, logits: torch.Tensor, expected: float) -> None:
    assert task_loss(logits.bfloat16(), labels).item() == pytest.approx(expected)


def test_wrong_settings_are_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> None:
    with pytest.raises(UsageError, match="budget"):
        Budget()
    with pytest.raises(UsageError, match="above 0"):
        Budget(num_examples=0)
    with pytest.raises(UsageError, match="learning_rate"):
        FinetuneConfig(learning_rate=0.0)
    with pytest.raises(UsageError, match="warmup_ratio"):
        FinetuneConfig(warmup_ratio=1.0)
    with pytest.raises(DataError, match="empty"):
        finetune(model, train.select([]), tokenizer, CONFIG, Budget(num_examples=8), seed=0)


# ---- helpers ------------------------------------------------------------------------------


def _without_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _planned(train: Dataset, config: FinetuneConfig, num_examples: int, seed: int) -> list[list[int]]:
    lengths = list(train["length"])
    return list(plan_batches(lengths, config.per_device_train_batch_size, num_examples, seed))
