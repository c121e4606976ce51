"""Do examples become the right task and splits, and bad ones a message that helps?"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from coordinator.errors import DataError, UsageError
from peer.data import DataConfig, TaskData, load_task_data, tokenize
from scripts.bad_input import BadFile, bad_files
from tests.test_tables import save


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_csv(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def reviews(num_rows: int = 40) -> pd.DataFrame:
    return pd.DataFrame(
        {"text": [f"film {i}" for i in range(num_rows)], "label": ["good", "bad"] * (num_rows // 2)}
    )


def load(data: str | Path, **options: Any) -> TaskData:
    return load_task_data(DataConfig(data=str(data), **options))


def contents(loaded: TaskData) -> dict[str, list[dict[str, Any]]]:
    return {name: getattr(loaded, name).to_list() for name in ("train", "validation", "test")}


# Bad input ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BadFile]:
    return {case.name: case for case in bad_files(tmp_path_factory.mktemp("bad"))}


def test_every_bad_file_is_refused_with_the_place_and_the_culprit(cases: dict[str, BadFile]) -> None:
    assert len(cases) > 40
    wrong = {}
    for case in cases.values():
        flags = [flag.removeprefix("--").replace("-", "_") for flag in case.arguments[::2]]
        config = DataConfig(**dict(zip(flags, case.arguments[1::2], strict=True)))  # type: ignore[arg-type]
        with pytest.raises(DataError) as caught:
            load_task_data(config)
        message = str(caught.value)
        if not all(part in message for part in case.why) or "\n" in message or len(message) > 600:
            wrong[case.name] = message
    assert wrong == {}


@pytest.mark.parametrize(
    "option",
    [
        {"validation_fraction": 0.0},
        {"test_fraction": 0.5},
        {"max_train_examples": 0},
        {"max_eval_examples": -1},
        {"seed": -1},
    ],
)
def test_a_config_that_makes_no_sense_is_a_usage_error(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        load(save(reviews(), tmp_path / "a.csv"), **option)


def test_fewer_training_examples_than_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-train-examples is 1"):
        load(save(reviews(), tmp_path / "a.csv"), max_train_examples=1)


# Sources ------------------------------------------------------------------------------------------


def test_a_folder_gives_its_splits_by_file_name(tmp_path: Path) -> None:
    save(reviews(), tmp_path / "train.csv")
    save(reviews(6), tmp_path / "dev.jsonl")
    save(reviews(4), tmp_path / "test.parquet")
    loaded = load(tmp_path)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [40, 6, 4]
    assert loaded.validation[1] == {"text": "film 1", "label": 0}  # "bad" is before "good"
    assert "validation: 6 examples also in the training data, so its score is too good" in loaded.notes


def test_named_files_go_before_the_folder_and_the_rest_is_cut(tmp_path: Path) -> None:
    save(reviews(), tmp_path / "train.csv")
    save(reviews(6), tmp_path / "validation.csv")
    loaded = load(tmp_path, validation_data=str(save(reviews(8), tmp_path / "other.csv")))
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [36, 8, 4]


def test_a_saved_data_set_keeps_the_order_of_its_class_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["worst", "best", "unused"])})
    rows = {"text": [f"film {i}" for i in range(8)], "label": [0, 1] * 4}
    train = Dataset.from_dict(rows, features=features)
    DatasetDict(train=train, validation=train.select([0, 1])).save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", split="train")
    assert loaded.task.label_names == ("worst", "best")
    assert loaded.validation["label"][:] == [0, 1]


def test_a_hub_data_set_with_withheld_test_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUE's shape: -1 for all labels of the test split. The hub itself cannot run here."""
    features = Features(
        {"idx": Value("int32"), "sentence": Value("string"), "label": ClassLabel(names=["neg", "pos"])}
    )

    def split(labels: list[int], first: int) -> Dataset:
        texts = [f"film {first + i}" for i in range(len(labels))]
        return Dataset.from_dict(
            {"idx": range(len(labels)), "sentence": texts, "label": labels}, features=features
        )

    hub = DatasetDict(
        train=split([0, 1, 1, -1] * 5, 0), validation=split([1, 0], 50), test=split([-1] * 4, 90)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {("glue", "sst2"): hub}[name, config])
    loaded = load("glue", dataset_config="sst2")
    assert loaded.task.label_names == ("neg", "pos")
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [13, 2, 2]
    assert "test: the split of that name has no labels, so it is not used" in loaded.notes
    assert any("5 examples without label dropped" in note for note in loaded.notes)


def test_a_published_split_without_a_label_column_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Dataset.from_pandas(reviews())
    hub = DatasetDict(train=train, test=train.remove_columns("label"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: hub)
    assert len(load("someone/reviews").test) == 4  # cut from the training data
    hub.save_to_disk(tmp_path / "own")
    with pytest.raises(DataError, match="split 'test' has no column for 'label'"):
        load(tmp_path / "own")


def test_no_file_is_changed_and_no_cache_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, str(home / name))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    paths = [save(reviews(), tmp_path / name) for name in ("a.csv", "a.jsonl", "a.parquet", "saved")]
    before = snapshot(tmp_path)
    for path in paths:
        loaded = load(path, max_train_examples=10)
        tokens = tokenize(loaded.train, word_tokenizer(), 16, is_pair=False)
        for made in (loaded.train, loaded.validation, loaded.test, tokens):
            assert made.cache_files == []
    assert snapshot(tmp_path) == before
    assert not home.exists()


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), os.stat(p).st_mtime_ns) for p in files}


# Columns and tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "options", "expected"),
    [
        ("Review,Stars,id", {}, ("Review", None, "Stars")),
        ("title,text,label,score", {}, ("text", None, "label")),
        ("id,premise,hypothesis,label", {}, ("premise", "hypothesis", "label")),
        ("question,passage,answer", {}, ("question", "passage", "answer")),
        ("what,label", {}, ("what", None, "label")),
        ("text,verdict", {}, ("text", None, "verdict")),
        ("a,b,label", {"text_column": "a", "text_pair_column": "b"}, ("a", "b", "label")),
        ("a,b,label", {"text_pair_column": "b"}, ("a", "b", "label")),
        ("premise,hypothesis,label", {"text_column": "hypothesis"}, ("hypothesis", None, "label")),
        (",text,label", {}, ("text", None, "label")),  # pandas' nameless row index
    ],
)
def test_columns_are_guessed_and_said(
    tmp_path: Path, header: str, options: dict[str, str], expected: tuple[str, str | None, str]
) -> None:
    names = header.split(",")
    rows = [
        ",".join(f"{name}{i % 2}" if name == expected[2] else f"{name} {i}" for name in names)
        for i in range(8)
    ]
    loaded = load(write_csv(tmp_path / "a.csv", header, *rows), **options)
    text, text_pair, label = expected
    assert loaded.train[0]["text"].startswith(text)
    assert (
        loaded.train.column_names == ["text", "label"]
        if text_pair is None
        else ["text", "text_pair", "label"]
    )
    if text_pair is not None:
        assert loaded.train[0]["text_pair"].startswith(text_pair)
    assert loaded.task.is_pair == (text_pair is not None)
    assert loaded.task.label_names == (f"{label}0", f"{label}1")
    said = " ".join(loaded.notes)
    for name in {text, label} - set(options.values()):
        assert f"'{name}'" in said


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),  # by value, not by the alphabet
        ([1.0, 0.0, -1.0], ("-1", "0", "1")),
        ([True, False, True], ("False", "True")),
        ([" b ", "a", "B"], ("B", "a", "b")),
        (["none", "for", "against"], ("against", "for", "none")),
        (["NA", "EU", "AS"], ("AS", "EU", "NA")),
        (["007", "7", "08"], ("007", "7", "08")),
        ([0.5, 1.0, 1.5], ("0.5", "1", "1.5")),
    ],
)
def test_label_names_are_in_natural_order(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    records = [{"text": f"t {i}", "label": labels[i % 3]} for i in range(12)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    loaded = load(path)
    assert loaded.task.kind == "classification"
    assert loaded.task.label_names == names
    by_text = {f"t {i}": records[i]["label"] for i in range(12)}
    for rows in contents(loaded).values():
        for row in rows:
            value = by_text[row["text"]]
            written = str(value).strip()
            assert names[row["label"]] == (
                written.removesuffix(".0") if isinstance(value, float) else written
            )


def test_the_same_label_may_be_written_as_integer_or_float(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", "text,label", *[f"t {i},{i % 2}.0" for i in range(8)])
    test = write_csv(tmp_path / "b.csv", "text,label", "new,1", "newer,0")
    assert load(train, test_data=test).test["label"][:] == [1, 0]


def test_a_fractional_scale_is_a_regression(tmp_path: Path) -> None:
    rows = [f"s {i},t {i},{i / 8}" for i in range(40)]
    loaded = load(write_csv(tmp_path / "a.csv", "sentence1,sentence2,score", *rows))
    assert (loaded.task.kind, loaded.task.is_pair, loaded.task.label_names) == ("regression", True, ())
    assert any(note.startswith("task: regression") for note in loaded.notes)
    for row in loaded.train:
        assert row["label"] == int(row["text"].split()[1]) / 8


def test_the_task_can_be_said(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "text,label", *[f"t {i},{i % 5}" for i in range(40)])
    assert load(path).task.num_labels == 5
    assert load(path, task="regression").train.features["label"] == Value("float64")


def test_examples_without_text_are_dropped_and_said(tmp_path: Path) -> None:
    lines = [f"t {i},{i % 2}" for i in range(10)]
    loaded = load(write_csv(tmp_path / "a.csv", "text,label", *lines, ",1", "   ,0"))
    assert sum(map(len, contents(loaded).values())) == 10
    assert f"{tmp_path / 'a.csv'}: 2 examples without text dropped (lines 12, 13)" in loaded.notes


# Splits -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@example(counts=[2, 2], fraction=0.375, seed=0)  # the first cut must not take all that can be spared
@example(counts=[2] * 8, fraction=0.49, seed=0)
@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=8),
    fraction=st.floats(0.01, 0.49),
    seed=st.integers(0, 1000),
)
def test_each_class_keeps_an_example_for_training(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], fraction: float, seed: int
) -> None:
    labels = [f"c{i}" for i, count in enumerate(counts) for _ in range(count)]
    path = tmp_path_factory.mktemp("split") / "a.csv"
    pd.DataFrame({"text": [f"t {i}" for i in range(len(labels))], "label": labels}).to_csv(path, index=False)
    loaded = load(path, validation_fraction=fraction, test_fraction=fraction, seed=seed)
    splits = contents(loaded)
    assert min(map(len, splits.values())) >= 1
    assert sorted(row["text"] for rows in splits.values() for row in rows) == sorted(
        f"t {i}" for i in range(len(labels))
    )
    assert {row["label"] for row in splits["train"]} == set(range(len(counts)))


@pytest.mark.parametrize("target", ["1e39", "-3e38", "2e12"])
def test_a_target_beyond_single_precision_is_told_where_it_is(tmp_path: Path, target: str) -> None:
    """1e39 is infinite in float32, and the square of 3e38 is."""
    frame = pd.DataFrame({"text": [f"t{i}" for i in range(20)], "label": ["0.5", "-1e12"] * 10})
    assert load(save(frame, tmp_path / "far.csv"), task="regression").task.kind == "regression"
    frame.loc[2, "label"] = target
    with pytest.raises(DataError, match=rf"line 4, column 'label': the target '{target}' is farther from 0"):
        load(save(frame, tmp_path / "x.csv"), task="regression")


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.49])
def test_a_small_regression_leaves_two_examples_to_train_on(tmp_path: Path, fraction: float) -> None:
    path = write_csv(tmp_path / "a.csv", "text,label", "a,0.5", "b,1.5", "c,2.5", "d,3.5")
    loaded = load(path, task="regression", validation_fraction=fraction, test_fraction=fraction)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [2, 1, 1]
    five = write_csv(tmp_path / "b.csv", "text,label", *[f"t {i},{i}.5" for i in range(5)])
    assert len(load(five, task="regression", validation_fraction=fraction, test_fraction=fraction).train) == 3


def test_the_cut_is_in_proportion_and_seeded(tmp_path: Path) -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    path = save(pd.DataFrame({"text": [f"t {i}" for i in range(100)], "label": labels}), tmp_path / "a.csv")
    first, again, other = load(path, seed=1), load(path, seed=1), load(path, seed=2)
    assert contents(first) == contents(again)
    assert contents(first) != contents(other)
    for loaded in (first, other):
        assert Counter(loaded.test["label"]) == Counter({0: 6, 1: 3, 2: 1})
        assert Counter(loaded.validation["label"]) == Counter({0: 6, 1: 3, 2: 1})
        assert Counter(loaded.train["label"]) == Counter({0: 48, 1: 24, 2: 8})


def test_sub_samples_are_stratified_and_keep_each_class_in_training(tmp_path: Path) -> None:
    labels = ["a"] * 90 + ["b"] * 8 + ["c"] * 2
    path = save(pd.DataFrame({"text": [f"t {i}" for i in range(100)], "label": labels}), tmp_path / "a.csv")
    loaded = load(path, max_train_examples=10, max_eval_examples=4)
    assert Counter(loaded.train["label"]) == Counter({0: 8, 1: 1, 2: 1})
    assert (len(loaded.validation), len(loaded.test)) == (4, 4)


# Tokens -------------------------------------------------------------------------------------------


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "film", "good", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        model_max_length=12,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_tokens_by_hand() -> None:
    dataset = Dataset.from_dict(
        {"text": ["good film", "bad"], "text_pair": ["film", "bad film"], "label": [1, 0]}
    )
    tokens = tokenize(dataset, word_tokenizer(), 16, is_pair=True)
    assert tokens[0] == {
        "input_ids": [1, 5, 4, 2, 4, 2],
        "attention_mask": [1] * 6,
        "token_type_ids": [0, 0, 0, 0, 1, 1],
        "labels": 1,
        "length": 6,
    }
    single = tokenize(dataset, word_tokenizer(), 16, is_pair=False)
    assert single["input_ids"][:] == [[1, 5, 4, 2], [1, 6, 2]]
    assert single["length"][:] == [4, 3]


@pytest.mark.parametrize(("max_length", "expected"), [(8, 8), (500, 12)])  # 12: what the tokenizer allows
def test_long_texts_are_cut(max_length: int, expected: int) -> None:
    dataset = Dataset.from_dict({"text": ["film " * 50], "text_pair": ["good"], "label": [0.5]})
    tokens = tokenize(dataset, word_tokenizer(), max_length, is_pair=True)
    assert tokens["length"][:] == [expected]
    assert 5 in tokens[0]["input_ids"]  # the longer text was cut, not the pair
    assert tokens["labels"][:] == [0.5]


def test_progress_ends_at_one_and_a_length_without_room_is_refused() -> None:
    dataset = Dataset.from_dict({"text": ["film"] * 1500, "label": np.zeros(1500, dtype=np.int64)})
    seen: list[float] = []
    tokenize(dataset, word_tokenizer(), 16, is_pair=False, on_progress=seen.append)
    assert seen == [pytest.approx(2 / 3), 1.0]
    with pytest.raises(UsageError, match="8 or more"):
        tokenize(dataset, word_tokenizer(), 4, is_pair=False)


# Real data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_labels", "is_pair"), [("sst2", 2, False), ("mnli", 3, True), ("tweet_emotion", 4, False)]
)
def test_real_data_loads_without_a_flag(name: str, num_labels: int, is_pair: bool) -> None:
    folder = os.environ.get("COLD_DATA_DIR")
    if not folder or not (Path(folder) / name).is_dir():
        pytest.skip(f"COLD_DATA_DIR does not hold {name}")
    loaded = load(Path(folder) / name, max_train_examples=100, max_eval_examples=50)
    assert (loaded.task.num_labels, loaded.task.is_pair) == (num_labels, is_pair)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [100, 50, 50]
