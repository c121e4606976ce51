"""How named tensors become one flat vector, and what the hash of that vector is.

The state of a run is decided bit for bit, so the order is canonical: tensors sorted by
name, each in row-major order, float32, little-endian. The hash is a root over the hashes
of fixed-size chunks, so that each chunk of a download can be checked when it arrives.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

CHUNK_SIZE_BYTES = 1 << 20  # one unit of download and of hashing
BUFFER_PREFIX = "~"  # of the outer optimizer's buffers: behind every parameter's name, so last in the order
_BYTES_PER_VALUE = 4


@dataclass(frozen=True)
class TensorLayout:
    names: tuple[str, ...]  # sorted; a tensor is found by name, never by position in a model
    shapes: tuple[tuple[int, ...], ...]  # in the order of names

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> TensorLayout:
        names = tuple(sorted(tensors))
        return cls(names=names, shapes=tuple(tuple(tensors[name].shape) for name in names))

    @classmethod
    def from_json(cls, value: object) -> TensorLayout:
        """Inverse of `to_json`. Raises ValueError when `value` is not a layout in canonical order."""
        if not isinstance(value, list) or not value:
            raise ValueError("a layout is a non-empty list of [name, shape]")
        names, shapes = [], []
        for entry in value:
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise ValueError("a layout entry is [name, shape]")
            shape = entry[1]
            if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"the shape of {entry[0][:80]!r} is not a list of sizes")
            names.append(entry[0])
            shapes.append(tuple(shape))
        if names != sorted(set(names)):
            raise ValueError("the names of a layout are sorted and distinct")
        return cls(names=tuple(names), shapes=tuple(shapes))

    def to_json(self) -> list[list[object]]:
        return [[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)]

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def size_bytes(self) -> int:
        return self.num_values * _BYTES_PER_VALUE

    @property
    def backbone(self) -> TensorLayout:
        """The model's part of a state: its first `backbone.num_values` values; behind them are buffers."""
        names = tuple(name for name in self.names if not name.startswith(BUFFER_PREFIX))
        return TensorLayout(names=names, shapes=self.shapes[: len(names)])

    def with_buffers(self, names: Sequence[str]) -> TensorLayout:
        """Of a state: this backbone, and one vector of its size for each buffer name (they start with ~)."""
        shape = (self.num_values,)
        return TensorLayout(
            names=(*self.names, *sorted(names)), shapes=(*self.shapes, *(shape for _ in names))
        )

    @property
    def num_chunks(self) -> int:
        return max(1, -(-self.size_bytes // CHUNK_SIZE_BYTES))  # rounded up, exact for any size

    def flatten(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(num_values,) float32 copy on the CPU. Raises ValueError when names or shapes differ."""
        if TensorLayout.of(tensors) != self:
            raise ValueError("the tensors do not have the names and shapes of this layout")
        flat = torch.empty(self.num_values, dtype=torch.float32)
        for name, view in self.unflatten(flat).items():
            view.copy_(tensors[name].detach())
        return flat

    def unflatten(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views into `flat`, by name; writing to one writes to `flat`."""
        if flat.shape != (self.num_values,):
            raise ValueError(
                f"expected {self.num_values} values in one dimension, got shape {tuple(flat.shape)}"
            )
        views, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            views[name] = flat[start:stop].view(shape)
            start = stop
        return views


@dataclass(frozen=True)
class StateManifest:
    """What must be known to check a state chunk by chunk: its root is the state hash."""

    layout: TensorLayout
    chunk_hashes: tuple[str, ...]  # sha256, hex, of each CHUNK_SIZE_BYTES of the flat bytes

    @cached_property  # each piece of a download asks for it
    def state_hash(self) -> str:
        """sha256 over names, shapes, dtype and chunk hashes, in canonical JSON."""
        header = {"layout": self.layout.to_json(), "dtype": "float32", "chunks": list(self.chunk_hashes)}
        return hashlib.sha256(json.dumps(header, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def make_manifest(layout: TensorLayout, flat: torch.Tensor) -> StateManifest:
    data = flat_bytes(flat)
    return StateManifest(
        layout=layout,
        chunk_hashes=tuple(hashlib.sha256(chunk_of(data, i)).hexdigest() for i in range(layout.num_chunks)),
    )


def flat_bytes(flat: torch.Tensor) -> memoryview:
    """The bytes of a contiguous float32 CPU vector, without a copy."""
    if flat.dtype != torch.float32 or flat.device.type != "cpu" or not flat.is_contiguous():
        raise ValueError("a state is a contiguous float32 vector on the CPU")
    return memoryview(flat.detach().numpy()).cast("B")  # type: ignore[arg-type]  # numpy arrays are buffers


def chunk_of(data: memoryview, index: int) -> memoryview:
    return data[index * CHUNK_SIZE_BYTES : (index + 1) * CHUNK_SIZE_BYTES]
