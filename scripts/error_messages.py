"""Which real text does every machine have after the install? The error messages of its Python libraries.

    python -m scripts.error_messages --out DIR [--max-per-class 240] [--seed 0]

A message is the string in `raise X("...")`, its label is X. They are read by `ast` from the source
files of the installed libraries; nothing is imported from those libraries and nothing is stored in
this project. DIR/<task>/ gets train.csv, validation.csv and test.csv with the columns text, label.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import multiprocessing
import os
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from coordinator.errors import DataError

STANDARD_LIBRARY = "stdlib"
# Task -> packages whose messages it is made of. The first group trains, the second is never trained on.
PRIVATE_TASKS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "numpy_scipy": ("numpy", "scipy"),
    "stdlib": (STANDARD_LIBRARY,),
}
UNSEEN_TASKS: Mapping[str, tuple[str, ...]] = {"pandas": ("pandas",), "scikit_learn": ("sklearn",)}

PLACEHOLDER = "{}"  # stands where an f-string, % or .format puts a value
_SKIPPED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "_vendor",
    "__pycache__",
}
_MIN_WORDS = 3  # shorter messages name a value and say nothing


@dataclass(frozen=True)
class CorpusConfig:
    max_files: int = 100  # files parsed per package, those with the most `raise` first; bounds the time
    max_file_bytes: int = 400_000  # larger files are generated ones and take seconds each
    max_per_class: int = 240  # ValueError would be three quarters of everything
    min_per_class: int = 20  # fewer leave nothing to test on
    validation_fraction: float = 0.1
    test_fraction: float = 0.3
    unseen_test_fraction: float = 0.5  # of tasks that nobody trains on
    seed: int = 0


@dataclass(frozen=True)
class Splits:
    """One task; each frame has the columns text and label."""

    train: pd.DataFrame
    validation: pd.DataFrame
    test: pd.DataFrame
    num_classes: int

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "validation", "test"):
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)


# Unseen tasks first: a message that a library shares with them is dropped where it would be trained on.
ALL_TASKS: Mapping[str, tuple[str, ...]] = {**UNSEEN_TASKS, **PRIVATE_TASKS}


def write_tasks(
    directory: Path, config: CorpusConfig, packages_of_task: Mapping[str, tuple[str, ...]] = ALL_TASKS
) -> dict[str, Splits]:
    """Collect tasks and write each to directory/<task>/. A text of two tasks stays in the first only.

    Raises DataError when a library is missing or has too few messages.
    """
    tasks: dict[str, Splits] = {}
    known: set[str] = set()
    libraries = list(chain.from_iterable(packages_of_task.values()))
    collected = dict(zip(libraries, _collect_in_parallel(libraries, config), strict=True))
    for name, packages in packages_of_task.items():
        messages = without_known(pd.concat([collected[package] for package in packages]), known)
        test_fraction = config.unseen_test_fraction if name in UNSEEN_TASKS else config.test_fraction
        tasks[name] = split(balance(messages, config), test_fraction, config.validation_fraction)
        tasks[name].write(directory / name)
    return tasks


def collect(library: str, config: CorpusConfig) -> pd.DataFrame:
    """All messages of a library: columns text and label, in the order of files and lines, repeats included.

    Raises DataError when the library is not installed as source files.
    """
    rows = [row for path in source_files(library, config) for row in messages_in(path.read_bytes())]
    if not rows:
        raise DataError(
            f"no error messages found in the source of {library!r}: is it installed as .py files?"
        )
    return pd.DataFrame(rows, columns=["text", "label"])


def source_files(library: str, config: CorpusConfig) -> list[Path]:
    """At most max_files files, those with the most raise statements, in the order of their paths."""
    num_raises: dict[Path, int] = {}
    root = library_root(library)
    for path in sorted(root.rglob("*.py")):
        is_skipped = not _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
        if not is_skipped and path.stat().st_size <= config.max_file_bytes:
            num_raises[path] = path.read_bytes().count(b"raise ")
    most = sorted(num_raises, key=lambda path: -num_raises[path])[: config.max_files]
    return sorted(path for path in most if num_raises[path])


def library_root(library: str) -> Path:
    """The folder of a library's source, found without importing it. Raises DataError when there is none."""
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    found = importlib.util.find_spec(library)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"the library {library!r} is not installed here: pip install it, or leave it out")
    return Path(next(iter(found.submodule_search_locations)))


def messages_in(source: bytes) -> Iterator[tuple[str, str]]:
    """(text, exception class) of each `raise X(...)` whose message can be read; none where nothing parses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for node in _statements(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            label = _class_name(node.exc.func)
            text = next(filter(None, map(_message, node.exc.args)), None)
            if label and text and len(re.findall(r"[A-Za-z]{2,}", text)) >= _MIN_WORDS:
                yield " ".join(text.split()), label


def without_known(messages: pd.DataFrame, known: set[str]) -> pd.DataFrame:
    """Drop texts seen before (compared by their letters only); adds those kept to `known`."""
    kept = []
    for text in messages["text"]:
        letters = re.sub(r"[^a-z]", "", text.lower())
        kept.append(letters not in known)
        known.add(letters)
    return messages[kept].reset_index(drop=True)


def balance(messages: pd.DataFrame, config: CorpusConfig) -> pd.DataFrame:
    """Classes with enough messages, each capped; shuffled by the seed, so that no split follows the files.

    Raises DataError when fewer than two classes are left.
    """
    shuffled = messages.iloc[np.random.default_rng(config.seed).permutation(len(messages))]
    num_of_class = shuffled["label"].map(shuffled["label"].value_counts())
    rank_in_class = shuffled.groupby("label").cumcount()
    kept = shuffled[(num_of_class >= config.min_per_class) & (rank_in_class < config.max_per_class)]
    if kept["label"].nunique() < 2:
        raise DataError(
            f"fewer than two exception classes have {config.min_per_class} messages: lower min_per_class"
        )
    return kept.reset_index(drop=True)


def split(messages: pd.DataFrame, test_fraction: float, validation_fraction: float) -> Splits:
    """By label: of each class the first rows go to test, the next to validation, the rest to train."""
    by_label = messages.groupby("label")["label"]
    position = (by_label.cumcount() + 0.5) / by_label.transform("size")
    is_test = position < test_fraction
    is_validation = ~is_test & (position < test_fraction + validation_fraction)
    return Splits(
        train=messages[~is_test & ~is_validation].reset_index(drop=True),
        validation=messages[is_validation].reset_index(drop=True),
        test=messages[is_test].reset_index(drop=True),
        num_classes=messages["label"].nunique(),
    )


def _collect_in_parallel(libraries: Sequence[str], config: CorpusConfig) -> list[pd.DataFrame]:
    # Parsing holds the interpreter's lock, so processes; spawned, because the caller may have threads.
    num_workers = min(len(libraries), os.cpu_count() or 1)
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(collect, libraries, [config] * len(libraries)))


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement, in the order of the file; ast.walk would visit every expression, too."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        for block in (
            "cases",
            "finalbody",
            "orelse",
            "handlers",
            "body",
        ):  # reversed: the last one is popped first
            inner = getattr(node, block, ())
            if isinstance(inner, list):  # the body of a lambda is an expression
                pending.extend(reversed(inner))


def _class_name(function: ast.expr) -> str | None:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name if name[:1].isupper() else None  # lower case: a variable, not a class


def _message(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_message(value) or PLACEHOLDER for value in values)
        case ast.BinOp(left=left, op=ast.Mod()):
            return re.sub(r"%(\(\w+\))?[-#0 +]*[\d.*]*[a-zA-Z]", PLACEHOLDER, _message(left) or "")
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            sides = (_message(left), _message(right))
            return "".join(side or PLACEHOLDER for side in sides) if any(sides) else None
        case ast.Call(func=ast.Attribute(value=value, attr="format")):
            return re.sub(r"\{[^{}]*\}", PLACEHOLDER, _message(value) or "")
        case ast.Call(func=ast.Name(id="_"), args=[argument, *_]):  # gettext
            return _message(argument)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the error messages of installed libraries as tasks.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write <task>/{train,validation,test}.csv to"
    )
    parser.add_argument("--max-per-class", type=int, default=CorpusConfig.max_per_class)
    parser.add_argument("--seed", type=int, default=CorpusConfig.seed)
    flags = parser.parse_args(arguments)
    started_at = time.monotonic()
    tasks = write_tasks(flags.out, CorpusConfig(max_per_class=flags.max_per_class, seed=flags.seed))
    for name, task in tasks.items():
        sizes = f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test"
        print(f"{name}: {sizes}; {task.num_classes} classes")
    print(f"{time.monotonic() - started_at:.1f} s")


if __name__ == "__main__":
    main()
