"""Does the benchmark of one exchange measure real processes, and print what it measured?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench_fusion import main


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_peers_and_two_codecs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--peers", "2", "--codecs", "fp32", "int8", "--repeats", "1", "--values", "100000"]
    assert main([*flags, "--stock-up-to", "0", "--out", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "fusion.json").read_text())["rows"]}
    assert set(rows) == {"gloo", "fp32", "int8"}
    assert all(row["is_identical"] for row in rows.values())
    assert rows["fp32"]["error"] < 1e-6 < rows["int8"]["error"] < 0.02
    assert 0.25 < rows["int8"]["sent_mb"] / rows["fp32"]["sent_mb"] < 0.35
    assert (tmp_path / "fusion.png").stat().st_size > 1000
    assert "CPU-s/peer" in capsys.readouterr().out
