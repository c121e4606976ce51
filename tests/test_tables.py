"""Does every source give the same table, and every row the line that an editor shows for it?"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub.constants
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from coordinator.errors import DataError
from peer import tables
from peer.tables import Table, open_source


def save(frame: pd.DataFrame, path: Path) -> Path:
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case ".parquet":
            frame.to_parquet(path)
        case _:
            Dataset.from_pandas(frame).save_to_disk(path)
    return path


def table(path: Path) -> Table:
    return open_source(str(path))[""]()


def table_of(path: Path, content: str) -> Table:
    path.write_bytes(content.encode())
    return table(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "saved"])
def test_every_format_gives_the_same_strings(tmp_path: Path, name: str) -> None:
    texts = ['a "quoted", text\nof two lines, café 🎬 \u2028', "NA", "007"]
    read = table(save(pd.DataFrame({"text": texts, "label": [1, 0, 1]}), tmp_path / name))
    assert (read.columns, read.num_rows) == (("text", "label"), 3)
    assert read.read("text") == texts
    assert read.read("label") == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("encoding", "advised"),
    [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16BE"), ("utf-16-le", "UTF-16LE"), ("latin1", "LATIN1")],
)
def test_the_advice_mends_a_file_that_is_not_utf8(tmp_path: Path, encoding: str, advised: str) -> None:
    """`utf-16` writes a byte-order mark, as spreadsheets do."""
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,1\n".encode(encoding))
    with pytest.raises(DataError, match=f"iconv -f {advised} -t UTF-8"):
        table(tmp_path / "a.csv")


def test_a_gap_is_an_empty_string_and_changes_no_integer(tmp_path: Path) -> None:
    read = table(
        save(pd.DataFrame({"label": [1, None, 0.5], "text": ["a", None, "b"]}), tmp_path / "a.parquet")
    )
    assert read.read("label") == ["1", "", "0.5"]
    assert read.read("text") == ["a", "", "b"]


def test_class_names_are_kept_in_their_order(tmp_path: Path) -> None:
    features = Features({"label": ClassLabel(names=["worst", "best"]), "text": Value("string")})
    made = Dataset.from_dict({"label": [1, 0, -1], "text": ["a", "b", "c"]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")  # the names travel in the metadata of the file
    DatasetDict(train=made).save_to_disk(tmp_path / "saved")
    for read in (table(tmp_path / "a.parquet"), open_source(str(tmp_path / "saved"))["train"]()):
        assert read.class_names == {"label": ("worst", "best")}
        assert read.read("label") == ["best", "worst", ""]


def test_a_json_text_may_hold_a_line_separator_as_it_is(tmp_path: Path) -> None:
    record = json.dumps({"text": "one\u2028two\x85"}, ensure_ascii=False)
    assert table_of(tmp_path / "a.jsonl", f"{record}\n{record}\n").read("text") == ["one\u2028two\x85"] * 2


@pytest.mark.parametrize("last", ['"again\t1', '"again" and\t1'])
def test_a_tsv_with_plain_quotation_marks_is_read_as_it_is(tmp_path: Path, last: str) -> None:
    lines = ['"quoted at the start only\t1', "plain\t0", last, 'in the "middle" of\t0']
    read = table_of(tmp_path / "a.tsv", "\n".join(["sentence\tlabel", *lines]))
    assert read.read("sentence") == [line.split("\t")[0] for line in lines]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_an_editor_counts(tmp_path: Path, end: str) -> None:
    lines = ["\ufefftext,label", '"one', 'two",good', "", "three,bad", "four", "five,good"]
    read = table_of(tmp_path / "a.csv", end.join(lines))
    assert read.read("text") == [f"one{end}two", "three", "four", "five"]
    assert read.read("label") == ["good", "bad", "", "good"]  # a record may end early
    assert read.place([0]) == "line 2"
    assert read.place([0, 1, 2, 3]) == "lines 2, 5, 6 and 1 more"


def test_json_lines_count_blank_lines_and_parquet_counts_rows(tmp_path: Path) -> None:
    assert table_of(tmp_path / "a.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n').place([1]) == "line 4"
    assert table(save(pd.DataFrame({"text": ["a", "b"]}), tmp_path / "a.parquet")).place([1]) == "row 2"


def test_a_text_may_be_very_long(tmp_path: Path) -> None:
    long = "word " * 100_000  # the csv module stops at 131,072 characters unless told otherwise
    assert table_of(tmp_path / "a.csv", f"text,label\n{long},0\n").read("text") == [long]


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    save(pd.DataFrame({"text": ["a"]}), tmp_path / "train.csv")
    save(pd.DataFrame({"text": ["a"]}), tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"'train.csv', 'train.jsonl'"):
        open_source(str(tmp_path))


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tables, "HUB_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(DataError, match="cannot be reached") as caught:
            open_source("someone/something")
    assert time.monotonic() - start < 5
    assert "someone/something" in str(caught.value)
