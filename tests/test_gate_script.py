"""Does the study of the gate do what its docstring says, with tiny models?"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from peer.data import DataConfig, load_task_data
from scripts.gate import Swarm, print_tables, study
from scripts.local_peers import Sizes
from tests.test_gate import write_examples
from tests.tiny_models import make_model_dir


def test_a_round_is_judged_and_an_attack_branches_off(tmp_path: Path) -> None:
    sizes = Sizes(40, 20, 16, 20, 1e-3, 8, 16)
    tasks = {
        name: load_task_data(DataConfig(data=str(write_examples(tmp_path / f"{name}.jsonl", 60, seed))))
        for seed, name in enumerate("abcd")
    }
    swarm = Swarm(tasks, make_model_dir(tmp_path / "model"), sizes, seed=0)
    lines: list[str] = []
    rounds, attacks, accuracies = study(swarm, 1, [1], [4.0], lines.append)
    (judged,), (attacked,) = rounds, attacks
    assert set(judged.p_values) == set("abcd")
    assert (attacked.before, attacked.honest) == (accuracies[0], accuracies[1])
    others = [attacked.judged.norms[name] for name in "abc"]
    assert abs(attacked.judged.norms["d"] / (sum(others) / 3) - 1) < 1e-5  # as long as the others
    assert attacked.judged.norms["a"] == judged.norms["a"]  # the others sent what they would have sent
    assert len(lines) == 2
    text = io.StringIO()
    print_tables(swarm, rounds, attacks, Console(file=text, width=150))
    assert f"{int(judged.is_rejected)} of 1 rejected" in text.getvalue()
