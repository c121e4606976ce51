"""Is the flat vector in the canonical order, and does its hash see every name, shape and bit?"""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.layout import (
    CHUNK_SIZE_BYTES,
    StateManifest,
    TensorLayout,
    chunk_of,
    flat_bytes,
    make_manifest,
)

TENSORS = {
    "b.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "a": torch.tensor(5.0),
    "b.bias": torch.tensor([6.0, 7.0, 8.0]),
}
LAYOUT = TensorLayout(names=("a", "b.bias", "b.weight"), shapes=((), (3,), (2, 2)))
FLAT = [5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]  # by name, each in row-major order


def state_hash(tensors: dict[str, torch.Tensor]) -> str:
    layout = TensorLayout.of(tensors)
    return make_manifest(layout, layout.flatten(tensors)).state_hash


# --- order


def test_the_order_is_by_name_whatever_the_order_of_the_mapping() -> None:
    assert TensorLayout.of(TENSORS) == LAYOUT
    assert TensorLayout.of(dict(reversed(TENSORS.items()))) == LAYOUT
    assert LAYOUT.flatten(TENSORS).tolist() == FLAT


def test_names_are_sorted_by_code_point() -> None:
    names = TensorLayout.of({name: torch.zeros(1) for name in ("layer.10", "layer.2", "a", "B", "é")}).names
    assert names == ("B", "a", "layer.10", "layer.2", "é")


def test_sizes() -> None:
    assert (LAYOUT.num_values, LAYOUT.size_bytes, LAYOUT.num_chunks) == (8, 32, 1)
    per_chunk = CHUNK_SIZE_BYTES // 4
    for num_values, num_chunks in ((0, 1), (1, 1), (per_chunk, 1), (per_chunk + 1, 2), (3 * per_chunk, 3)):
        assert TensorLayout(names=("w",), shapes=((num_values,),)).num_chunks == num_chunks


def test_a_transposed_tensor_is_flattened_by_its_rows() -> None:
    tensors = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T}
    assert TensorLayout.of(tensors).flatten(tensors).tolist() == [1, 3, 2, 4]


def test_flattening_copies_and_converts_to_float32() -> None:
    tensors = {"w": torch.tensor([1.0, 1.5], dtype=torch.bfloat16, requires_grad=True)}
    flat = TensorLayout.of(tensors).flatten(tensors)
    assert (flat.dtype, flat.device.type, flat.requires_grad) == (torch.float32, "cpu", False)
    flat.zero_()
    assert tensors["w"].tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": TENSORS["a"], "b.bias": TENSORS["b.bias"]},
        {**TENSORS, "c": torch.zeros(1)},
        {**TENSORS, "a": torch.zeros(1)},
        {**TENSORS, "b.weight": torch.zeros(4)},
    ],
)
def test_other_names_or_shapes_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="names and shapes"):
        LAYOUT.flatten(tensors)


def test_unflattened_tensors_are_views() -> None:
    flat = torch.tensor(FLAT)
    views = LAYOUT.unflatten(flat)
    assert {name: view.tolist() for name, view in views.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    views["b.bias"][1] = 70.0
    assert flat.tolist() == [5.0, 6.0, 70.0, 8.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("flat", [torch.zeros(7), torch.zeros(9), torch.zeros(2, 4), torch.zeros(8, 1)])
def test_a_vector_of_another_size_is_refused(flat: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected 8 values"):
        LAYOUT.unflatten(flat)


# --- JSON

layouts = st.dictionaries(
    st.text(min_size=1, max_size=8), st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5
).map(
    lambda shapes: TensorLayout(
        names=tuple(sorted(shapes)), shapes=tuple(tuple(shapes[name]) for name in sorted(shapes))
    )
)


def test_json_form() -> None:
    assert LAYOUT.to_json() == [["a", []], ["b.bias", [3]], ["b.weight", [2, 2]]]


@given(layouts)
def test_json_round_trip(layout: TensorLayout) -> None:
    assert TensorLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "non-empty list"),
        ({}, "non-empty list"),
        ("ab", "non-empty list"),
        ([], "non-empty list"),
        (["a"], "entry"),
        ([["a"]], "entry"),
        ([["a", [1], 2]], "entry"),
        ([[1, [1]]], "entry"),
        ([("a", [1])], "entry"),
        ([["a", 3]], "list of sizes"),
        ([["a", None]], "list of sizes"),
        ([["a", "12"]], "list of sizes"),
        ([["a", [-1]]], "list of sizes"),
        ([["a", [1.0]]], "list of sizes"),
        ([["a", [True]]], "list of sizes"),
        ([["a", ["1"]]], "list of sizes"),
        ([["b", [1]], ["a", [1]]], "sorted and distinct"),
        ([["a", [1]], ["a", [1]]], "sorted and distinct"),
    ],
)
def test_what_is_not_a_layout_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TensorLayout.from_json(value)


# --- hash


def test_the_hash_is_what_the_docstring_says() -> None:
    chunk = hashlib.sha256(struct.pack("<8f", *FLAT)).hexdigest()  # little-endian float32
    header = (
        f'{{"chunks":["{chunk}"],"dtype":"float32","layout":[["a",[]],["b.bias",[3]],["b.weight",[2,2]]]}}'
    )
    assert state_hash(TENSORS) == hashlib.sha256(header.encode()).hexdigest()


def test_chunks_are_hashed_apart() -> None:
    num_values = CHUNK_SIZE_BYTES // 4 + 1
    layout = TensorLayout(names=("w",), shapes=((num_values,),))
    flat = torch.arange(num_values, dtype=torch.float32)
    manifest = make_manifest(layout, flat)
    data = flat.numpy().tobytes()
    assert manifest.chunk_hashes == (
        hashlib.sha256(data[:CHUNK_SIZE_BYTES]).hexdigest(),
        hashlib.sha256(data[CHUNK_SIZE_BYTES:]).hexdigest(),
    )
    assert bytes(chunk_of(flat_bytes(flat), 1)) == data[CHUNK_SIZE_BYTES:]
    flat[-1] += 1
    changed = make_manifest(layout, flat)
    assert changed.chunk_hashes[0] == manifest.chunk_hashes[0]
    assert changed.chunk_hashes[1] != manifest.chunk_hashes[1]


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("a", "b.bias", "b.weighs")},
        {"shapes": ((), (3,), (4,))},
        {"shapes": ((1,), (3,), (2, 2))},
    ],
)
def test_the_hash_changes_with_a_name_or_a_shape(change: dict[str, tuple[object, ...]]) -> None:
    layout = TensorLayout(**{"names": LAYOUT.names, "shapes": LAYOUT.shapes, **change})  # type: ignore[arg-type]
    flat = torch.tensor(FLAT)
    assert make_manifest(layout, flat).state_hash != make_manifest(LAYOUT, flat).state_hash
    assert make_manifest(layout, flat).chunk_hashes == make_manifest(LAYOUT, flat).chunk_hashes


@pytest.mark.parametrize("bit", range(32))
def test_the_hash_changes_with_any_bit(bit: int) -> None:
    flat = torch.tensor(FLAT)
    before = make_manifest(LAYOUT, flat).state_hash
    flat.view(torch.int32)[3] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert make_manifest(LAYOUT, flat).state_hash != before


def test_zero_and_minus_zero_are_different_states() -> None:
    assert state_hash({"w": torch.tensor([0.0])}) != state_hash({"w": torch.tensor([-0.0])})


def test_the_hash_changes_with_any_chunk_hash() -> None:
    manifest = StateManifest(layout=LAYOUT, chunk_hashes=("aa", "bb"))
    for other in (("aa",), ("aa", "bc"), ("bb", "aa"), ("aa", "bb", "")):
        assert StateManifest(layout=LAYOUT, chunk_hashes=other).state_hash != manifest.state_hash


def test_the_bytes_are_not_copied() -> None:
    flat = torch.zeros(4)
    data = flat_bytes(flat)
    flat[0] = 1.0
    assert bytes(data[:4]) == struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    "flat", [torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(8)[::2]]
)
def test_what_is_not_contiguous_float32_is_refused(flat: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous float32"):
        flat_bytes(flat)
