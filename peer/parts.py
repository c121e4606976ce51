"""Into which parts is a flat vector cut, and who reduces which? The same answer on every peer.

The grid follows from the number of values alone, so that part 17 means the same coordinates in
every round and every group: hashes, audits and error-feedback residuals are kept by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

PART_VALUES = 131_072  # 512 KB of float32; with half of that int8 takes a third longer, for Python per frame
SMALLEST_PART_VALUES = 1024  # so that a tiny model, too, has parts for several reducers
MAX_PARTS = 4096  # a manifest names a hash for each: 256 KB


@dataclass(frozen=True)
class PartGrid:
    """`num_values` cut into parts of equal size; the last may be smaller."""

    num_values: int

    def __post_init__(self) -> None:
        if self.num_values < 1:
            raise ValueError(f"{self.num_values} values cannot be cut into parts")

    @cached_property  # asked for several times per part
    def part_values(self) -> int:
        """A multiple of 1024: about 64 parts for a small model, parts of 131,072 values for a large one."""
        wanted = max(min(PART_VALUES, self.num_values // 64), -(-self.num_values // MAX_PARTS))
        return max(1, -(-wanted // SMALLEST_PART_VALUES)) * SMALLEST_PART_VALUES

    @cached_property
    def num_parts(self) -> int:
        return -(-self.num_values // self.part_values)

    def bounds(self, part: int) -> tuple[int, int]:
        """First value of a part, and the first behind it."""
        if not 0 <= part < self.num_parts:
            raise ValueError(f"part {part} of {self.num_parts}")
        return part * self.part_values, min((part + 1) * self.part_values, self.num_values)

    def size(self, part: int) -> int:
        start, stop = self.bounds(part)
        return stop - start

    def owned(self, members: Sequence[str]) -> dict[str, range]:
        """Which parts each member reduces: runs of equal length, in the order of the peer ids.

        Not in the order of the group, which is drawn anew in every round: a reducer keeps its parts,
        and with them its residuals, for as long as the members stay the same.
        """
        ordered = sorted(members)
        cuts = [index * self.num_parts // len(ordered) for index in range(len(ordered) + 1)]
        return {
            member: range(first, stop)
            for member, first, stop in zip(ordered, cuts[:-1], cuts[1:], strict=True)
        }
