"""Does the evaluation resume, compare on the same rows, write what it says, and refuse bad input in words?"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from peer import benchmark
from peer.benchmark import Score
from peer.model import export_model, load_backbone, load_tokenizer
from scripts import evaluate
from scripts.evaluate import find_datasets, short_names, tokenizer_key
from tests.tiny_models import make_model_dir, make_texts

SIZES = (
    *("--train-examples", "30", "--validation-examples", "16", "--test-examples", "24"),
    *("--finetune-examples", "16", "--few-shot-examples", "8", "--few-shot-draws", "2"),
    *("--few-shot-epochs", "1", "--learning-rates", "1e-3", "--probe-cs", "0.03", "1.0"),
    *("--batch-size", "8", "--max-length", "16", "--use-cpu"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of the same family: a base, and one written by export_model, as a swarm's `model/` is."""
    base = make_model_dir(tmp_path_factory.mktemp("base"))
    layout, _ = load_backbone(base)
    _, other = load_backbone(make_model_dir(tmp_path_factory.mktemp("other"), seed=1))
    fused = tmp_path_factory.mktemp("fused")
    export_model(base, layout, other, fused)
    return base, fused


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("cola", "films", "plays")):
        (directory / name).mkdir()
        for split, num in (("train", 40), ("validation", 16), ("test", 30)):
            texts, labels = make_texts(num, seed=10 * seed + len(split))
            with (directory / name / f"{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    (directory / "notes").mkdir()
    return directory


def run(*arguments: object, sizes: Sequence[str] = SIZES) -> int:
    return evaluate.main([str(argument) for argument in arguments] + list(sizes))


def test_two_models_are_compared_and_all_is_written(
    models: tuple[Path, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, fused = models
    assert run(fused, "--against", base, "--data-dir", data_dir, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    for words in ("films", "matthews", "full finetuning", "wins", "paired bootstrap"):
        assert words in shown
    written = json.loads((tmp_path / "evaluation.json").read_text())
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    num_scores = 2 * 3 * (1 + 2 + 1)  # models, data sets, and probe, two draws, full finetuning
    assert len(written["scores"]) == len(rows) == num_scores
    assert {row["headline"] for row in rows if row["dataset"] == "cola"} == {"matthews"}
    for method, compared in written["comparison"].items():
        gains = []
        for name in ("cola", "films", "plays"):
            metric = "matthews" if name == "cola" else "accuracy"
            values = [
                [
                    float(r[metric])
                    for r in rows
                    if (r["model"], r["dataset"], r["method"]) == (m, name, method)
                ]
                for m in written["models"]
            ]
            gains.append(np.mean(values[0]) - np.mean(values[1]))
        assert compared["num_datasets"] == 3
        assert compared["mean"] == pytest.approx(np.mean(gains), abs=1e-5)
        assert compared["interval"]["low"] <= compared["mean"] <= compared["interval"]["high"]
        assert compared["mean_without_largest"] is None
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    vector = (tmp_path / "evaluation.svg").read_text()
    assert "<svg" in vector
    assert run(fused, "--against", base, "--data-dir", data_dir, "--out", tmp_path) == 0
    assert (tmp_path / "evaluation.svg").read_text() == vector


def test_what_is_done_is_not_done_again(
    models: tuple[Path, Path], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (models[0], "--data-dir", data_dir, "--out", tmp_path, "--methods", "probe", "--no-plot")
    assert run(*command, "--datasets", "films") == 0
    first = (tmp_path / "evaluation.json").read_text()
    (kept,) = tmp_path.glob("films.probe.*.json")
    text = kept.read_text()
    done: list[str] = []
    original = benchmark.Benchmark.probe

    def watched(self: benchmark.Benchmark) -> Score:
        score = original(self)
        done.append(score.dataset)
        return score

    monkeypatch.setattr(benchmark.Benchmark, "probe", watched)
    assert run(*command, "--datasets", "films", "plays") == 0
    assert done == ["plays"]
    assert kept.read_text() == text
    assert run(*command, "--datasets", "films") == 0
    assert done == ["plays"]
    assert (tmp_path / "evaluation.json").read_text() == first
    kept.unlink()
    assert run(*command, "--datasets", "films") == 0
    assert done == ["plays", "films"]
    assert kept.read_text() == text


def test_a_folder_of_other_settings_or_rows_is_refused(
    models: tuple[Path, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(data_dir, tmp_path / "data")
    out = tmp_path / "out"
    command = (
        models[0],
        "--data-dir",
        own,
        "--datasets",
        "films",
        "--methods",
        "probe",
        "--no-plot",
        "--out",
        out,
    )
    assert run(*command) == 0
    assert run(*command, sizes=[*SIZES, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "other settings (seed 0)" in error
    assert "another --out" in error
    lines = (own / "films" / "test.csv").read_text().splitlines()
    (own / "films" / "test.csv").write_text("\n".join(lines[:20]))
    assert run(*command) == 2
    assert "other rows of films" in capsys.readouterr().err
    (kept,) = out.glob("films.probe.*.json")
    kept.write_text("{")
    assert run(*command) == 6
    assert "is broken" in capsys.readouterr().err


def test_without_matplotlib_the_tables_are_there(
    models: tuple[Path, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what an import of a missing module does
    command = (
        models[0],
        "--data-dir",
        data_dir,
        "--datasets",
        "films",
        "--methods",
        "probe",
        "--out",
        tmp_path,
    )
    assert run(*command) == 1
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error
    assert "Traceback" not in error
    assert (tmp_path / "evaluation.csv").is_file()
    assert not (tmp_path / "evaluation.png").exists()
    assert run(*command, "--no-plot") == 0


def test_without_a_folder_there_is_the_table_alone(
    models: tuple[Path, Path], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models[0], "--data-dir", data_dir, "--datasets", "plays", "films", "--methods", "probe") == 0
    shown = capsys.readouterr().out
    assert "mean" in shown
    assert "Tables" not in shown


def test_tokenizers_are_known_by_what_they_do(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, fused = (load_tokenizer(model) for model in models)
    assert tokenizer_key(base) == tokenizer_key(fused)
    key = tokenizer_key(base)
    base(["a film"], truncation=True, max_length=8, padding="max_length")
    assert tokenizer_key(base) == key  # a call leaves its settings in the tokenizer
    fused.add_tokens(["film"])
    assert tokenizer_key(fused) != key


def test_names_stay_apart_when_they_are_cut() -> None:
    assert short_names(["packaged", "mine/model"]) == ["packaged", "mine/model"]
    one, other = short_names(["/home/somebody/with/long/folders/first/model", "x" * 60])
    assert one == "…with/long/folders/first/model"
    assert other == "…" + "x" * 29
    assert short_names(["a" + "x" * 60, "b" + "x" * 60]) == ["1: …" + "x" * 29, "2: …" + "x" * 29]


def test_data_sets_are_found(data_dir: Path) -> None:
    assert find_datasets(data_dir, None) == ["cola", "films", "plays"]
    assert find_datasets(data_dir, ["plays", "cola", "plays"]) == ["plays", "cola"]


# ---- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["{base}", "--data-dir", "{data}/missing"], 3, "no such folder"),
        (["{base}", "--data-dir", "{data}/notes"], 3, "holds no data set"),
        (
            ["{base}", "--data-dir", "{data}", "--datasets", "films", "sst3"],
            3,
            "no data set sst3; it has: cola",
        ),
        (["{data}/nothing", "--data-dir", "{data}"], 4, "no model directory"),
        (["{data}", "--data-dir", "{data}"], 4, "holds no tokenizer"),
        (["{base}", "--against", "{base}", "--data-dir", "{data}"], 2, "the model itself"),
        (["{base}", "--data-dir", "{data}", "--seed", "-1"], 2, "--seed -1"),
        (["packaged", "--data-dir", "{data}", "--revision", "x"], 2, "--revision x is of a model on the hub"),
        (["{base}", "--data-dir", "{data}", "--revision", "x"], 2, "--revision x is of a model on the hub"),
        (["{base}", "--data-dir", "{data}", "--out", "{data}/films/train.csv"], 6, "cannot be made"),
    ],
)
def test_bad_input_ends_in_words(
    arguments: list[str],
    exit_code: int,
    message: str,
    models: tuple[Path, Path],
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(base=models[0], data=data_dir) for argument in arguments]
    assert run(*given) == exit_code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\ngood film\nbad film\n", "which column is the label is not clear"),
        ("text,label\ngood film,1\n,\n", "label"),
        ("text,label\n", "empty"),
        ("text,label\ngood,1\nfine,1\ngreat,1\nlovely,1\n", "one class only"),
    ],
)
def test_a_broken_data_set_is_told_before_anything_is_spent(
    content: str, message: str, models: tuple[Path, Path], data_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(data_dir / "films", tmp_path / "data" / "films")
    (tmp_path / "data" / "poems").mkdir()
    (tmp_path / "data" / "poems" / "train.csv").write_text(content)
    out = tmp_path / "out"
    assert run(models[0], "--data-dir", tmp_path / "data", "--out", out) == 3
    error = capsys.readouterr().err
    assert message in error
    assert "train.csv" in error
    assert "Traceback" not in error
    assert [file.name for file in out.iterdir()] == ["settings.json"]


def test_a_broken_model_is_told(
    models: tuple[Path, Path], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(models[0], tmp_path / "model")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert run(models[0], "--against", broken, "--data-dir", data_dir) == 4
    error = capsys.readouterr().err
    assert "does not load" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("wrong", [["--methods", "magic"], ["--train-examples", "0"], ["--probe-cs", "-1"]])
def test_wrong_flags_are_refused(
    wrong: list[str], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("packaged", "--data-dir", data_dir, *wrong, sizes=[])
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err
