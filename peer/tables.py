"""How is a file, folder or hub data set of examples read, with the line of whatever is wrong?

Everything is read into memory; no file of the person is changed, and no cache file of private
data is written anywhere. Whatever cannot be read raises a DataError that says where and why.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features
from huggingface_hub import HfApi
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its export for downstream libraries

from coordinator.errors import DataError

HUB_TIMEOUT_SECONDS = 10.0  # until the hub must have answered that the data set exists

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_JSON_LINES_HINT = 'JSON lines hold one object per line, such as {"text": "...", "label": "..."}.'
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_END = "\0"  # a line after the last; no text holds it


@dataclass(frozen=True)
class Table:
    name: str  # what a message calls it: the path, or the data set and its split
    columns: tuple[str, ...]
    num_rows: int
    values: Callable[[str], list[Any]]  # of one column, in the types of the file
    lines: Sequence[int] | None = None  # where each row begins, counted from 1; None: there are only rows
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ClassLabel columns
    may_lack_labels: bool = False  # a published data set, whose test labels are often withheld

    def read(self, column: str) -> list[str]:
        """One column as strings: "" where there is no value, class names for their ids.

        Raises DataError for values that are neither texts nor numbers.
        """
        values = self.values(column)
        names = self.class_names.get(column)
        if names is not None:  # -1 is how `datasets` says "no label"
            values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]
        strings = []
        for row, value in enumerate(values):
            try:
                strings.append(_as_string(value))
            except ValueError as error:
                raise DataError(f"{self.name}, {self.place([row])}, column '{column}': {error}") from error
        return strings

    def place(self, rows: Sequence[int]) -> str:
        """ "lines 3, 4, 7 and 2 more" for rows counted from 0."""
        unit = "row" if self.lines is None else "line"
        said = ", ".join(str(row + 1 if self.lines is None else self.lines[row]) for row in rows[:3])
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        return f"{unit}{'s' if len(rows) > 1 else ''} {said}{more}"


Source = Mapping[str, Callable[[], Table]]  # by split name; "" for a single table


def open_source(data: str, dataset_config: str | None = None) -> Source:
    """The tables of a file, a folder of split files, a folder written by save_to_disk, or a hub data set.

    `dataset_config` is of a hub data set. A file is read when its table is asked for.
    """
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
    return _open_hub(data, dataset_config)


def listed(names: Iterable[str]) -> str:
    said = [short(name) for name in names]
    return ", ".join(said[:8]) + (f" and {len(said) - 8} more" if len(said) > 8 else "")


def short(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:37] + "...")


def _looks_like_a_path(data: str) -> bool:
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", data) is not None
    return not is_hub_id or re.search(r"\.[A-Za-z]{2,8}[0-9]?$", data) is not None


def _as_string(value: Any) -> str:
    if isinstance(value, str):
        if _HALF_CHARACTER.search(value):
            raise ValueError(
                "half of a surrogate pair (such as \\ud83d alone), which is no character. "
                "Write the escaped character in full."
            )
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of integers with a gap comes as 1.0
    if isinstance(value, (int, float)):
        return str(value)
    raise ValueError(
        f"a {type(value).__name__}, where a text or a number is needed. Write one text and one label per "
        "example (join a list of words to one text), or name another column."
    )


# Folders and the hub ------------------------------------------------------------------------------


def _open_folder(path: Path) -> Source:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return _open_saved(path)
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() not in _SUFFIXES or not file.is_file():
            continue
        if file.stem in files:
            raise DataError(
                f"{path} holds {listed([files[file.stem].name, file.name])}, so which one is the split "
                f"'{file.stem}' is not clear. Move the others away, or give the file itself."
            )
        files[file.stem] = file
    if not files:
        raise DataError(
            f"The folder {path} holds no data file ({', '.join(_SUFFIXES)}) and was not written by "
            "datasets.save_to_disk. Name the splits train.csv, validation.csv and test.csv, or give a file."
        )
    return {split: partial(_read_file, file) for split, file in files.items()}


def _open_saved(path: Path) -> Source:
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


def _open_hub(name: str, dataset_config: str | None) -> Source:
    """A public data set stays where the hub's own cache puts it: it is not private."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            # One request with a timeout: load_dataset alone repeats for 23 s and more before it gives up.
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
        loaded = datasets.load_dataset(name, dataset_config)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"There is no file or folder {name} here, and the hub data set of that name cannot be reached or "
            f"loaded ({_brief(error)}). Check the name, --dataset-config, --split and the network, set "
            "HF_HUB_OFFLINE=1 to use a copy in the cache of the hub, or give a local file."
        ) from error
    return {
        str(s): partial(_table_of_dataset, part, f"{name}, split '{s}'", may_lack_labels=True)
        for s, part in loaded.items()
    }


def _table_of_dataset(dataset: Dataset, name: str, *, may_lack_labels: bool = False) -> Table:
    arrow = dataset.with_format("arrow")
    return Table(
        name=name,
        columns=tuple(dataset.column_names),
        num_rows=len(dataset),
        values=partial(_arrow_values, lambda column: arrow.select_columns([column])[:], name),
        class_names=_class_names(dataset.features),
        may_lack_labels=may_lack_labels,
    )


# Files --------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    line: int  # on which it begins
    values: list[str]


def _read_file(path: Path) -> Table:
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
    text = _decode(content, path)
    if suffix in (".csv", ".tsv"):
        return _read_separated(text, path, "\t" if suffix == ".tsv" else ",")
    return _read_json_lines(text, path)


def _decode(content: bytes, path: Path) -> str:
    advice = f"Save the file as UTF-8 (for example: iconv -f {_likely(content)} -t UTF-8 FILE > NEW)."
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, byte = _line_at(content, error.start), content[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{byte:02x} is not valid UTF-8. {advice}") from error
    if not text.strip(" \t\r\n"):
        raise DataError(f"{path} is empty. Give a file with a header and one example per line.")
    if "\0" in text:
        line = _line_at(content, content.index(b"\0"))
        raise DataError(
            f"{path}, line {line}: a zero byte, so this is not UTF-8 text (UTF-16, perhaps?). {advice}"
        )
    return text


def _likely(content: bytes) -> str:
    """What it is where it is not UTF-8, in iconv's words."""
    if content.startswith(_UTF16_MARKS):
        return "UTF-16"
    if b"\0" in content[:2]:  # beside a letter of ASCII
        return "UTF-16BE" if content[0] == 0 else "UTF-16LE"
    return "LATIN1"


def _line_at(content: bytes, position: int) -> int:
    return 1 + len(re.findall(rb"\r\n|\r|\n", content[:position]))


def _read_separated(text: str, path: Path, separator: str) -> Table:
    """All values are strings: neither "NA" nor "007" is turned into something else."""
    records = _parse(text, separator, csv.QUOTE_MINIMAL)
    if separator == "\t" and _has_plain_quotes(records):
        records = _parse(text, separator, csv.QUOTE_NONE)
    _check_records(records, path, separator)
    header = [name.strip() for name in records[0].values]
    _check_names([name for name in header if name], str(path), "line 1")
    examples = [record for record in records[1:-1] if any(record.values)]  # blank lines are no examples
    if not examples:
        raise DataError(f"{path} is empty below its header (line 1). Add one example per line.")

    def values(column: str) -> list[str]:
        place = header.index(column)
        return ["".join(record.values[place : place + 1]) for record in examples]  # some records are shorter

    return Table(
        name=str(path),
        columns=tuple(name for name in header if name),  # a nameless one is pandas' row index
        num_rows=len(examples),
        values=values,
        lines=[record.line for record in examples],
    )


def _parse(text: str, separator: str, quoting: Any) -> list[_Record]:
    """The header, the other records, and at last the one of _END: it is missing if a quotation is open."""
    csv.field_size_limit(sys.maxsize)  # instead of 131,072 characters
    rows = chain(io.StringIO(text, newline=""), [_END])
    reader = csv.reader(rows, delimiter=separator, quoting=quoting)
    records, line = [], 1
    for values in reader:
        records.append(_Record(line, values))
        line = reader.line_num + 1
    return records


def _has_plain_quotes(records: Sequence[_Record]) -> bool:
    """Many published TSV files (GLUE) use a quotation mark as a plain character, which swallows lines."""
    is_open = records[-1].values != [_END]
    return is_open or any("\t" in value and "\n" in value for record in records for value in record.values)


def _check_records(records: Sequence[_Record], path: Path, separator: str) -> None:
    num_fields = len(records[0].values)
    if not any(name.strip() for name in records[0].values):
        raise DataError(f"{path}, line 1 is blank. Begin the file with a header that names the columns.")
    for line, values in records:
        if len(values) > num_fields:
            name = "tab" if separator == "\t" else "comma"
            raise DataError(
                f"{path}, line {line}: {len(values)} fields where the header has {num_fields}. Put a text "
                f'that holds a {name} in double quotes ("..."), or check that {name}s separate the columns.'
            )
    if records[-1].values != [_END]:
        raise DataError(
            f"{path}, line {records[-1].line}: a quotation mark opens here and is never closed. Close it, or "
            'write "" for a quotation mark inside a quoted text.'
        )


def _read_json_lines(text: str, path: Path) -> Table:
    records, lines = [], []
    # Not splitlines(): JSON allows U+2028 and its like inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append(_parse_json_line(line, f"{path}, line {number}"))
            lines.append(number)
    return Table(
        name=str(path),
        columns=tuple(dict.fromkeys(name for record in records for name in record)),
        num_rows=len(records),
        values=lambda column: [record.get(column) for record in records],
        lines=lines,
    )


def _parse_json_line(line: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([name for name, _ in pairs], where, "one object", what="key")
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({_brief(error)}). {_JSON_LINES_HINT}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not an object. {_JSON_LINES_HINT}")
    return record


def _read_parquet(path: Path) -> Table:
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        # `datasets` writes its types, ClassLabel among them, into the metadata.
        is_ours = b"huggingface" in (schema.metadata or {})
        class_names = _class_names(Features.from_arrow_schema(schema)) if is_ours else {}
    except (ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({_brief(error)}). Write it again."
        ) from error
    _check_names(schema.names, str(path), "its schema")

    def read(column: str) -> pa.Table:
        with pq.ParquetFile(path) as file:
            return file.read(columns=[column])

    return Table(
        name=str(path),
        columns=tuple(schema.names),
        num_rows=num_rows,
        values=partial(_arrow_values, read, str(path)),
        class_names=class_names,
    )


def _arrow_values(read: Callable[[str], pa.Table], name: str, column: str) -> list[Any]:
    try:
        return list(read(column).column(column).to_pylist())
    except (OSError, ValueError, pa.ArrowException) as error:  # of which UnicodeDecodeError is one, too
        raise DataError(
            f"{name}: column '{column}' cannot be read ({_brief(error)}). Write the file again."
        ) from error


def _class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(f.names) for name, f in features.items() if isinstance(f, ClassLabel)}


def _check_names(names: Sequence[str], name: str, where: str, what: str = "column") -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{name}: the {what} {listed(twice)} occurs more than once in {where}, so which one is meant is "
            "not clear. Rename or remove one."
        )


def _brief(error: BaseException) -> str:
    """The first line of a library's message: the rest is its advice, not ours."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).strip().rstrip(".")[:200]
