"""What a person sees for each kind of bad data: the message and the exit code of peer.join.

    python -m scripts.bad_input

Each bad file is made in a temporary folder and given to a real `python -m peer.join`. Data is
checked before the model and the network, so neither is needed. Ends with 1 if any case does not
end with the exit code of a DataError and a readable message.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import pandas as pd

from coordinator.errors import DataError

TIMEOUT_SECONDS = 180
_GOOD_ROWS = ("fine film,good", "poor film,bad") * 6


@dataclass(frozen=True)
class BadFile:
    name: str  # what is wrong, in a few words
    arguments: tuple[str, ...]  # flags of peer.join, --data first
    why: tuple[str, ...]  # what the message must say: the place, the culprit


@dataclass(frozen=True)
class Outcome:
    bad_file: BadFile
    exit_code: int
    message: str  # all that was printed, on one line

    @property
    def is_right(self) -> bool:
        is_said = all(part in self.message for part in self.bad_file.why)
        return self.exit_code == DataError.exit_code and is_said and "Traceback" not in self.message


def bad_files(directory: Path) -> list[BadFile]:
    """Write every kind of bad data into `directory`; needs neither a model nor a network."""
    return [
        *_bad_files_as_such(directory),
        *_bad_tables(directory),
        *_bad_columns(directory),
        *_bad_labels(directory),
        *_bad_splits(directory),
    ]


def main() -> int:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        cases = bad_files(Path(folder))
        outcomes = []
        with ThreadPoolExecutor(max_workers=2) as pool:
            for outcome in pool.map(lambda i: _join(cases[i], Path(folder) / f"out_{i}"), range(len(cases))):
                outcomes.append(outcome)
                _print(outcome, folder)
    num_right = sum(outcome.is_right for outcome in outcomes)
    print(f"{num_right} of {len(outcomes)} end with exit code {DataError.exit_code} and say what is wrong")
    return 0 if num_right == len(outcomes) else 1


def _print(outcome: Outcome, folder: str) -> None:
    print(f"{'ok  ' if outcome.is_right else 'FAIL'}  exit {outcome.exit_code:>3}  {outcome.bad_file.name}")
    message = textwrap.fill(outcome.message.replace(folder, "DIR"), 90)
    print(textwrap.indent(message, " " * 16), flush=True)


def _join(case: BadFile, output_dir: Path) -> Outcome:
    command = [sys.executable, "-m", "peer.join", "--model", "not-needed", "--output-dir", str(output_dir)]
    try:
        done = subprocess.run(
            [*command, *case.arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(case, -1, f"did not end within {TIMEOUT_SECONDS} seconds")
    return Outcome(case, done.returncode, " ".join((done.stdout + done.stderr).split()))


# The cases ----------------------------------------------------------------------------------------


def _bad_files_as_such(directory: Path) -> Iterator[BadFile]:
    yield _case("missing file", directory / "missing.csv", "no file", "missing.csv")
    yield _case("missing folder", directory / "missing" / "folder", "no file or folder")
    yield _case("unknown format", _write(directory / "data.xlsx", b"PK"), "'.xlsx'", "not known")
    yield _case("empty file", _write(directory / "empty.csv", b""), "is empty")
    yield _case("blank file", _write(directory / "blank.jsonl", b"\n \n"), "is empty")
    yield _case("header only", _write(directory / "header.csv", b"text,label\n"), "empty below its header")
    latin = _csv_bytes("fine film,good", "poor film,bad") + "café,good\n".encode("latin-1")
    yield _case("undecodable bytes", _write(directory / "latin.csv", latin), "line 4", "0xe9", "UTF-8")
    latin = b'{"text": "fine", "label": 0}\n{"text": "caf\xe9", "label": 1}\n'
    yield _case("undecodable JSON lines", _write(directory / "latin.jsonl", latin), "line 2", "0xe9")
    utf16 = _csv_bytes(*_GOOD_ROWS).decode().encode("utf-16")
    yield _case("UTF-16", _write(directory / "utf16.csv", utf16), "line 1", "0xff", "UTF-8")
    zeros = _csv_bytes("fine\0film,good")
    yield _case("zero byte", _write(directory / "zero.csv", zeros), "line 2", "zero byte")
    folder = directory / "no_data"
    folder.mkdir()
    yield _case("folder without data", folder, "holds no data file")
    yield _case("hub data set not reachable", "no-such-owner/no-such-data-set", "hub data set")


def _bad_tables(directory: Path) -> Iterator[BadFile]:
    wide = _write_csv(directory / "wide.csv", '"a text\nof two lines",good', "a, b, c,bad", *_GOOD_ROWS)
    yield _case("more fields than the header", wide, "line 4", "4 fields", "2")
    quote = _write_csv(directory / "quote.csv", "fine film,good", '"poor film,bad', "fine,good")
    yield _case("quotation mark never closed", quote, "line 3", "never closed")
    torn = _write(directory / "torn.jsonl", b'{"text": "a", "label": 0}\n\n{"text": "b", "la\n')
    yield _case("corrupt JSON lines", torn, "line 3", "not valid JSON")
    array = _write(directory / "array.json", b'[{"text": "a", "label": 0}]\n')
    yield _case("JSON array", array, "line 1", "list", "one object per line")
    twice = _write(directory / "twice.jsonl", b'{"text": "a", "label": 0, "label": 1}\n')
    yield _case("key twice in JSON lines", twice, "line 1", "'label'", "more than once")
    words: list[dict[str, object]] = [{"text": ["a", "b"], "label": 0}, {"text": ["c"], "label": 1}]
    yield _case(
        "lists as texts", _write_json_lines(directory / "lists.jsonl", words), "line 1", "'text'", "list"
    )
    half = [{"text": "fine", "label": 0}, {"text": "\ud83d", "label": 1}]
    yield _case("half a character", _write_json_lines(directory / "half.jsonl", half), "line 2", "surrogate")
    rest = _write(directory / "rest.parquet", b"PAR1 and then nothing of use PAR1")
    yield _case("corrupt Parquet", rest, "rest.parquet", "not a readable Parquet")
    cut = directory / "cut.parquet"
    pd.DataFrame({"text": ["a", "b"] * 6, "label": [0, 1] * 6}).to_parquet(cut)
    cut.write_bytes(b"PAR1" + b"\xff" * 60 + cut.read_bytes()[64:])
    yield _case("damaged Parquet column", cut, "cut.parquet", "column 'text'", "cannot be read")
    saved = directory / "saved"
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(saved)
    next(saved.glob("*.arrow")).write_bytes(b"garbage")
    yield _case("damaged save_to_disk folder", saved, "save_to_disk", "cannot be read")


def _bad_columns(directory: Path) -> Iterator[BadFile]:
    good = _write_csv(directory / "good.csv", *_GOOD_ROWS)
    yield _case("missing column", good, "'text', 'label'", "--text-column body", **{"--text-column": "body"})
    yield _case("missing label column", good, "--label-column stars", **{"--label-column": "stars"})
    headless = _write(directory / "headless.csv", "\n".join(_GOOD_ROWS).encode())
    yield _case("no header", headless, "the label", "--label-column", "'fine film'")
    semicolons = _write(directory / "semicolons.csv", b"text;label\nfine;good\npoor;bad\n")
    yield _case("semicolons", semicolons, "'text;label'", "else than commas")
    twice = _write(directory / "twice.csv", b"text,label,label\nfine,good,bad\n")
    yield _case("column twice", twice, "'label'", "more than once", "line 1")
    unclear = _write(directory / "unclear.csv", b"review,headline,label\nfine,a,good\n")
    yield _case("text column not clear", unclear, "'review', 'headline'", "--text-column")
    yield _case(
        "text as label", good, "different columns", **{"--text-column": "label", "--label-column": "label"}
    )
    rows = ["  ,good", ",bad"] * 6
    yield _case("all texts empty", _write_csv(directory / "no_text.csv", *rows), "'text'", "are empty")
    pairs = _write(directory / "pairs.csv", b"premise,hypothesis,label\na,,0\nb,,1\nc,,0\nd,,1\n")
    yield _case("all second texts empty", pairs, "'premise', 'hypothesis'", "are empty")


def _bad_labels(directory: Path) -> Iterator[BadFile]:
    one = _write_csv(directory / "one_class.csv", *["fine film,good"] * 6)
    yield _case("one class only", one, "one class only", "'good'")
    rare = _write_csv(directory / "rare.csv", *_GOOD_ROWS, "so so,average")
    yield _case("one example of a class", rare, "line 14", "fewer than two", "'average'")
    gaps = _write_csv(directory / "gaps.csv", *_GOOD_ROWS, "so so,", "well,nan")
    yield _case("missing labels", gaps, "lines 14, 15", "no label", "2 of 14")
    nulls: list[dict[str, object]] = [
        {"text": "a", "label": 0},
        {"text": "b", "label": None},
        {"text": "c", "label": float("nan")},
    ]
    yield _case(
        "null and NaN labels", _write_json_lines(directory / "nulls.jsonl", nulls), "lines 2, 3", "no label"
    )
    parquet = directory / "nan.parquet"
    pd.DataFrame({"text": list("abcd"), "label": [0.0, None, 1.0, 1.0]}).to_parquet(parquet)
    yield _case("NaN labels in Parquet", parquet, "row 2", "no label")
    none = _write_csv(directory / "none.csv", "a,0", "b,1", "c,NA", "d,NA", "e,0", "f,1")
    yield _case("NA among numbers", none, "lines 4, 5", "'NA'")
    words = _write_csv(directory / "words.csv", "a,0.5", "b,high", "c,1.5", "d,2.5")
    regression = {"--task": "regression"}
    yield _case("regression on words", words, "line 3", "'high'", "not a finite number", **regression)
    infinite = _write_csv(directory / "infinite.csv", "a,0.5", "b,1e999", "c,1.5", "d,2.5")
    yield _case("infinite target", infinite, "line 3", "'1e999'", **regression)
    constant = _write_csv(directory / "constant.csv", *["a,0.5"] * 6)
    yield _case("constant target", constant, "'0.5'", "nothing to learn", **regression)
    few = _write_csv(directory / "few.csv", "a,0.5", "b,0.7", "c,1.5")
    yield _case("too few examples", few, "3 examples", "at least 4", **regression)
    scale = _write_csv(directory / "scale.csv", *[f"text {i},{i}" for i in range(40)])
    yield _case("a scale taken for classes", scale, "fewer than two", "--task regression")


def _bad_splits(directory: Path) -> Iterator[BadFile]:
    good = directory / "good.csv"
    strange = _write_csv(directory / "strange.csv", "fine,good", "hm,average")
    expected = ("strange.csv", "line 3", "training data lacks", "'average'")
    yield _case("unknown label in validation", good, *expected, **{"--validation-data": str(strange)})
    yield _case("unknown label in test", good, *expected, **{"--test-data": str(strange)})
    other = _write(directory / "other.csv", b"body,label\nfine,good\n")
    columns = "'body', 'label'"
    yield _case(
        "missing column in validation",
        good,
        "other.csv",
        "'text'",
        columns,
        **{"--validation-data": str(other)},
    )
    missing = str(directory / "missing.csv")
    yield _case("missing test file", good, "missing.csv", "no file", **{"--test-data": missing})
    folder = directory / "folder"
    folder.mkdir()
    _write_csv(folder / "test.csv", *_GOOD_ROWS)
    _write_csv(folder / "all.csv", *_GOOD_ROWS)
    yield _case("folder without train file", folder, "no split 'train'", "'all', 'test'", "--split")
    yield _case("split of a single file", good, "--split", "leave", **{"--split": "train"})


def _case(name: str, data: Path | str, *why: str, **flags: str) -> BadFile:
    arguments = [part for flag, value in flags.items() for part in (flag, value)]
    return BadFile(name, ("--data", str(data), *arguments), why)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _csv_bytes(*rows: str) -> bytes:
    return "".join(f"{row}\n" for row in ("text,label", *rows)).encode()


def _write_csv(path: Path, *rows: str) -> Path:
    return _write(path, _csv_bytes(*rows))


def _write_json_lines(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    return _write(path, "".join(json.dumps(record) + "\n" for record in records).encode())


if __name__ == "__main__":
    sys.exit(main())
