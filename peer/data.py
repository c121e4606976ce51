"""What are a peer's examples: their columns, labels, task and splits, checked before anything is spent?

Files are read by `peer.tables`. Whatever is wrong with the data raises a DataError here, at once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from coordinator.errors import DataError, UsageError
from peer.tables import Source, Table, listed, open_source, short
from peer.tasks import Task, TaskKind

_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "validation_matched")
_PAIR_COLUMNS = (
    ("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("question", "passage"),
    ("question", "sentence"), ("question", "context"), ("query", "passage"), ("query", "document"),
)  # fmt: skip
# The first group with exactly one name present decides, so "text" goes before "title".
_TEXT_COLUMNS = ({"text"}, {
    "sentence", "review", "content", "comment", "tweet", "message", "document", "headline", "title", "body",
    "question", "utterance", "query", "input", "review_text", "review_body", "tweet_text",
})  # fmt: skip
_LABEL_COLUMNS = ({"label", "labels"}, {
    "target", "class", "score", "category", "rating", "stars", "sentiment", "emotion", "intent", "topic",
    "gold_label", "similarity", "similarity_score", "relatedness_score", "answer",
})  # fmt: skip
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_INTEGRAL = re.compile(r"[+-]?[0-9]+(\.0+)?")
_MISSING_AMONG_NUMBERS = ("na", "n/a", "null", "none")  # among words these may be a class ("none")
_MAX_TARGET = 1e12  # float32 ends at 3e38, and a batch sums squares: of targets, and of their gradients
_MANY_VALUES = 10  # more distinct fractional targets than this are a scale, not classes


@dataclass(frozen=True)
class DataConfig:
    data: str  # file, folder of split files, folder written by save_to_disk, or hub id
    validation_data: str | None = None  # held out for evaluation and votes; cut from `data` if None
    test_data: str | None = None  # held out for the final figures; cut from `data` if None
    dataset_config: str | None = None  # of a hub data set, such as "sst2" of "glue"
    split: str | None = None  # the split to train on, if it is not called "train"
    text_column: str | None = None  # None: guessed
    text_pair_column: str | None = None  # None: guessed if text_column is None, too; else single texts
    label_column: str | None = None  # None: guessed
    task: Literal["auto", "classification", "regression"] = "auto"
    validation_fraction: float = 0.1  # of all examples, cut from training when there is no such file
    test_fraction: float = 0.1  # the same
    max_train_examples: int | None = None  # seeded, stratified sub-sample; None: all
    max_eval_examples: int | None = None  # the same, for validation and for test
    seed: int = 0  # of the cut and of the sub-samples


@dataclass(frozen=True)
class TaskData:
    task: Task  # kind and private label names
    train: Dataset  # columns text, [text_pair], label: int64 label ids, or float64 values
    validation: Dataset  # the same columns
    test: Dataset  # the same columns
    notes: tuple[str, ...]  # what was guessed, dropped or cut, for the person


def load_task_data(config: DataConfig) -> TaskData:
    """Read, check and split the examples. The same config and files give the same examples.

    Raises DataError when the data cannot be used, UsageError when the config cannot.
    """
    _check_config(config)
    notes: list[str] = []
    tables = _find_tables(config, notes)
    columns = _choose_columns(tables["train"], config, notes)
    splits = _read_splits(tables, columns, config, notes)
    task = _decide_task(splits, columns, config, notes)
    _check_enough(splits["train"], task, config)
    splits = _cut_missing(splits, task, config, notes)
    splits = _limit(splits, task, config, notes)
    _note_overlap(splits, notes)
    made = {role: _to_dataset(split, task) for role, split in splits.items()}
    return TaskData(task, made["train"], made["validation"], made["test"], tuple(notes))


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    is_pair: bool,
    on_progress: Callable[[float], None] | None = None,
) -> Dataset:
    """Columns input_ids, attention_mask, [token_type_ids], labels, length (tokens), in memory.

    Texts are cut to `max_length` tokens (of a pair, the longer text first), or to what the model allows
    if that is less (`peer.model.load_tokenizer` knows it); padding is left to the batches. `on_progress`
    gets the fraction done.
    """
    if max_length < 8:
        raise UsageError(f"A maximum length of {max_length} tokens leaves no room for text: use 8 or more.")
    max_length = min(max_length, tokenizer.model_max_length)
    parts: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []}
    for start in range(0, len(dataset), 1000):
        batch = dataset[start : start + 1000]
        texts = [batch["text"], batch["text_pair"]] if is_pair else [batch["text"]]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in encoded:
                parts.setdefault(name, []).extend(encoded[name])
        if on_progress is not None:
            on_progress(min(start + 1000, len(dataset)) / len(dataset))
    types = {"input_ids": "int32", "attention_mask": "int8", "token_type_ids": "int8"}
    features = {name: datasets.List(Value(types[name])) for name in parts}
    features |= {"labels": dataset.features["label"], "length": Value("int32")}
    lengths = [len(ids) for ids in parts["input_ids"]]
    columns = {**parts, "labels": list(dataset["label"]), "length": lengths}
    return Dataset.from_dict(columns, features=Features(features))


# Internal values ----------------------------------------------------------------------------------


class _Columns(NamedTuple):
    text: str
    text_pair: str | None
    label: str


class _Example(NamedTuple):
    text: str
    text_pair: str | None
    label: str  # as written; numbers in their shortest form
    row: int  # of the table, for messages


@dataclass(frozen=True)
class _Split:
    table: Table  # where the examples come from
    examples: list[_Example]

    @property
    def labels(self) -> list[str]:
        return [example.label for example in self.examples]

    def take(self, indices: Iterable[int]) -> _Split:
        return replace(self, examples=[self.examples[i] for i in indices])

    def place(self, is_meant: Callable[[str], bool]) -> str:
        """The file and the lines of the examples whose label is meant."""
        rows = [example.row for example in self.examples if is_meant(example.label)]
        return f"{self.table.name}, {self.table.place(rows)}"


_Splits = dict[str, _Split]  # by role: train, validation, test


# Which table is for what --------------------------------------------------------------------------


def _check_config(config: DataConfig) -> None:
    for name in ("validation_fraction", "test_fraction"):
        value = getattr(config, name)
        if not 0 < value < 0.5:
            raise UsageError(f"{_flag(name)} is {value}: give a fraction above 0 and below 0.5.")
    for name in ("max_train_examples", "max_eval_examples"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(
                f"{_flag(name)} is {value}: give 1 or more, or leave it out to use all examples."
            )
    if config.seed < 0:
        raise UsageError(f"The seed is {config.seed}: give 0 or more.")


def _find_tables(config: DataConfig, notes: list[str]) -> dict[str, Table]:
    """The training table, and those for validation and test where they exist."""
    source = open_source(config.data, config.dataset_config)
    train_name = _training_split(source, config)
    tables = {"train": source[train_name]()}
    roles = {"validation": (config.validation_data, _VALIDATION_NAMES), "test": (config.test_data, ("test",))}
    for role, (path, names) in roles.items():
        if path is not None:
            own = open_source(path, config.dataset_config)
            wanted = tuple(own) if len(own) == 1 else names
            tables[role] = own[_pick_split(own, wanted, path, f"Give one file to --{role}-data.")]()
            continue
        found = [name for name in names if name in source and name != train_name]
        if found:
            tables[role] = source[found[0]]()
            notes.append(f"{role}: {tables[role].name}")
    return tables


def _training_split(source: Source, config: DataConfig) -> str:
    if config.split is not None and "" in source:
        raise DataError(
            f"--split {config.split} names a split, but {config.data} is one table: leave --split out."
        )
    names = tuple(source) if config.split is None and len(source) == 1 else (config.split or "train",)
    return _pick_split(source, names, config.data, "Name the one to train on with --split.")


def _pick_split(source: Source, names: Sequence[str], data: str, advice: str) -> str:
    found = [name for name in names if name in source]
    if not found:
        raise DataError(f"{data} has no split '{names[0]}'. It has: {listed(source)}. {advice}")
    return found[0]


# Which column is what -----------------------------------------------------------------------------


def _choose_columns(table: Table, config: DataConfig, notes: list[str]) -> _Columns:
    for flag in ("text_column", "text_pair_column", "label_column"):
        name = getattr(config, flag)
        if name is not None:
            _require_column(table, name, f"{_flag(flag)} {name}")
    label = config.label_column or _guess_label(table, config)
    text, text_pair = config.text_column, config.text_pair_column
    if text is None:
        text, text_pair = _guess_texts(table, label, text_pair)
    chosen = [name for name in (text, text_pair, label) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise DataError(
            f"{table.name}: the texts and the label must be different columns, but they are "
            f"{listed(chosen)}. Name them with --text-column, --text-pair-column and --label-column."
        )
    guesses = [
        ("text", config.text_column, text),
        ("second text", config.text_pair_column, text_pair),
        ("label", config.label_column, label),
    ]
    said = [f"{role} = '{name}'" for role, given, name in guesses if given is None and name is not None]
    if said:
        notes.append("guessed columns: " + ", ".join(said))
    return _Columns(text, text_pair, label)


def _require_column(table: Table, name: str, wanted: str) -> None:
    if name not in table.columns:
        raise DataError(
            f"{table.name} has no column for {wanted}. Its columns are {listed(table.columns)}. "
            f"Name one of them.{_separator_hint(table)}"
        )


def _separator_hint(table: Table) -> str:
    if len(table.columns) != 1 or not re.search(r"[;\t|]", table.columns[0]):
        return ""
    return " (Does something else than commas separate them? Use commas, or tabs in a .tsv file.)"


def _guess_label(table: Table, config: DataConfig) -> str:
    given = {config.text_column, config.text_pair_column}
    found = _guess(table, _LABEL_COLUMNS, given)
    if found is None and len(table.columns) == 2:  # a known text column leaves only one for the label
        text = config.text_column or _guess(table, _TEXT_COLUMNS, set())
        found = next((name for name in table.columns if text is not None and name != text), None)
    if found is None:
        _refuse_guess(table, "the label", "--label-column", _LABEL_COLUMNS)
    return found


def _guess_texts(table: Table, label: str, text_pair: str | None) -> tuple[str, str | None]:
    names = {name.lower(): name for name in table.columns if name != label}
    pairs = [(names[a], names[b]) for a, b in _PAIR_COLUMNS if a in names and b in names]
    if text_pair is not None:
        pairs = [pair for pair in pairs if pair[1] == text_pair]
    if len(pairs) == 1:
        return pairs[0]
    found = None if pairs else _guess(table, _TEXT_COLUMNS, {label, text_pair})
    others = [name for name in table.columns if name not in (label, text_pair)]
    if found is None and len(others) == 1 and len(table.columns) <= 3:
        found = others[0]
    if found is None:
        _refuse_guess(table, "the text", "--text-column (and --text-pair-column)", _TEXT_COLUMNS)
    return found, text_pair


def _guess(table: Table, groups: Sequence[set[str]], taken: set[str | None]) -> str | None:
    for group in groups:
        found = [name for name in table.columns if name.lower() in group and name not in taken]
        if len(found) == 1:
            return found[0]
    return None


def _refuse_guess(table: Table, role: str, flags: str, groups: Sequence[set[str]]) -> NoReturn:
    known = {name for group in groups for name in group}
    found = [name for name in table.columns if name.lower() in known]
    what = f"it could be {listed(found)}" if found else f"the columns are {listed(table.columns)}"
    raise DataError(
        f"{table.name}: which column is {role} is not clear, {what}. "
        f"Name it with {flags}.{_separator_hint(table)}"
    )


# Values -------------------------------------------------------------------------------------------


def _read_splits(
    tables: Mapping[str, Table], columns: _Columns, config: DataConfig, notes: list[str]
) -> _Splits:
    """A published test split often comes without labels: then one is cut from the training data."""
    splits = {}
    for role, table in tables.items():
        split = _read_split(table, columns, notes)
        if any(split.labels):
            splits[role] = split
        elif role == "train" or getattr(config, f"{role}_data") is not None:
            raise DataError(
                f"The {role} data has no labels at all. Give labelled data, or check --label-column."
            )
        else:
            notes.append(f"{role}: the split of that name has no labels, so it is not used")
    return splits


def _read_split(table: Table, columns: _Columns, notes: list[str]) -> _Split:
    """Without any example for a published split that has no label column."""
    if table.num_rows == 0:
        raise DataError(f"{table.name} is empty: it has no examples. Add some, one per row.")
    if table.may_lack_labels and columns.label not in table.columns:
        return _Split(table, [])
    for name in columns:
        if name is not None:
            _require_column(table, name, f"'{name}', which the training data has")
    texts, labels = table.read(columns.text), table.read(columns.label)
    pairs = [None] * len(texts) if columns.text_pair is None else table.read(columns.text_pair)
    if columns.label not in table.class_names:
        labels = [_as_label(written) for written in labels]
    examples = list(map(_Example, texts, pairs, labels, range(len(texts))))
    return _drop_unlabeled(_drop_empty(_Split(table, examples), columns, notes), columns, notes)


def _as_label(written: str) -> str:
    label = written.strip()
    if _INTEGRAL.fullmatch(label):
        return label.split(".")[0]  # "1.0" of one file is "1" of another
    return "" if label.lower() == "nan" else label


def _drop_empty(split: _Split, columns: _Columns, notes: list[str]) -> _Split:
    table = split.table
    kept = [e for e in split.examples if e.text.strip() and (e.text_pair is None or e.text_pair.strip())]
    if not kept:
        names = listed([name for name in (columns.text, columns.text_pair) if name is not None])
        raise DataError(f"{table.name}: all texts in {names} are empty. Name another column, or fill it.")
    empty = sorted({e.row for e in split.examples} - {e.row for e in kept})
    if empty:
        notes.append(f"{table.name}: {_count(empty, 'example')} without text dropped ({table.place(empty)})")
    return _Split(table, kept)


def _drop_unlabeled(split: _Split, columns: _Columns, notes: list[str]) -> _Split:
    """In a published data set only: in a person's own file a missing label is a mistake to mend."""
    table, num_examples = split.table, len(split.examples)
    labeled = [e for e in split.examples if e.label]
    num_unlabeled = num_examples - len(labeled)
    if num_unlabeled and not (table.may_lack_labels or columns.label in table.class_names):
        raise DataError(
            f"{split.place(lambda label: not label)}: no label in column '{columns.label}' "
            f"({num_unlabeled} of {num_examples} examples). Fill it in, or remove the example."
        )
    if num_unlabeled and labeled:
        notes.append(f"{table.name}: {_count(range(num_unlabeled), 'example')} without label dropped")
    return _Split(table, labeled)


# The task -----------------------------------------------------------------------------------------


def _decide_task(splits: _Splits, columns: _Columns, config: DataConfig, notes: list[str]) -> Task:
    train, is_pair = splits["train"], columns.text_pair is not None
    counts = Counter(train.labels)
    _check_not_missing(train, counts)
    kind = _task_kind(train, counts, columns, config, notes)
    if kind == "regression":
        for split in splits.values():
            _check_numeric(split, columns)
        if len(counts) == 1:
            raise DataError(
                f"{train.table.name}: all targets in column '{columns.label}' are {listed(counts)}, so "
                "there is nothing to learn. Give data with different targets, or check --label-column."
            )
        return Task("regression", is_pair, ())
    names = _ordered(counts, train.table.class_names.get(columns.label))
    _check_classes(train, counts, columns, names)
    for role, split in splits.items():
        _check_known(split, set(names), role, columns)
    return Task("classification", is_pair, names)


def _task_kind(
    train: _Split, counts: Counter[str], columns: _Columns, config: DataConfig, notes: list[str]
) -> TaskKind:
    if config.task != "auto":
        return config.task
    has_names = columns.label in train.table.class_names
    is_numeric = not has_names and all(_NUMBER.fullmatch(label) for label in counts)
    has_fractions = is_numeric and not all(float(label).is_integer() for label in counts)
    if has_fractions and (len(counts) > _MANY_VALUES or len(counts) > len(train.examples) / 2):
        notes.append(
            f"task: regression, as '{columns.label}' holds {len(counts)} different numbers "
            "(or say --task classification)"
        )
        return "regression"
    other = " (or say --task regression)" if is_numeric and len(counts) > 2 else ""
    notes.append(f"task: classification with {len(counts)} labels{other}")
    return "classification"


def _check_not_missing(train: _Split, counts: Counter[str]) -> None:
    """ "none" may be a class among words; among numbers it is a gap."""
    gaps = [label for label in counts if label.lower() in _MISSING_AMONG_NUMBERS]
    others = [label for label in counts if label not in gaps]
    if gaps and others and all(_NUMBER.fullmatch(label) for label in others):
        raise DataError(
            f"{train.place(lambda label: label in gaps)}: the label is {short(gaps[0])}, all others "
            "are numbers. Fill in the label, or remove the example."
        )


def _check_numeric(split: _Split, columns: _Columns) -> None:
    strange = [la for la in split.labels if not (_NUMBER.fullmatch(la) and math.isfinite(float(la)))]
    if strange:
        raise DataError(
            f"{split.place(set(strange).__contains__)}, column '{columns.label}': the target "
            f"{short(strange[0])} is not a finite number, as regression needs (1.5, with a point). Mend it, "
            "or use --task classification."
        )
    huge = [label for label in split.labels if abs(float(label)) > _MAX_TARGET]
    if huge:
        raise DataError(
            f"{split.place(set(huge).__contains__)}, column '{columns.label}': the target {short(huge[0])} "
            f"is farther from 0 than {_MAX_TARGET:.0e}, too far to train on in single precision. Mend it, "
            "or give all targets in a larger unit."
        )


def _ordered(counts: Counter[str], class_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Integers by value, strings by the alphabet, and ClassLabel names in the order of their ids."""
    if class_names is not None:
        return tuple(name for name in class_names if name in counts)
    if all(_NUMBER.fullmatch(label) for label in counts):
        return tuple(sorted(counts, key=lambda label: (float(label), label)))
    return tuple(sorted(counts))


def _check_classes(train: _Split, counts: Counter[str], columns: _Columns, names: tuple[str, ...]) -> None:
    advice = "check --label-column"
    if all(_NUMBER.fullmatch(label) for label in names) and len(names) > _MANY_VALUES:
        advice = "use --task regression if the labels are a scale"
    if len(names) == 1:
        raise DataError(
            f"{train.table.name}: column '{columns.label}' holds one class only ({short(names[0])}), so "
            f"there is nothing to learn. Add examples of another class, or {advice}."
        )
    rare = [label for label in names if counts[label] < 2]
    if rare:
        raise DataError(
            f"{train.place(lambda label: counts[label] < 2)}: fewer than two examples of "
            f"{_count(rare, 'class', 'classes')} ({listed(rare)}), so none is left to test on. "
            f"Add examples, remove these, or {advice}."
        )


def _check_known(split: _Split, known: set[str], role: str, columns: _Columns) -> None:
    strange = list(dict.fromkeys(label for label in split.labels if label not in known))
    if strange:
        raise DataError(
            f"{split.place(lambda label: label not in known)}, column '{columns.label}': the {role} data has "
            f"{_count(strange, 'label')} that the training data lacks ({listed(strange)}). Add training "
            "examples of it, correct it, or remove these examples."
        )


# Splits -------------------------------------------------------------------------------------------


def _check_enough(train: _Split, task: Task, config: DataConfig) -> None:
    if len(train.examples) < 4:
        raise DataError(
            f"{train.table.name} has {_count(train.examples, 'example')}: at least 4 are needed "
            "to train and test. Add examples."
        )
    limit, minimum = config.max_train_examples, max(2, task.num_labels)
    if limit is not None and limit < minimum:
        raise UsageError(
            f"--max-train-examples is {limit}, fewer than the {minimum} that give one "
            "example of each class. Raise it or leave it out."
        )


def _cut_missing(splits: _Splits, task: Task, config: DataConfig, notes: list[str]) -> _Splits:
    """Held-out splits come stratified from the training data; each class keeps an example for training."""
    splits = dict(splits)
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    strata = _strata(splits["train"], task)
    wanted = {role: max(1, round(len(strata) * f)) for role, f in fractions.items() if role not in splits}
    num_wanted = sum(wanted.values())
    keep_out = 1 if task.kind == "classification" else 2  # one value alone has no slope
    num_spare = int(np.sum(np.bincount(strata) - keep_out))
    for seed, (role, size) in enumerate(wanted.items()):
        size = max(1, size * min(num_wanted, num_spare) // num_wanted)  # few are shared fairly
        train = splits["train"]
        rng = np.random.default_rng([config.seed, seed])
        cut = _stratified_choice(_strata(train, task), size, keep_out=keep_out, rng=rng)
        rest = np.setdiff1d(np.arange(len(train.examples)), cut)
        splits[role], splits["train"] = train.take(cut), train.take(rest)
        notes.append(
            f"{role}: {_count(cut, 'example')} cut from the training data, stratified (seed {config.seed})"
        )
    return splits


def _limit(splits: _Splits, task: Task, config: DataConfig, notes: list[str]) -> _Splits:
    limited = {}
    for seed, role in enumerate(("train", "validation", "test")):
        limit = config.max_train_examples if role == "train" else config.max_eval_examples
        split = limited[role] = splits[role]
        if limit is not None and limit < len(split.examples):
            rng = np.random.default_rng([config.seed, 10 + seed])
            strata = _strata(split, task)
            chosen = _stratified_choice(strata, limit, at_least=1 if role == "train" else 0, rng=rng)
            limited[role] = split.take(chosen)
            notes.append(f"{role}: {limit} of {len(strata)} examples used, stratified (seed {config.seed})")
    return limited


def _strata(split: _Split, task: Task) -> np.ndarray:
    if task.kind == "regression":
        return np.zeros(len(split.examples), dtype=np.int64)
    ids = {name: i for i, name in enumerate(task.label_names)}
    return np.array([ids[label] for label in split.labels], dtype=np.int64)


def _stratified_choice(
    strata: np.ndarray, size: int, *, rng: np.random.Generator, at_least: int = 0, keep_out: int = 0
) -> np.ndarray:
    """Sorted indices of `size` examples in proportion to their strata (n,), by largest remainder.

    Each stratum gives at least `at_least` and leaves at least `keep_out` behind; where both bounds
    and `size` cannot be met, the bounds are.
    """
    _, members, counts = np.unique(strata, return_inverse=True, return_counts=True)
    high = np.maximum(counts - keep_out, 0)
    low = np.minimum(at_least, high)
    ideal = counts * size / counts.sum() + rng.random(len(counts)) * 1e-6  # ties are drawn, not in order
    quota = np.clip(np.floor(ideal).astype(np.int64), low, high)
    while quota.sum() < size and (quota < high).any():
        quota[np.argmax(np.where(quota < high, ideal - quota, -np.inf))] += 1
    while quota.sum() > size and (quota > low).any():
        quota[np.argmin(np.where(quota > low, ideal - quota, np.inf))] -= 1
    chosen = [rng.permutation(np.flatnonzero(members == s))[: quota[s]] for s in range(len(counts))]
    return np.sort(np.concatenate(chosen))


def _note_overlap(splits: _Splits, notes: list[str]) -> None:
    seen = {(e.text, e.text_pair) for e in splits["train"].examples}
    for role in ("validation", "test"):
        same = [e for e in splits[role].examples if (e.text, e.text_pair) in seen]
        if same:
            notes.append(
                f"{role}: {_count(same, 'example')} also in the training data, so its score is too good"
            )


def _to_dataset(split: _Split, task: Task) -> Dataset:
    columns: dict[str, Any] = {"text": [e.text for e in split.examples]}
    if task.is_pair:
        columns["text_pair"] = [e.text_pair for e in split.examples]
    features = {name: Value("large_string") for name in columns}
    is_regression = task.kind == "regression"
    columns["label"] = [float(label) for label in split.labels] if is_regression else _strata(split, task)
    features["label"] = Value("float64" if is_regression else "int64")
    return Dataset.from_dict(columns, features=Features(features))


# Words for messages -------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _count(values: Any, singular: str, plural: str | None = None) -> str:
    return f"{len(values)} {singular if len(values) == 1 else plural or singular + 's'}"
