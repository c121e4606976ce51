"""Does the entry point refuse what was said against the run that its directory holds?"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import start
from tests.fakes import make_spec

NO_MODEL = 4  # exit code: nothing was said against the run, and its model is nowhere


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    spec = make_spec(num_rounds=5, round_examples=100, seed=3, outer_lr=0.5, model="/nowhere/tiny")
    (tmp_path / "run.toml").write_text(spec.to_toml())
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--rounds", "30"), "num_rounds"),  # 30, 4096 and 0 are the defaults of a new run
        (("--round-examples", "4096"), "round_examples"),
        (("--seed", "0"), "seed"),
        (("--outer-lr", "1"), "outer_lr"),
        (("--revision", "main"), "revision"),
        (("--model", "other"), "model"),
    ],
)
def test_another_run_is_not_served_again(
    run_dir: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], key: str
) -> None:
    assert start.main(["--output-dir", str(run_dir), *flags]) == 2
    assert f"with another {key};" in capsys.readouterr().err


def test_what_a_spec_file_says_counts_as_said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "wanted.toml").write_text("num_rounds = 30\nseed = 3\n")
    flags = ["--output-dir", str(run_dir), "--spec", str(run_dir / "wanted.toml")]
    assert start.main(flags) == 2
    assert "with another num_rounds;" in capsys.readouterr().err
    assert start.main([*flags, "--rounds", "5", "--seed", "1"]) == 2  # a flag beats the file
    assert "with another seed;" in capsys.readouterr().err


def test_the_same_run_is_served_again(run_dir: Path) -> None:
    assert start.main(["--output-dir", str(run_dir)]) == NO_MODEL
    said = ["--rounds", "5", "--round-examples", "100", "--seed", "3", "--outer-lr", "0.5"]
    assert start.main(["--output-dir", str(run_dir), *said]) == NO_MODEL
    assert start.main(["--output-dir", str(run_dir), "--spec", str(run_dir / "run.toml")]) == NO_MODEL


def test_a_seed_that_is_not_said_is_0() -> None:
    values = start._values(start._parse(["--model", "x"]))
    assert [values[key] for key in ("seed", "num_rounds", "round_examples")] == [0, 30, 4096]
