"""Does the benchmark of one exchange measure real processes, and print what it measured?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from coordinator.errors import SwarmError
from scripts.bench_fusion import fitting_values, main


def test_as_many_values_as_there_is_memory_for() -> None:
    gigabytes = 10**9
    assert fitting_values(22_700_000, 4, True, 24 * gigabytes) == 22_700_000
    # (0.85 * 24 GB / 16 - 0.45 GB) / 60 bytes
    assert fitting_values(22_700_000, 16, False, 24 * gigabytes) == 13_750_000
    # (0.85 * 24 GB / 8 - 0.9 GB) / 105 bytes
    assert fitting_values(22_700_000, 8, True, 24 * gigabytes) == 15_714_285
    with pytest.raises(SwarmError, match=r"16 peers need more than the 8\.0 GB"):
        fitting_values(100, 16, False, 8 * gigabytes)


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
    if sys.platform == "linux":  # headers come on top, and what else this machine says to itself
        assert all(row["wire_mb"] > 0.95 * row["sent_mb"] for row in rows.values())
    assert (tmp_path / "fusion.png").stat().st_size > 1000
    assert "CPU-s/peer" in capsys.readouterr().out
