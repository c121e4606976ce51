"""Does the study of compression follow the rounds of a real session, feedback included?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coordinator.errors import UsageError
from peer.compression import CODECS
from peer.layout import make_manifest
from peer.model import load_backbone
from peer.parts import PartGrid
from scripts import compression_rounds
from scripts.compression_rounds import Line, Swarm
from scripts.local_peers import LocalPeer, load_tasks
from tests.test_byzantine import SIZES, data_dir, encoder

__all__ = ["data_dir", "encoder"]  # fixtures


def through(codec: str, values: torch.Tensor) -> torch.Tensor:
    """What arrives of a vector."""
    grid, coder = PartGrid(values.numel()), CODECS[codec]
    parts = [values[slice(*grid.bounds(part))] for part in range(grid.num_parts)]
    return torch.cat([coder.decode(coder.encode(part.clone()), part.numel()) for part in parts])


@pytest.mark.parametrize("has_feedback", [True, False])
def test_two_rounds_with_feedback_at_both_ends(encoder: Path, data_dir: Path, has_feedback: bool) -> None:
    base, tasks = load_backbone(encoder), load_tasks(data_dir, "abc", SIZES, 0)
    peers = [LocalPeer(name, tasks[name], encoder, base, SIZES, i) for i, name in enumerate("abc")]
    generator = torch.Generator().manual_seed(5)
    rounds = [[torch.randn(base[1].numel(), generator=generator) for _ in peers] for _ in range(2)]
    swarm = Swarm(Line("int4", has_feedback), peers, base)
    state, sent_residual, own_residual = base[1], [torch.zeros(())] * 3, torch.zeros(())
    for round_, deltas in enumerate(rounds, start=1):
        state_hash = swarm.round(round_, [delta.clone() for delta in deltas])
        sums = [delta + residual for delta, residual in zip(deltas, sent_residual, strict=True)]
        arrived = [through("int4", values) for values in sums]
        total = ((arrived[0] + arrived[1]) + arrived[2]) / 3 + own_residual
        state = state + through("int4", total)
        if has_feedback:
            sent_residual = [values - got for values, got in zip(sums, arrived, strict=True)]
            own_residual = total - through("int4", total)
        assert torch.equal(swarm.state, state)
        assert state_hash == make_manifest(base[0], state).state_hash


def test_the_table_is_printed_and_written(
    encoder: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        *("--data-dir", str(data_dir), "--out", str(tmp_path), "--model", str(encoder), "--rounds", "3"),
        *("--tasks", "a", "b", "--codecs", "int8", "--evaluate-every", "2", "--round-examples", "16"),
        *("--train-examples", "40", "--eval-examples", "30", "--batch-size", "8"),
    ]
    assert compression_rounds.main(flags) == 0
    shown = capsys.readouterr().out
    assert "round 2" in shown
    assert "int8: " in shown
    codecs = json.loads((tmp_path / "compression.json").read_text())["codecs"]
    assert list(codecs["int8"]["accuracy"]) == ["2", "3"]
    assert len(set(codecs["fp32"]["state_hashes"])) == 3
    assert codecs["fp32"]["distance"] == 0.0
    assert 0.0 < codecs["int8"]["distance"] < 1.0
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    (tmp_path / "int8.safetensors").unlink()  # as if it had been stopped in the second run
    assert compression_rounds.main(flags) == 0
    assert json.loads((tmp_path / "compression.json").read_text())["codecs"] == codecs
    assert (tmp_path / "fp32.safetensors").stat().st_mtime_ns == written[tmp_path / "fp32.safetensors"]
    assert compression_rounds.main([*flags, "--seed", "1"]) == UsageError.exit_code
