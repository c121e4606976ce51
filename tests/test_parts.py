"""Is every value in exactly one part, every part with exactly one reducer, and the same for all?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.parts import MAX_PARTS, PART_VALUES, PartGrid


def test_a_small_model_has_parts_of_1024_values() -> None:
    grid = PartGrid(10_000)
    assert (grid.part_values, grid.num_parts) == (1024, 10)
    assert [grid.bounds(0), grid.bounds(9)] == [(0, 1024), (9216, 10_000)]
    assert grid.size(9) == 784


def test_minilm_has_parts_of_half_a_megabyte() -> None:
    grid = PartGrid(22_713_216)
    assert (grid.part_values, grid.num_parts) == (PART_VALUES, 174)


def test_a_billion_values_make_at_most_4096_parts() -> None:
    assert PartGrid(10**9).num_parts <= MAX_PARTS


def test_a_part_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="part 10 of 10"):
        PartGrid(10_000).bounds(10)
    with pytest.raises(ValueError, match="0 values"):
        PartGrid(0)


def test_reducers_own_runs_in_the_order_of_their_ids() -> None:
    assert PartGrid(10_000).owned(["c", "a", "b"]) == {"a": range(3), "b": range(3, 6), "c": range(6, 10)}


def test_more_members_than_parts_leaves_some_without() -> None:
    owned = PartGrid(2000).owned("abcde")
    assert sorted(part for parts in owned.values() for part in parts) == [0, 1]


@given(num_values=st.integers(1, 3 * 10**9), num_members=st.integers(1, 100))
def test_parts_tile_the_vector_and_members_tile_the_parts(num_values: int, num_members: int) -> None:
    grid = PartGrid(num_values)
    assert grid.num_parts <= MAX_PARTS
    assert grid.bounds(0)[0] == 0
    assert grid.bounds(grid.num_parts - 1)[1] == num_values
    owned = grid.owned([f"{index:03d}" for index in range(num_members)])
    assert [part for parts in owned.values() for part in parts] == list(range(grid.num_parts))
    lengths = [len(parts) for parts in owned.values()]
    assert max(lengths) - min(lengths) <= 1
