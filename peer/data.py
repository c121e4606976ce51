"""Where a peer's examples come from, and what must be true of them before anything is spent.

Everything is read into memory; no file of the person is changed, and no cache file of private
data is written anywhere. Whatever is wrong with the data raises a DataError here, at once.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import HfApi
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its export for downstream libraries
from transformers import PreTrainedTokenizerBase

from coordinator.errors import DataError, UsageError
from peer.tasks import Task, TaskKind

HUB_TIMEOUT_SECONDS = 10.0  # until the hub must have answered that the data set exists

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "validation_matched")
_PAIR_COLUMNS = (
    ("text", "text_pair"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("question", "passage"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
)
# The first group with exactly one name present decides, so "text" goes before "title".
_TEXT_COLUMNS = (
    frozenset({"text"}),
    frozenset(
        {"sentence", "review", "content", "comment", "tweet", "message", "document", "headline", "title"}
    )
    | {"body", "question", "utterance", "query", "input", "review_text", "review_body", "tweet_text"},
)
_LABEL_COLUMNS = (
    frozenset({"label", "labels"}),
    frozenset({"target", "class", "score", "category", "rating", "stars", "sentiment", "emotion", "intent"})
    | {"topic", "gold_label", "similarity", "similarity_score", "relatedness_score", "answer"},
)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_INTEGRAL = re.compile(r"[+-]?[0-9]+(\.0+)?")
_MISSING_AMONG_NUMBERS = ("na", "n/a", "null", "none")  # among words these may be a class ("none")
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
    read = {role: _read_examples(table, columns, notes) for role, table in tables.items()}
    examples = _drop_unlabeled_splits(read, config, notes)
    task, examples = _decide_task(examples, columns, config, notes)
    _check_enough(examples["train"], task, config)
    splits = _cut_missing(examples, task, config, notes)
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

    Texts are cut to `max_length` tokens (of a pair, the longer text first), or to what the tokenizer
    allows if that is less; padding is left to the batches. `on_progress` gets the fraction done.
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


@dataclass(frozen=True)
class _Table:
    name: str  # what a message calls it: the path, or the data set and its split
    columns: tuple[str, ...]
    num_rows: int
    read: Callable[[str], list[Any]]  # the values of one column
    line_of: Callable[[int], int]  # counted from 1, as an editor counts, for the row counted from 0
    unit: str = "line"  # or "row", where a file has no lines
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ClassLabel columns
    may_lack_labels: bool = False  # a published data set, whose test labels are often withheld


@dataclass(frozen=True)
class _Columns:
    text: str
    text_pair: str | None
    label: str


@dataclass(frozen=True)
class _Examples:
    table: _Table
    texts: list[str]
    text_pairs: list[str] | None
    labels: list[str]  # as written; numbers in their shortest form
    rows: list[int]  # of the table, for messages

    def take(self, indices: Iterable[int]) -> _Examples:
        kept = list(indices)
        pairs = None if self.text_pairs is None else [self.text_pairs[i] for i in kept]
        return replace(
            self,
            texts=[self.texts[i] for i in kept],
            text_pairs=pairs,
            labels=[self.labels[i] for i in kept],
            rows=[self.rows[i] for i in kept],
        )


_Source = dict[str, Callable[[], _Table]]  # by split name; "" for a single table


# Which table is for what --------------------------------------------------------------------------


def _check_config(config: DataConfig) -> None:
    for flag in ("validation_fraction", "test_fraction"):
        if not 0 < getattr(config, flag) < 0.5:
            raise UsageError(
                f"{_flag(flag)} is {getattr(config, flag)}: give a fraction above 0 and below 0.5."
            )
    for flag in ("max_train_examples", "max_eval_examples"):
        value = getattr(config, flag)
        if value is not None and value < 1:
            raise UsageError(
                f"{_flag(flag)} is {value}: give 1 or more, or leave it out to use all examples."
            )
    if config.seed < 0:
        raise UsageError(f"The seed is {config.seed}: give 0 or more.")


def _find_tables(config: DataConfig, notes: list[str]) -> dict[str, _Table]:
    """The training table, and those for validation and test where they exist."""
    source = _open_source(config.data, config)
    train_name = _training_split(source, config)
    tables = {"train": source[train_name]()}
    roles = {"validation": (config.validation_data, _VALIDATION_NAMES), "test": (config.test_data, ("test",))}
    for role, (path, names) in roles.items():
        if path is not None:
            tables[role] = _held_out_table(_open_source(path, replace(config, split=None)), path, role, names)
            continue
        found = [name for name in names if name in source and name != train_name.split("[")[0]]
        if found:
            tables[role] = source[found[0]]()
            notes.append(f"{role}: {tables[role].name}")
    return tables


def _training_split(source: _Source, config: DataConfig) -> str:
    if config.split is not None and "" in source:
        raise DataError(
            f"--split {config.split} names a split, but {config.data} is one table: leave --split out."
        )
    wanted = config.split or "train"
    if wanted in source:
        return wanted
    if config.split is None and len(source) == 1:
        return next(iter(source))
    raise DataError(
        f"{config.data} has no split '{wanted}'. It has: {_listed(source)}. "
        "Name the one to train on with --split."
    )


def _held_out_table(source: _Source, path: str, role: str, names: Sequence[str]) -> _Table:
    found = [name for name in names if name in source]
    if not found and len(source) != 1:
        raise DataError(
            f"--{role}-data {path} holds several splits ({_listed(source)}) and none is called '{role}': "
            "give one file."
        )
    return source[found[0] if found else next(iter(source))]()


def _open_source(data: str, config: DataConfig) -> _Source:
    path = Path(data).expanduser()
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.exists():
            return {"": partial(_read_file, path)}
    except (OSError, ValueError) as error:  # a name too long, a parent without permission, a zero byte
        raise DataError(f"Cannot look up {data!r}: {error}. Check the path.") from error
    if _looks_like_a_path(data):
        raise DataError(f"There is no file or folder {data} (looked for {path.absolute()}). Check the path.")
    return _open_hub(data, config)


def _looks_like_a_path(data: str) -> bool:
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", data) is not None
    return not is_hub_id or re.search(r"\.[A-Za-z]{2,8}[0-9]?$", data) is not None


# Reading ------------------------------------------------------------------------------------------


def _open_folder(path: Path) -> _Source:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return _open_saved(path)
    by_split: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in _SUFFIXES and file.is_file():
            by_split.setdefault(file.stem, []).append(file)
    if not by_split:
        raise DataError(
            f"The folder {path} holds no data file ({', '.join(_SUFFIXES)}) and was not written by "
            "datasets.save_to_disk. Name the splits train.csv, validation.csv and test.csv, or give a file."
        )
    return {split: partial(_read_split_file, files) for split, files in by_split.items()}


def _read_split_file(files: Sequence[Path]) -> _Table:
    if len(files) > 1:
        raise DataError(
            f"{files[0].parent} holds {_listed([file.name for file in files])}, so which one is the split "
            f"'{files[0].stem}' is not clear. Move the others away, or give the file itself."
        )
    return _read_file(files[0])


def _open_saved(path: Path) -> _Source:
    try:
        loaded = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{path} looks like a folder written by datasets.save_to_disk but cannot be read "
            f"({_brief(error)}). Write it again, or give a CSV, JSON lines or Parquet file."
        ) from error
    if isinstance(loaded, DatasetDict):
        return {s: partial(_table_of_dataset, part, f"{path}, split '{s}'") for s, part in loaded.items()}
    return {"": partial(_table_of_dataset, loaded, str(path))}


def _open_hub(name: str, config: DataConfig) -> _Source:
    """A public data set stays where the hub's own cache puts it: it is not private."""
    _check_hub(name)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config.dataset_config)
        splits = {str(split): loaded[split] for split in loaded}
        if config.split is not None and config.split not in splits:  # such as train[:1000]
            splits[config.split] = datasets.load_dataset(name, config.dataset_config, split=config.split)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"There is no file or folder {name} here, and the hub data set of that name cannot be loaded "
            f"({_brief(error)}). Check the name, --dataset-config and --split, or give a local file."
        ) from error
    return {
        s: partial(_table_of_dataset, part, f"{name}, split '{s}'", is_published=True)
        for s, part in splits.items()
    }


def _check_hub(name: str) -> None:
    """One request with a timeout: load_dataset alone repeats for 23 s and more before it gives up."""
    if datasets.config.HF_HUB_OFFLINE:
        return  # load_dataset answers from its cache, or fails at once
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise DataError(
            f"There is no file or folder {name} here, and the hub data set of that name cannot be reached "
            f"({_brief(error)}). Check the name and the network, set HF_HUB_OFFLINE=1 to use a copy in the "
            "cache of the hub, or give a local file."
        ) from error


def _read_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{path}: the format '{suffix or 'without suffix'}' is not known. Use a CSV, TSV, JSON lines "
            "(.jsonl) or Parquet file, a folder of them, a folder written by datasets.save_to_disk, or a hub "
            "data set."
        )
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({_brief(error)}). Check the file and its permissions."
        ) from error
    _check_encoding(content, path)
    if suffix in (".csv", ".tsv"):
        return _read_separated(content, path, "\t" if suffix == ".tsv" else ",")
    return _read_json_lines(content, path)


def _check_encoding(content: bytes, path: Path) -> None:
    advice = "Save the file as UTF-8 (for example: iconv -f LATIN1 -t UTF-8 FILE > NEW)."
    try:
        is_blank = not content.decode("utf-8").strip("\ufeff \t\r\n")
    except UnicodeDecodeError as error:
        line, byte = _line_at(content, error.start), content[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{byte:02x} is not valid UTF-8. {advice}") from error
    if is_blank:
        raise DataError(f"{path} is empty. Give a file with a header and one example per line.")
    if b"\0" in content:
        line = _line_at(content, content.index(b"\0"))
        raise DataError(
            f"{path}, line {line}: a zero byte, so this is not UTF-8 text (UTF-16, perhaps?). {advice}"
        )


def _line_at(content: bytes, position: int) -> int:
    before = content[:position]
    return 1 + before.count(b"\n") + (before.count(b"\r") - before.count(b"\r\n"))


def _read_separated(content: bytes, path: Path, separator: str) -> _Table:
    frame = _parse_separated(content, path, separator)
    header = [str(name).strip() for name in frame.iloc[0]]
    _check_columns([name for name in header if name], str(path), "line 1")
    records = frame.iloc[1:].to_numpy(dtype=object)
    kept = np.flatnonzero((records != "").any(axis=1))  # blank lines are no examples
    if len(kept) == 0:
        raise DataError(f"{path} is empty below its header (line 1). Add one example per line.")
    line_starts = cache(lambda: _line_starts(frame))  # needed for messages only
    return _Table(
        name=str(path),
        columns=tuple(name for name in header if name),  # a nameless one is pandas' row index
        num_rows=len(kept),
        read=lambda column: records[kept, header.index(column)].tolist(),
        line_of=lambda row: int(line_starts()[kept[row] + 1]),
    )


def _parse_separated(content: bytes, path: Path, separator: str) -> pd.DataFrame:
    """All records, the header included, as strings: neither "NA" nor "007" is turned into something else."""
    try:
        frame = _read_csv(content, separator)
        if separator == "\t" and _holds(frame, r"\t[^\n]*\n|\n[^\n]*\t"):
            raise pd.errors.ParserError("EOF inside string: a quoted text swallowed other lines")
        return frame
    except pd.errors.EmptyDataError as error:
        raise DataError(
            f"{path}, line 1 is blank. Begin the file with a header that names the columns."
        ) from error
    except pd.errors.ParserError as error:
        if separator == "\t" and "EOF inside string" in str(error):
            return _parse_unquoted(content, path)
        _refuse_record(content, path, separator, error)


def _parse_unquoted(content: bytes, path: Path) -> pd.DataFrame:
    """Many published TSV files (GLUE) use a quotation mark as a plain character."""
    try:
        return _read_csv(content, "\t", quoting=3)
    except pd.errors.ParserError as error:
        _refuse_record(content, path, "\t", error, quoting=3)


def _read_csv(content: bytes, separator: str, **options: Any) -> pd.DataFrame:
    # header=None keeps a column that occurs twice; blank lines are kept so that lines can be counted.
    options = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "header": None} | options
    return pd.read_csv(io.BytesIO(content), sep=separator, encoding="utf-8", **options).fillna("")


def _holds(frame: pd.DataFrame, pattern: str) -> bool:
    return any(bool(frame[name].str.contains(pattern, regex=True).any()) for name in frame)


def _refuse_record(content: bytes, path: Path, separator: str, error: Exception, **options: Any) -> NoReturn:
    """pandas counts records; a person looks for the line, and a quoted text may span several."""
    too_long = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
    unclosed = re.search(r"EOF inside string starting at row (\d+)", str(error))
    num_before = int(too_long[2]) - 1 if too_long else int(unclosed[1]) if unclosed else None
    if num_before is None:
        raise DataError(f"{path} cannot be read as a table ({_brief(error)}). Check the file.") from error
    line = 1
    if num_before:
        line = int(_line_starts(_read_csv(content, separator, nrows=num_before, **options))[-1])
    if too_long:
        name = "tab" if separator == "\t" else "comma"
        raise DataError(
            f"{path}, line {line}: {too_long[3]} fields where the header has {too_long[1]}. Put a text that "
            f'holds a {name} in double quotes ("..."), or check that {name}s separate the columns.'
        ) from error
    raise DataError(
        f'{path}, line {line}: a quotation mark opens here and is never closed. Close it, or write "" for a '
        "quotation mark inside a quoted text."
    ) from error


def _line_starts(frame: pd.DataFrame) -> np.ndarray:
    """(num_records + 1,) the line on which each record begins; the last entry is the one after the end."""
    num_lines = np.ones(len(frame), dtype=np.int64)
    for name in frame:
        num_lines += frame[name].str.count(r"\r\n|\r|\n").to_numpy(dtype=np.int64)
    return np.concatenate([[1], 1 + np.cumsum(num_lines)])


def _read_json_lines(content: bytes, path: Path) -> _Table:
    records, lines = [], []
    # Not splitlines(): JSON allows U+2028 and its like inside a string.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            records.append(_parse_json_line(line, f"{path}, line {number}"))
            lines.append(number)
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    return _Table(
        name=str(path),
        columns=columns,
        num_rows=len(records),
        read=lambda column: [record.get(column) for record in records],
        line_of=lambda row: lines[row],
    )


def _parse_json_line(line: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_columns([name for name, _ in pairs], where, "one object", what="key")
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({_brief(error)}). JSON lines hold one object per line, "
            'such as {"text": "...", "label": "..."}.'
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a {type(record).__name__}, not an object. JSON lines hold one object per line, "
            'such as {"text": "...", "label": "..."}.'
        )
    return record


def _read_parquet(path: Path) -> _Table:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Write the Parquet file again.")
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({_brief(error)}). Write it again."
        ) from error
    _check_columns(schema.names, str(path), "its schema")
    return _Table(
        name=str(path),
        columns=tuple(schema.names),
        num_rows=num_rows,
        read=lambda column: _read_parquet_column(path, column),
        line_of=lambda row: row + 1,
        unit="row",
        class_names=_class_names(schema),
    )


def _read_parquet_column(path: Path, column: str) -> list[Any]:
    try:
        with pq.ParquetFile(path) as file:
            return _values(file.read(columns=[column]).column(column), str(path), column)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: column '{column}' cannot be read ({_brief(error)}). Write the file again."
        ) from error


def _table_of_dataset(dataset: Any, name: str, *, is_published: bool = False) -> _Table:
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is a {type(dataset).__name__}, not a table in memory. Give a plain data set."
        )
    _check_columns(dataset.column_names, name, "its schema")
    arrow = dataset.with_format("arrow")
    return _Table(
        name=name,
        columns=tuple(dataset.column_names),
        num_rows=len(dataset),
        read=lambda column: _values(arrow.select_columns([column])[:].column(column), name, column),
        line_of=lambda row: row + 1,
        unit="row",
        class_names={n: tuple(f.names) for n, f in dataset.features.items() if isinstance(f, ClassLabel)},
        may_lack_labels=is_published,
    )


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """What `datasets` writes about its ClassLabel columns into a Parquet file; {} from other writers."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # foreign or future metadata: the column is then read as the integers it holds
    return {name: tuple(f.names) for name, f in features.items() if isinstance(f, ClassLabel)}


def _values(column: pa.ChunkedArray, name: str, column_name: str) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError as error:
        row = next(row for row in range(len(column)) if not _is_decodable(column[row]))
        raise DataError(
            f"{name}, row {row + 1}, column '{column_name}': bytes that are not valid UTF-8. "
            "Write the file again as UTF-8."
        ) from error


def _is_decodable(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _check_columns(names: Sequence[str], name: str, where: str, what: str = "column") -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{name}: the {what} {_listed(twice)} occurs more than once in {where}, so which one is meant is "
            "not clear. Rename or remove one."
        )


# Which column is what -----------------------------------------------------------------------------


def _choose_columns(table: _Table, config: DataConfig, notes: list[str]) -> _Columns:
    named = {"text_column": config.text_column, "text_pair_column": config.text_pair_column}
    for flag, name in {**named, "label_column": config.label_column}.items():
        _require_column(table, name, f"{_flag(flag)} {name}")
    label = config.label_column or _guess_label(table, config)
    text, text_pair = config.text_column, config.text_pair_column
    if text is None:
        text, text_pair = _guess_texts(table, label, text_pair)
    chosen = [name for name in (text, text_pair, label) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise DataError(
            f"{table.name}: the texts and the label must be different columns, but they are "
            f"{_listed(chosen)}. Name them with --text-column, --text-pair-column and --label-column."
        )
    guesses = {"text": (config.text_column, text), "second text": (config.text_pair_column, text_pair)}
    guesses["label"] = (config.label_column, label)
    said = [
        f"{role} = '{name}'" for role, (given, name) in guesses.items() if given is None and name is not None
    ]
    if said:
        notes.append("guessed columns: " + ", ".join(said))
    return _Columns(text, text_pair, label)


def _require_column(table: _Table, name: str | None, wanted: str) -> None:
    if name is None or name in table.columns:
        return
    raise DataError(
        f"{table.name} has no column for {wanted}. Its columns are {_listed(table.columns)}. "
        f"Name one of them.{_separator_hint(table)}"
    )


def _separator_hint(table: _Table) -> str:
    if len(table.columns) != 1 or not re.search(r"[;\t|]", table.columns[0]):
        return ""
    return " (Does something else than commas separate them? Use commas, or tabs in a .tsv file.)"


def _guess_label(table: _Table, config: DataConfig) -> str:
    given = {config.text_column, config.text_pair_column}
    found = _guess(table, _LABEL_COLUMNS, given)
    if found is None and len(table.columns) == 2:  # a known text column leaves only one for the label
        text = config.text_column or _guess(table, _TEXT_COLUMNS, set())
        found = next((name for name in table.columns if text is not None and name != text), None)
    if found is None:
        _refuse_guess(table, "the label", "--label-column", _LABEL_COLUMNS)
    return found


def _guess_texts(table: _Table, label: str, text_pair: str | None) -> tuple[str, str | None]:
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


def _guess(table: _Table, groups: Sequence[frozenset[str]], taken: set[str | None]) -> str | None:
    for group in groups:
        found = [name for name in table.columns if name.lower() in group and name not in taken]
        if len(found) == 1:
            return found[0]
    return None


def _refuse_guess(table: _Table, role: str, flags: str, groups: Sequence[frozenset[str]]) -> NoReturn:
    known = {name for group in groups for name in group}
    found = [name for name in table.columns if name.lower() in known]
    what = f"it could be {_listed(found)}" if found else f"the columns are {_listed(table.columns)}"
    raise DataError(
        f"{table.name}: which column is {role} is not clear, {what}. "
        f"Name it with {flags}.{_separator_hint(table)}"
    )


# Values -------------------------------------------------------------------------------------------


def _read_examples(table: _Table, columns: _Columns, notes: list[str]) -> _Examples | None:
    """None for a published split that has no label column."""
    if table.num_rows == 0:
        raise DataError(f"{table.name} is empty: it has no examples. Add some, one per row.")
    if table.may_lack_labels and columns.label not in table.columns:
        return None
    for name in (columns.text, columns.text_pair, columns.label):
        _require_column(table, name, f"'{name}', which the training data has")
    texts = _read_texts(table, columns.text)
    pairs = None if columns.text_pair is None else _read_texts(table, columns.text_pair)
    labels = _read_labels(table, columns.label)
    examples = _Examples(table, texts, pairs, labels, list(range(table.num_rows)))
    return _drop_unusable(examples, columns, notes)


def _read_texts(table: _Table, column: str) -> list[str]:
    return [_as_text(value, table, column, row) for row, value in enumerate(table.read(column))]


def _as_text(value: Any, table: _Table, column: str, row: int) -> str:
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(value, table, column, row)
        return value
    if _is_missing(value):
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    raise _type_error(value, table, column, row)


def _read_labels(table: _Table, column: str) -> list[str]:
    values = table.read(column)
    names = table.class_names.get(column)
    if names is not None:  # -1 is how `datasets` says "no label"
        values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]
    return [_as_label(value, table, column, row) for row, value in enumerate(values)]


def _as_label(value: Any, table: _Table, column: str, row: int) -> str:
    if isinstance(value, str):
        _check_characters(value, table, column, row)
        return "" if value.strip().lower() == "nan" else value.strip()
    if _is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of integers with a gap comes as 1.0
    if isinstance(value, (int, float)):
        return str(value)
    raise _type_error(value, table, column, row)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_characters(value: str, table: _Table, column: str, row: int) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{_where(table, row)}, column '{column}': half of a surrogate pair (such as \\ud83d alone), "
            "which is no character. Write the escaped character in full."
        ) from error


def _type_error(value: Any, table: _Table, column: str, row: int) -> DataError:
    return DataError(
        f"{_where(table, row)}, column '{column}': a {type(value).__name__}, where a text or a number is "
        "needed. Write one text and one label per example (join a list of words to one text), or name "
        "another column."
    )


def _drop_unusable(examples: _Examples, columns: _Columns, notes: list[str]) -> _Examples:
    """Empty texts are dropped, and said; a missing label in a person's own file is a mistake to mend."""
    table = examples.table
    pairs = examples.text_pairs or examples.texts
    has_text = [bool(a.strip()) and bool(b.strip()) for a, b in zip(examples.texts, pairs, strict=True)]
    if not any(has_text):
        names = _listed([name for name in (columns.text, columns.text_pair) if name is not None])
        raise DataError(f"{table.name}: all texts in {names} are empty. Name another column, or fill it.")
    if not all(has_text):
        empty = [row for row, has in zip(examples.rows, has_text, strict=True) if not has]
        notes.append(
            f"{table.name}: {_count(empty, 'example')} without text dropped ({_lines(table, empty)})"
        )
    examples = examples.take(i for i, has in enumerate(has_text) if has)
    unlabeled = [row for row, label in zip(examples.rows, examples.labels, strict=True) if not label]
    if unlabeled and not (table.may_lack_labels or columns.label in table.class_names):
        raise DataError(
            f"{table.name}, {_lines(table, unlabeled)}: no label in column '{columns.label}' "
            f"({len(unlabeled)} of {len(examples.labels)} examples). Fill it in, or remove the example."
        )
    if unlabeled and len(unlabeled) < len(examples.labels):
        notes.append(f"{table.name}: {_count(unlabeled, 'example')} without label dropped")
        return examples.take(i for i, label in enumerate(examples.labels) if label)
    return examples


def _drop_unlabeled_splits(
    read: Mapping[str, _Examples | None], config: DataConfig, notes: list[str]
) -> dict[str, _Examples]:
    """A published test split often comes without labels: then one is cut from the training data."""
    examples = {}
    for role, split in read.items():
        if split is not None and any(split.labels):
            examples[role] = split
        elif role == "train" or getattr(config, f"{role}_data") is not None:
            raise DataError(
                f"The {role} data has no labels at all. Give labelled data, or check --label-column."
            )
        else:
            notes.append(f"{role}: the split of that name has no labels, so it is not used")
    return examples


# The task -----------------------------------------------------------------------------------------


def _decide_task(
    examples: dict[str, _Examples], columns: _Columns, config: DataConfig, notes: list[str]
) -> tuple[Task, dict[str, _Examples]]:
    train = examples["train"]
    counts = Counter(train.labels)
    _check_not_missing(train, counts)
    kind = _task_kind(train, counts, columns, config, notes)
    if kind == "regression":
        for split in examples.values():
            _check_numeric(split, columns)
        if len(counts) == 1:
            raise DataError(
                f"{train.table.name}: all targets in column '{columns.label}' are {_listed(counts)}, so "
                "there is nothing to learn. Give data with different targets, or check --label-column."
            )
        return Task("regression", train.text_pairs is not None, ()), examples
    if all(_INTEGRAL.fullmatch(label) for label in counts):  # "1.0" of one file is "1" of another
        examples = {
            role: replace(e, labels=[_as_integer(la) for la in e.labels]) for role, e in examples.items()
        }
        counts = Counter(examples["train"].labels)
    names = _ordered(counts, train.table.class_names.get(columns.label))
    _check_classes(train, counts, columns, names)
    for role, split in examples.items():
        _check_known(split, set(names), role, columns)
    return Task("classification", train.text_pairs is not None, names), examples


def _task_kind(
    train: _Examples, counts: Counter[str], columns: _Columns, config: DataConfig, notes: list[str]
) -> TaskKind:
    if config.task != "auto":
        return config.task
    has_names = columns.label in train.table.class_names
    is_numeric = not has_names and all(_NUMBER.fullmatch(label) for label in counts)
    has_fractions = is_numeric and not all(float(label).is_integer() for label in counts)
    if has_fractions and (len(counts) > _MANY_VALUES or len(counts) > len(train.labels) / 2):
        notes.append(
            f"task: regression, as '{columns.label}' holds {len(counts)} different numbers "
            "(or say --task classification)"
        )
        return "regression"
    other = " (or say --task regression)" if is_numeric and len(counts) > 2 else ""
    notes.append(f"task: classification with {len(counts)} labels{other}")
    return "classification"


def _check_not_missing(train: _Examples, counts: Counter[str]) -> None:
    """ "none" may be a class among words; among numbers it is a gap."""
    gaps = [label for label in counts if label.lower() in _MISSING_AMONG_NUMBERS]
    numbers = [label for label in counts if _NUMBER.fullmatch(label)]
    if gaps and numbers and len(gaps) + len(numbers) == len(counts):
        rows = [row for row, label in zip(train.rows, train.labels, strict=True) if label in gaps]
        raise DataError(
            f"{train.table.name}, {_lines(train.table, rows)}: the label is {_short(gaps[0])}, all others "
            "are numbers. Fill in the label, or remove the example."
        )


def _check_numeric(split: _Examples, columns: _Columns) -> None:
    for row, label in zip(split.rows, split.labels, strict=True):
        if not _NUMBER.fullmatch(label) or not math.isfinite(float(label)):
            raise DataError(
                f"{_where(split.table, row)}, column '{columns.label}': the target {_short(label)} is not "
                "a finite number, as regression needs (1.5, with a point). Mend it, or use "
                "--task classification."
            )


def _as_integer(label: str) -> str:
    return label.split(".")[0] if _INTEGRAL.fullmatch(label) else label


def _ordered(counts: Counter[str], class_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Integers by value, strings by the alphabet, and ClassLabel names in the order of their ids."""
    if class_names is not None:
        return tuple(name for name in class_names if name in counts)
    if all(_NUMBER.fullmatch(label) for label in counts):
        return tuple(sorted(counts, key=lambda label: (float(label), label)))
    return tuple(sorted(counts))


def _check_classes(train: _Examples, counts: Counter[str], columns: _Columns, names: tuple[str, ...]) -> None:
    name, advice = train.table.name, "check --label-column"
    if all(_NUMBER.fullmatch(label) for label in names) and len(names) > _MANY_VALUES:
        advice = "use --task regression if the labels are a scale"
    if len(names) == 1:
        raise DataError(
            f"{name}: column '{columns.label}' holds one class only ({_short(names[0])}), so there is "
            f"nothing to learn. Add examples of another class, or {advice}."
        )
    rare = [label for label in names if counts[label] < 2]
    if rare:
        which = f"{_count(rare, 'class', 'classes')} ({_listed(rare)})"
        rows = [row for row, label in zip(train.rows, train.labels, strict=True) if counts[label] < 2]
        raise DataError(
            f"{name}, {_lines(train.table, rows)}: fewer than two examples of {which}, "
            f"so none is left to test on. Add examples, remove these, or {advice}."
        )


def _check_known(split: _Examples, known: set[str], role: str, columns: _Columns) -> None:
    strange = list(dict.fromkeys(label for label in split.labels if label not in known))
    if strange:
        rows = [row for row, label in zip(split.rows, split.labels, strict=True) if label not in known]
        raise DataError(
            f"{split.table.name}, {_lines(split.table, rows)}, column '{columns.label}': the {role} data has "
            f"{_count(strange, 'label')} that the training data lacks ({_listed(strange)}). Add training "
            "examples of it, correct it, or remove these examples."
        )


# Splits -------------------------------------------------------------------------------------------


def _check_enough(train: _Examples, task: Task, config: DataConfig) -> None:
    minimum = max(4, task.num_labels * 2)
    if len(train.labels) < minimum:
        raise DataError(
            f"{train.table.name} has {_count(train.labels, 'example')}: at least {minimum} are needed "
            "to train and test. Add examples."
        )
    limit = config.max_train_examples
    if limit is not None and limit < max(2, task.num_labels):
        raise UsageError(
            f"--max-train-examples is {limit}, fewer than the {max(2, task.num_labels)} that give one "
            "example of each class. Raise it or leave it out."
        )


def _cut_missing(
    examples: dict[str, _Examples], task: Task, config: DataConfig, notes: list[str]
) -> dict[str, _Examples]:
    """Held-out splits come stratified from the training data; each class keeps an example for training."""
    splits = dict(examples)
    keep_out = 1 if task.kind == "classification" else 2  # one value alone has no slope
    for seed, (role, size) in enumerate(_cut_sizes(splits, keep_out, task, config).items()):
        train = splits["train"]
        strata = _strata(train, task)
        rng = np.random.default_rng([config.seed, seed])
        cut = _stratified_choice(strata, size, keep_out=keep_out, rng=rng)
        rest = np.setdiff1d(np.arange(len(strata)), cut)
        splits[role], splits["train"] = train.take(cut), train.take(rest)
        notes.append(
            f"{role}: {_count(cut, 'example')} cut from the training data, stratified (seed {config.seed})"
        )
    return splits


def _cut_sizes(
    splits: Mapping[str, _Examples], keep_out: int, task: Task, config: DataConfig
) -> dict[str, int]:
    """How many examples to cut for each missing split: where they are few, they are shared fairly."""
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    strata = _strata(splits["train"], task)
    wanted = {
        role: max(1, round(len(strata) * fraction))
        for role, fraction in fractions.items()
        if role not in splits
    }
    num_spare = int(np.sum(np.bincount(strata) - keep_out))
    total = sum(wanted.values())
    if total <= num_spare:
        return wanted
    return {role: max(1, num_spare * size // total) for role, size in wanted.items()}


def _limit(
    splits: dict[str, _Examples], task: Task, config: DataConfig, notes: list[str]
) -> dict[str, _Examples]:
    limits = {"train": config.max_train_examples, "validation": config.max_eval_examples}
    limits["test"] = config.max_eval_examples
    limited = {}
    for seed, (role, limit) in enumerate(limits.items()):
        split = limited[role] = splits[role]
        if limit is not None and limit < len(split.labels):
            rng = np.random.default_rng([config.seed, 10 + seed])
            strata = _strata(split, task)
            chosen = _stratified_choice(strata, limit, at_least=1 if role == "train" else 0, rng=rng)
            limited[role] = split.take(chosen)
            notes.append(f"{role}: {limit} of {len(strata)} examples used, stratified (seed {config.seed})")
    return limited


def _strata(split: _Examples, task: Task) -> np.ndarray:
    if task.kind == "regression":
        return np.zeros(len(split.labels), dtype=np.int64)
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


def _note_overlap(splits: dict[str, _Examples], notes: list[str]) -> None:
    seen = set(_contents(splits["train"]))
    for role in ("validation", "test"):
        same = [1 for content in _contents(splits[role]) if content in seen]
        if same:
            notes.append(
                f"{role}: {_count(same, 'example')} also in the training data, so its score is too good"
            )


def _contents(split: _Examples) -> list[tuple[str, str]]:
    return list(zip(split.texts, split.text_pairs or split.texts, strict=True))


def _to_dataset(split: _Examples, task: Task) -> Dataset:
    columns: dict[str, Any] = {"text": split.texts}
    if split.text_pairs is not None:
        columns["text_pair"] = split.text_pairs
    features = {name: Value("large_string") for name in columns}
    is_regression = task.kind == "regression"
    columns["label"] = [float(label) for label in split.labels] if is_regression else _strata(split, task)
    features["label"] = Value("float64" if is_regression else "int64")
    return Dataset.from_dict(columns, features=Features(features))


# Words for messages -------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _where(table: _Table, row: int) -> str:
    return f"{table.name}, {table.unit} {table.line_of(row)}"


def _lines(table: _Table, rows: Sequence[int]) -> str:
    said = ", ".join(str(table.line_of(row)) for row in rows[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f"{table.unit}{'s' if len(rows) > 1 else ''} {said}{more}"


def _listed(names: Iterable[str]) -> str:
    said = [_short(name) for name in names]
    return ", ".join(said[:8]) + (f" and {len(said) - 8} more" if len(said) > 8 else "")


def _short(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:37] + "...")


def _count(values: Any, singular: str, plural: str | None = None) -> str:
    return f"{len(values)} {singular if len(values) == 1 else plural or singular + 's'}"


def _brief(error: BaseException) -> str:
    """The first line of a library's message: the rest is its advice, not ours."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).strip().rstrip(".")[:200]
