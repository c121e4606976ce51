"""Do four real peers keep the promises when one of them fails, whatever the fault and the step?

`python -m scripts.fault_matrix` prints the same cells as a table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.errors import SwarmError
from scripts.fault_matrix import (
    CELLS,
    NOT_INJECTED,
    Cell,
    Outcome,
    _keep,
    _kept,
    _outcome_of,
    _selected,
    _together,
    _told_seconds,
    run_cell,
)

FAST = (Cell("kill", "middle-part"),)  # the lie of a reducer: test_audit.py, in one process
BOUND_SECONDS = 60.0  # of the slowest survivor, from ready to committed: deadlines add up to about 20


def marks_of(cell: Cell) -> list[pytest.MarkDecorator]:
    return [] if cell in FAST else [pytest.mark.slow]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cell", [pytest.param(c, marks=marks_of(c), id=c.name) for c in CELLS])
def test_the_others_hold_one_hash_and_go_on(cell: Cell, tmp_path: Path) -> None:
    outcome = run_cell(cell, tmp_path)
    assert outcome.problems == ()
    assert outcome.exchange_seconds < BOUND_SECONDS
    if cell.kind == "wrong-result":
        assert "rolled back" in outcome.what_happened


def test_outcomes_of_several_calls_make_one_table(tmp_path: Path) -> None:
    later = Outcome(Cell("nan", "last-part"), ("a state is off",), "3 peers", (2.5,), 1e-3)
    earlier = Outcome(Cell("none", "ready"), (), "4 peers", (0.5,), 6e-8)
    lossy = Outcome(Cell("kill", "middle-part", compression="int8"), (), "3 peers", (1.0, 2.0, 4.0), 1e-3)
    for outcome in (lossy, later, earlier):
        _keep(outcome, tmp_path)
    assert _kept(tmp_path) == [earlier, later, lossy]  # in the order of the cells
    assert (tmp_path / "kill-at-middle-part-int8.json").exists()
    _keep(replace(later, problems=()), tmp_path)
    assert [outcome.problems for outcome in _kept(tmp_path)] == [(), (), ()]
    (tmp_path / "kill-at-ready.json").write_text('{"kind": "kill"}')
    with pytest.raises(SwarmError, match=r"kill-at-ready\.json holds no outcome"):
        _kept(tmp_path)


def test_repetitions_are_told_by_their_median_and_their_longest() -> None:
    cell = Cell("kill", "commit")
    runs = [Outcome(cell, (), "3 peers", (seconds,), error) for seconds, error in ((2.0, 1e-7), (1.0, 3e-7))]
    bad = Outcome(cell, ("round 2 has 2 states",), "slow", (9.0,), 2e-7)
    never_ended = Outcome(cell, ("did not end",), "", (), 0.0)
    all_ = _together([*runs, bad, never_ended])
    assert all_ == Outcome(cell, ("round 2 has 2 states", "did not end"), "slow", (2.0, 1.0, 9.0), 3e-7)
    clean = Outcome(cell.clean, (), "4 peers", (0.5,), 6e-8)
    assert _told_seconds(all_, clean) == "1.5 (to 8.5)"
    assert _told_seconds(runs[0], clean) == "1.5"
    assert (
        _told_seconds(runs[0], None)
        == _told_seconds(never_ended, clean)
        == _told_seconds(clean, clean)
        == "-"
    )


def test_clean_cells_run_once_and_are_of_the_same_run() -> None:
    clean, kill = Cell("none", "ready"), Cell("kill", "commit")
    assert _selected(["kill"], ["commit"]) == [clean, kill]
    assert _selected(["kill"], ["commit"], [clean]) == [kill]
    of_int8 = [cell for cell in _selected(["kill"], ["first-result"]) if cell.compression == "int8"]
    assert of_int8 == [Cell("none", "ready", "int8"), Cell("kill", "first-result", "int8")]
    assert _selected(["freeze"], ["download"]) == [Cell("none", "download"), Cell("freeze", "download")]
    assert _selected(None, None) == list(CELLS)
    assert {cell.clean for cell in CELLS} <= set(CELLS)
    assert len({cell.file_name for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize(("num_misses", "num_tries", "problem"), [(1, 2, "bad"), (9, 3, NOT_INJECTED)])
def test_a_cell_whose_fault_did_not_happen_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, num_misses: int, num_tries: int, problem: str
) -> None:
    tried = []

    def missed(cell: Cell, directory: Path) -> Outcome:
        tried.append(directory)
        return Outcome(cell, (NOT_INJECTED if len(tried) <= num_misses else "bad",), "", (1.0,), 0.0)

    monkeypatch.setattr("scripts.fault_matrix.run_cell", missed)
    assert _outcome_of(Cell("freeze", "download")).problems == (problem,)
    assert len(set(tried)) == num_tries
