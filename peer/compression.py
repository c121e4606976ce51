"""How does one part of a delta become bytes, and bytes a part again?

A codec is a fixed layout: the number of values decides the number of bytes. All numbers are little-endian.
n is the number of values, B = ceil(n / 64) the number of blocks, k = ceil(n / 16), c = ceil(n / 65,536), or 0
where that is 1.

| codec | bytes | layout |
|---|---|---|
| fp32 | 4n | n float32 |
| fp16 | 2n | n float16; beyond 65504 a value saturates, below 3e-8 it becomes zero |
| bf16 | 2n | n bfloat16; beyond 3.39e38 a value saturates |
| int8 | 66B | B scales (bfloat16), then 64B codes (int8) |
| int4 | 34B | B scales (bfloat16), then 32B bytes: byte j is code j (low half) and code j + 32B (high half) |
| topk | 4 + 4c + 4k | a unit (float32), c counts (uint32), k indices (uint16), k float16 |

int8 and int4: code i belongs to block i // 64, the value is code x scale. The scale is the largest
magnitude of the block over 127 (or 7), rounded up to bfloat16, so no value is cut, and at least 2**-126, so
a block of zeros is nothing special. It is not float16: a delta of 1e-5 has scales of 1e-7, where float16
has one digit left. Codes beyond n are padding.

topk: the k values of largest magnitude, of equal ones those with the smaller index; indices ascend
strictly. Of an index the lower 16 bits are sent; where there are counts, they say how many lie in each run of
65,536 values. The value is float16 x unit; the unit is a power of two that puts the largest near 2**15, so
tiny deltas keep their eleven bits.

Deterministic across machines, in both directions: integer operations, IEEE conversions, and single float32
operations, element by element; a maximum does not depend on the order. So whoever computes a reducer's
result again gets the same bytes.

Everything runs in the thread that asks: finetuning needs the others. So it is numpy, and torch, where it is
the faster, in chunks below its threshold for threads. GB/s of float32 for parts of 65,536 values (one core
of an AMD EPYC with AVX-512), encode/decode: fp32 - (no copy)/16, fp16 6/7, bf16 5/8, int8 2.5/6, int4
2.2/6, topk 1.5/5. To measure again:
python -m timeit -s "import torch, peer.compression as p; x = torch.randn(65536)" "p.CODECS['int8'].encode(x)"
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Data = bytes | bytearray | memoryview
_Array = np.ndarray[Any, Any]

BLOCK_VALUES = 64  # share a scale: 2 bytes per 64 values are 3% of int8 and 6% of int4
CHUNK_VALUES = 24 * 1024  # below torch's grain of 32,768: for more it starts threads that finetuning needs
MAX_SCRATCH_VALUES = 128 * 1024  # that a thread keeps: 512 KB, as much as a part of any model up to 537M
_INDEX_RUN = 1 << 16  # what the indices of topk count up to
TOPK_ONE_IN = 16  # the share of a part's values that is sent
_MIN_SCALE = 0x0080  # bfloat16 bits of 2**-126: its reciprocal is finite
_MAX_SCALE = 0x7B80  # bfloat16 bits of 2**120: times a code of 8 bits it is finite
_LARGEST_SCALE = 2.0**120  # the same as a number
_FP16_LARGEST, _FP16_INFINITE = 65504.0, 0x7C00
_BF16_INFINITE = 0x7F80
_TOPK_LARGEST = 32752 * 2.0**113  # what lies above would round to 2**15 x 2**113, which is infinite


class Codec(Protocol):
    """What the all-reduce knows of a codec. A part is a contiguous float32 vector with at least one value."""

    @property
    def name(self) -> str: ...

    @property
    def is_lossy(self) -> bool: ...

    def size_bytes(self, num_values: int) -> int:
        """Of every encoded part of `num_values` values, whatever they are."""

    def encode(self, values: torch.Tensor) -> memoryview:
        """(n,) values to bytes. Raises ValueError where one is not finite; fp32 does not look."""

    def encode_and_decode(self, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
        """What `encode` gives, and (n,) what `decode` makes of it, bit for bit.

        To be used up before this thread encodes again: its memory may be scratch, or that of `values`.
        """

    def decode(self, data: Data, num_values: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes, of any alignment, to (num_values,) finite values: a new tensor, or `out`.

        Raises ValueError for a wrong size, for data that would give values that are not finite, and for
        indices that do not ascend; `out` is then as before.
        """


@dataclass(frozen=True)
class Float32:
    name: str = "fp32"
    is_lossy: bool = False

    def size_bytes(self, num_values: int) -> int:
        return 4 * num_values

    def encode(self, values: torch.Tensor) -> memoryview:
        """The bytes of `values` themselves: no copy, so they must not change while the bytes are in use."""
        return _view(_array(values))

    def encode_and_decode(self, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
        return self.encode(values), values

    def decode(self, data: Data, num_values: int, out: torch.Tensor | None = None) -> torch.Tensor:
        source = _read(data, "<f4", self.size_bytes(num_values))
        _refuse_non_finite(source)
        out = _room(num_values, out)
        np.copyto(out.numpy(), source)
        return out


@dataclass(frozen=True)
class Float16:
    name: str = "fp16"
    is_lossy: bool = True

    def size_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def encode(self, values: torch.Tensor) -> memoryview:
        source = _array(values)
        _refuse_non_finite(source)
        data = np.empty(len(source), "<f2")
        _copy_in_chunks(values, torch.from_numpy(data))
        if (data.view(np.uint16) & 0x7FFF).max() >= _FP16_INFINITE:
            clipped = np.clip(source, -_FP16_LARGEST, _FP16_LARGEST)
            _copy_in_chunks(torch.from_numpy(clipped), torch.from_numpy(data))
        return _view(data)

    def encode_and_decode(self, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
        return _encode_and_decode(self, values)

    def decode(self, data: Data, num_values: int, out: torch.Tensor | None = None) -> torch.Tensor:
        source = _read(data, "<u2", self.size_bytes(num_values)).copy()
        if (source & 0x7FFF).max() >= _FP16_INFINITE:
            raise ValueError("the part holds values that are not finite")
        out = _room(num_values, out)
        _copy_in_chunks(torch.from_numpy(source.view(np.float16)), out)
        return out


@dataclass(frozen=True)
class BFloat16:
    """By integer operations: hardware conversions differ in what they make of subnormal numbers."""

    name: str = "bf16"
    is_lossy: bool = True

    def size_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def encode(self, values: torch.Tensor) -> memoryview:
        source = _array(values)
        _refuse_non_finite(source)
        data = np.empty(len(source), "<u2")
        np.copyto(data, _bfloat16_nearest(source.view(np.uint32)), casting="unsafe")
        if (data & 0x7FFF).max() >= _BF16_INFINITE:
            data[(data & 0x7FFF) == _BF16_INFINITE] -= 1  # a finite value that was rounded to infinity
        return _view(data)

    def encode_and_decode(self, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
        return _encode_and_decode(self, values)

    def decode(self, data: Data, num_values: int, out: torch.Tensor | None = None) -> torch.Tensor:
        source = _read(data, "<u2", self.size_bytes(num_values))
        if (source & 0x7FFF).max() >= _BF16_INFINITE:
            raise ValueError("the part holds values that are not finite")
        out = _room(num_values, out)
        bits = out.numpy().view(np.uint32)
        np.copyto(bits, source)
        np.left_shift(bits, 16, out=bits)
        return out


@dataclass(frozen=True)
class Blockwise:
    """Integers of 8 or 4 bits with a scale per block (Dettmers et al. 2022, section 2, with linear codes)."""

    name: str
    bits: int  # 8 or 4
    is_lossy: bool = True

    @property
    def largest_code(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def size_bytes(self, num_values: int) -> int:
        return _num_blocks(num_values) * (2 + BLOCK_VALUES * self.bits // 8)

    def encode(self, values: torch.Tensor) -> memoryview:
        return self._encode(values)[0]

    def encode_and_decode(self, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
        """The codes are in the cache, and no memory is new: half of what `decode` takes, 60 us per part."""
        data, codes, scales = self._encode(values)
        decoded = _work(codes.size).reshape(codes.shape)
        np.copyto(decoded, codes)  # not the quotients that were rounded: those have a zero of either sign
        np.multiply(decoded, scales[:, None], out=decoded)
        return data, torch.from_numpy(decoded.reshape(-1)[: values.numel()])

    def _encode(self, values: torch.Tensor) -> tuple[memoryview, _Array, _Array]:
        """The part; its codes (num_blocks, 64) and scales (num_blocks,)."""
        num_blocks = _num_blocks(_array(values).size)
        blocks = _padded(values.detach().numpy(), num_blocks).reshape(num_blocks, BLOCK_VALUES)
        data = np.empty(self.size_bytes(values.numel()), np.uint8)
        scale_bits, packed = data[: 2 * num_blocks].view("<u2"), data[2 * num_blocks :].view(np.int8)
        codes = packed if self.bits == 8 else np.empty(blocks.size, np.int8)
        codes = codes.reshape(blocks.shape)
        work = np.abs(blocks, out=_work(blocks.size).reshape(blocks.shape))
        scale_bits[:] = self._scales(_largest_of_each(work))
        scales = _from_bfloat16(scale_bits)
        self._quantize(blocks, scales, work, codes)
        if self.bits == 4:
            _pack_halves(codes.reshape(-1), packed)
        return _view(data), codes, scales

    def _scales(self, largest: _Array) -> _Array:
        """bfloat16 bits of largest / largest_code, rounded up."""
        exact = (largest / np.float32(self.largest_code)).view(np.uint32)
        return np.minimum(np.maximum((exact + 0xFFFF) >> 16, _MIN_SCALE), _MAX_SCALE)

    def _quantize(self, blocks: _Array, scales: _Array, work: _Array, codes: _Array) -> None:
        """Write blocks / scales, rounded to integers, ties to even, to codes."""
        np.multiply(blocks, np.float32(1.0) / scales[:, None], out=work)
        np.rint(work, out=work)
        if scales.max() == _LARGEST_SCALE:  # only then can a value be beyond the codes: it saturates
            np.clip(work, -self.largest_code, self.largest_code, out=work)
        np.copyto(codes, work, casting="unsafe")

    def decode(self, data: Data, num_values: int, out: torch.Tensor | None = None) -> torch.Tensor:
        num_blocks, whole = _num_blocks(num_values), num_values // BLOCK_VALUES
        source = _read(data, np.uint8, self.size_bytes(num_values))
        scale_bits, packed = source[: 2 * num_blocks].view("<u2"), source[2 * num_blocks :].view(np.int8)
        if scale_bits.max() > _MAX_SCALE:  # a sign, an infinity and a NaN are larger still
            raise ValueError("the part holds a scale that no finite values have")
        out = _room(num_values, out)
        codes = packed if self.bits == 8 else _unpacked_halves(packed)
        scales, target, rest = _from_bfloat16(scale_bits), out.numpy(), whole * BLOCK_VALUES
        blocks = target[:rest].reshape(-1, BLOCK_VALUES)
        np.copyto(target[:rest], codes[:rest])  # exact; a product of mixed types is slower than both steps
        np.multiply(blocks, scales[:whole, None], out=blocks)
        if rest < num_values:
            np.multiply(codes[rest:num_values], scales[-1], out=target[rest:])
        return out


@dataclass(frozen=True)
class TopK:
    """The largest values alone (Stich et al. 2018, definition 2.1): of use with error feedback only."""

    name: str = "topk"
    is_lossy: bool = True

    def size_bytes(self, num_values: int) -> int:
        return 4 + 4 * _num_runs(num_values) + 4 * _num_kept(num_values)

    def encode(self, values: torch.Tensor) -> memoryview:
        source = _array(values)
        _refuse_non_finite(source)
        num_kept, data = _num_kept(len(source)), np.empty(self.size_bytes(len(source)), np.uint8)
        indices = _largest_indices(np.abs(source), num_kept)
        kept = np.clip(source[indices], -_TOPK_LARGEST, _TOPK_LARGEST)
        unit = _power_of_two_unit(float(np.abs(kept).max()))
        data[:4].view("<f4")[0] = unit
        _write_indices(indices, data[4:], len(source))
        data[-2 * num_kept :].view("<f2")[:] = kept * np.float32(1.0 / unit)
        return _view(data)

    def encode_and_decode(self, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
        return _encode_and_decode(self, values)

    def decode(self, data: Data, num_values: int, out: torch.Tensor | None = None) -> torch.Tensor:
        source = _read(data, np.uint8, self.size_bytes(num_values))
        unit = source[:4].view("<f4")[0]
        indices = _read_indices(source[4:], num_values)
        if not (indices[1:] > indices[:-1]).all() or (indices[-1:] >= num_values).any():
            raise ValueError("the indices of the part do not ascend, or one is beyond its end")
        with np.errstate(all="ignore"):  # what is wrong is found by the next line
            values = source[-2 * len(indices) :].view("<f2").astype(np.float32) * unit
        _refuse_non_finite(values)
        out = _room(num_values, out)
        out.numpy().fill(0.0)
        out.numpy()[indices] = values
        return out


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (Float32(), Float16(), BFloat16(), Blockwise("int8", 8), Blockwise("int4", 4), TopK())
}


def residual_into(values: torch.Tensor, encoded: Data, codec: Codec) -> None:
    """values -= decode(encoded), in place: what this round did not send and the next one adds.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, algorithm 1). values: (n,) that were encoded.
    """
    decoded = codec.decode(encoded, values.numel())
    np.subtract(values.numpy(), decoded.numpy(), out=values.numpy())


def _encode_and_decode(codec: Codec, values: torch.Tensor) -> tuple[memoryview, torch.Tensor]:
    data = codec.encode(values)
    return data, codec.decode(data, values.numel())


def _num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK_VALUES)


def _num_kept(num_values: int) -> int:
    return -(-num_values // TOPK_ONE_IN)


def _num_runs(num_values: int) -> int:
    """Of values whose indices share what is above 16 bits; 0 where there is one alone."""
    return -(-num_values // _INDEX_RUN) if num_values > _INDEX_RUN else 0


def _write_indices(indices: _Array, data: _Array, num_values: int) -> None:
    counts_stop = 4 * _num_runs(num_values)
    if counts_stop:
        counts = np.bincount(indices // _INDEX_RUN, minlength=_num_runs(num_values))
        data[:counts_stop].view("<u4")[:] = counts
    data[counts_stop : counts_stop + 2 * len(indices)].view("<u2")[:] = indices % _INDEX_RUN


def _read_indices(data: _Array, num_values: int) -> _Array:
    """(k,), of any order. Raises ValueError for counts that are not of k indices."""
    num_kept, num_runs = _num_kept(num_values), _num_runs(num_values)
    low = data[4 * num_runs : 4 * num_runs + 2 * num_kept].view("<u2")
    if not num_runs:
        return low
    counts = data[: 4 * num_runs].view("<u4")
    if sum(counts.tolist()) != num_kept:
        raise ValueError("the counts of the part are not those of its indices")
    return low + np.repeat(np.arange(num_runs, dtype=np.int64) * _INDEX_RUN, counts)


def _copy_in_chunks(source: torch.Tensor, target: torch.Tensor) -> None:
    """Between float16 and float32; numpy converts 50 times slower."""
    for values, room in zip(source.split(CHUNK_VALUES), target.split(CHUNK_VALUES), strict=True):
        room.copy_(values)


def _array(values: torch.Tensor) -> _Array:
    if values.dim() != 1 or not len(values) or values.dtype != torch.float32 or not values.is_contiguous():
        raise ValueError("a part is a contiguous float32 vector with at least one value")
    return values.detach().numpy()


def _room(num_values: int, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return torch.empty(num_values)
    if _array(out).size != num_values:
        raise ValueError(f"room for {out.numel()} values, but the part has {num_values}")
    return out


def _view(data: _Array) -> memoryview:
    return memoryview(data).cast("B")  # type: ignore[arg-type]  # numpy arrays are buffers


def _read(data: Data, kind: Any, size_bytes: int) -> _Array:
    if memoryview(data).nbytes != size_bytes:
        raise ValueError(f"the part has {memoryview(data).nbytes} bytes, expected {size_bytes}")
    return np.frombuffer(data, kind)


def _refuse_non_finite(values: _Array) -> None:
    if not np.isfinite(values).all():
        raise ValueError("the part holds values that are not finite")


def _bfloat16_nearest(bits: _Array) -> _Array:
    """float32 bits to the nearest bfloat16: add half a unit; a tie goes up only where the last bit is 1."""
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded


def _from_bfloat16(bits: _Array) -> _Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _largest_of_each(magnitudes: _Array) -> _Array:
    """(num_blocks, 64) to (num_blocks,). Raises ValueError for infinity, and NaN, which a maximum keeps."""
    values, largest = torch.from_numpy(magnitudes), torch.empty(len(magnitudes))
    step = CHUNK_VALUES // BLOCK_VALUES
    for start in range(0, len(values), step):  # numpy: 8 times slower
        torch.amax(values[start : start + step], dim=1, out=largest[start : start + step])
    _refuse_non_finite(largest.numpy())
    return largest.numpy()


_scratch = threading.local()


def _work(num_values: int) -> _Array:
    """(num_values,) float32 to write to: of the thread that asks, until it asks again.

    New memory for each part is given back to the system each time, and half of the time of encoding
    went into having it again.
    """
    work: _Array | None = getattr(_scratch, "work", None)
    if work is None or len(work) < num_values:
        work = np.empty(num_values, np.float32)
        if num_values <= MAX_SCRATCH_VALUES:
            _scratch.work = work
    return work[:num_values]


def _padded(values: _Array, num_blocks: int) -> _Array:
    if len(values) == num_blocks * BLOCK_VALUES:
        return values
    padded = np.zeros(num_blocks * BLOCK_VALUES, np.float32)
    padded[: len(values)] = values
    return padded


def _pack_halves(codes: _Array, packed: _Array) -> None:
    """Codes of -7..7 two by two: the first half of the part low, the second high."""
    np.multiply(codes[len(packed) :], 16, out=packed)  # numpy shifts left seven times slower
    packed |= codes[: len(packed)] & 15


def _unpacked_halves(packed: _Array) -> _Array:
    """Inverse of `_pack_halves`: shifts of signed bytes keep the sign."""
    codes = np.empty(2 * len(packed), np.int8)
    low, high = codes[: len(packed)], codes[len(packed) :]
    np.multiply(packed, 16, out=low)
    np.right_shift(low, 4, out=low)
    np.right_shift(packed, 4, out=high)
    return codes


def _largest_indices(magnitudes: _Array, num_kept: int) -> _Array:
    """The indices of the `num_kept` largest, ascending; of equal ones those that come first.

    The exact search runs on those above a guess, taken from one value in 16: a third of the time.
    """
    candidates = _likely_candidates(magnitudes, num_kept)
    values = magnitudes[candidates]
    position = len(values) - num_kept
    smallest_kept = np.partition(values, position)[position]
    kept = values > smallest_kept
    ties = np.flatnonzero(values == smallest_kept)
    kept[ties[: num_kept - int(np.count_nonzero(kept))]] = True
    return candidates[kept]


def _likely_candidates(magnitudes: _Array, num_kept: int) -> _Array:
    """Indices of all values above a guessed bound; of all values if less than `num_kept` are."""
    sample = magnitudes[::TOPK_ONE_IN]
    position = len(sample) - min(len(sample), 1 + math.ceil(1.5 * len(sample) / TOPK_ONE_IN))
    candidates = np.flatnonzero(magnitudes >= np.partition(sample, position)[position])
    return candidates if len(candidates) >= num_kept else np.arange(len(magnitudes))


def _power_of_two_unit(largest: float) -> float:
    """So that largest / unit lies in [2**14, 2**15): exact to multiply with, and its reciprocal is finite."""
    _, exponent = math.frexp(largest)
    return math.ldexp(1.0, max(exponent - 15, -126)) if largest else 1.0
