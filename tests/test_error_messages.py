"""Are the error messages of installed libraries collected as a fair corpus?"""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pytest

from coordinator.errors import DataError
from scripts.error_messages import (
    PRIVATE_TASKS,
    UNSEEN_TASKS,
    CorpusConfig,
    balance,
    collect,
    library_root,
    main,
    messages_in,
    split,
    without_known,
    write_tasks,
)


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("raise ValueError('the value is wrong')", "the value is wrong"),
        ("raise ValueError('two parts ' 'of one text')", "two parts of one text"),
        ("raise ValueError(f'the {name!r} is {x:.2f} wrong')", "the {} is {} wrong"),
        ("raise ValueError('the %s has %(n)d items' % values)", "the {} has {} items"),
        ("raise ValueError('the {} has {n:d} items'.format(a, n=3))", "the {} has {} items"),
        ("raise ValueError('the value of ' + name + ' is wrong')", "the value of {} is wrong"),
        ("raise ValueError(_('the value is wrong'))", "the value is wrong"),
        ("raise ValueError(code, 'the value is wrong')", "the value is wrong"),
        ("raise ValueError('the value\\n     is wrong')", "the value is wrong"),
    ],
)
def test_a_message_is_read_however_it_is_written(statement: str, text: str) -> None:
    assert list(messages_in(statement.encode())) == [(text, "ValueError")]


@pytest.mark.parametrize(
    "statement",
    [
        "raise",
        "raise ValueError",
        "raise ValueError(text)",
        "raise error('a variable, not a class')",
        "raise ValueError('two words')",
        "raise ValueError(f'{a} {b} {c} {d}')",
    ],
)
def test_what_says_nothing_is_left_out(statement: str) -> None:
    assert list(messages_in(statement.encode())) == []


def test_source_that_is_not_python_has_no_messages() -> None:
    assert list(messages_in(b"raise ValueError('the value is wrong'")) == []
    assert list(messages_in(b"\0")) == []


def test_messages_are_found_in_every_kind_of_block_in_the_order_of_the_file() -> None:
    source = b"""
class A:
    def f(self):
        if self:
            raise A('one is in if')
        elif not self:
            raise B('two is in elif')
        else:
            raise C('three is in else')
        try:
            raise D('four is in try')
        except OSError:
            raise module.E('five is in except')
        finally:
            raise F('six is in finally')
        match self:
            case 1:
                raise G('seven is in case')
        while f := lambda: 0:
            raise H('eight is in while')
"""
    assert [label for _, label in messages_in(source)] == list("ABCDEFGH")


def test_a_text_known_in_other_case_or_punctuation_is_dropped() -> None:
    messages = pd.DataFrame(
        {"text": ["It is wrong.", "it is wrong", "It is {} wrong", "Another text"], "label": "X"}
    )
    known = {"anothertext"}
    assert list(without_known(messages, known)["text"]) == ["It is wrong."]
    assert known == {"anothertext", "itiswrong"}


def test_classes_are_capped_and_rare_ones_dropped() -> None:
    labels = ["A"] * 50 + ["B"] * 12 + ["C"] * 3
    messages = pd.DataFrame({"text": [str(i) for i in range(len(labels))], "label": labels})
    config = CorpusConfig(max_per_class=20, min_per_class=10)
    kept = balance(messages, config)
    assert kept["label"].value_counts().to_dict() == {"A": 20, "B": 12}
    assert list(kept["label"]) != sorted(kept["label"])  # shuffled
    assert kept.equals(balance(messages, config))  # by a seed
    assert not kept.equals(balance(messages, CorpusConfig(max_per_class=20, min_per_class=10, seed=1)))


def test_one_class_alone_is_an_error_that_says_what_to_do() -> None:
    messages = pd.DataFrame({"text": ["a", "b"], "label": ["A", "A"]})
    with pytest.raises(DataError, match="lower min_per_class"):
        balance(messages, CorpusConfig(min_per_class=1))


def test_splits_are_disjoint_stratified_and_complete() -> None:
    messages = pd.DataFrame({"text": [str(i) for i in range(60)], "label": ["A", "B", "B"] * 20})
    splits = split(messages, test_fraction=0.3, validation_fraction=0.1)
    assert splits.num_classes == 2
    assert splits.test["label"].value_counts().to_dict() == {"A": 6, "B": 12}
    assert splits.validation["label"].value_counts().to_dict() == {"A": 2, "B": 4}
    assert splits.train["label"].value_counts().to_dict() == {"A": 12, "B": 24}
    parts = [splits.train, splits.validation, splits.test]
    assert sorted(pd.concat(parts)["text"], key=int) == [str(i) for i in range(60)]


def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(DataError, match="no_such_library"):
        library_root("no_such_library")


def test_files_are_bounded_and_those_with_most_messages_come_first() -> None:
    few = collect("json", CorpusConfig(max_files=1))
    every = collect("json", CorpusConfig())
    assert 0 < len(few) < len(every)
    assert set(few["text"]) <= set(every["text"])


def test_tasks_are_written_without_a_text_in_common(tmp_path: Path) -> None:
    packages = {"asyncio": ("asyncio",), "both": ("json", "email"), "numpy": ("numpy",)}
    tasks = write_tasks(tmp_path, CorpusConfig(max_per_class=30, min_per_class=4), packages)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tasks) == sorted(packages)
    splits = [pd.read_csv(path) for path in sorted(tmp_path.glob("*/*.csv"))]
    assert len(splits) == 9
    assert all(list(frame.columns) == ["text", "label"] and len(frame) > 0 for frame in splits)
    assert pd.concat(splits)["text"].is_unique


@pytest.mark.slow
def test_the_whole_corpus_is_collected_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started_at = time.monotonic()
    main(["--out", str(tmp_path)])
    assert time.monotonic() - started_at < 60  # 14 s on two busy cores
    assert len(capsys.readouterr().out.splitlines()) == 7
    for name in (*PRIVATE_TASKS, *UNSEEN_TASKS):
        assert len(pd.read_csv(tmp_path / name / "train.csv")) >= 150
        assert pd.read_csv(tmp_path / name / "test.csv")["label"].value_counts(normalize=True).max() < 0.7
