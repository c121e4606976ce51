"""Do four real peers keep the promises when one of them fails, whatever the fault and the step?

`python -m scripts.fault_matrix` prints the same cells as a table.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.fault_matrix import CELLS, Cell, run_cell

FAST = (Cell("kill", "middle-part"), Cell("nan", "middle-part"), Cell("wrong-result", "first-result"))
BOUND_SECONDS = 60.0  # of the slowest survivor, from ready to committed: deadlines add up to about 20


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow, id=c.name) for c in CELLS]
)
def test_the_others_hold_one_hash_and_go_on(cell: Cell, tmp_path: Path) -> None:
    outcome = run_cell(cell, tmp_path)
    assert outcome.problems == ()
    assert outcome.exchange_seconds < BOUND_SECONDS
    if cell.kind == "wrong-result":
        assert "rolled back" in outcome.what_happened
