"""Does every codec keep its layout, its error and its promises, whatever bytes arrive?"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.compression import CODECS, residual_into

ALL = sorted(CODECS)
LOSSY = [name for name in ALL if CODECS[name].is_lossy]
SIZES = [1, 2, 63, 64, 65, 127, 128, 1000, 4096, 70_000]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def delta(size: int, seed: int = 0, length: float = 1e-4) -> torch.Tensor:
    """Normal values whose scale changes every 100, as it does between the tensors of a model."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(size // 100 + 1, generator=generator).repeat_interleave(100)[:size]
    return length * scales * torch.randn(size, generator=generator)


def through(name: str, values: torch.Tensor) -> torch.Tensor:
    return CODECS[name].decode(bytes(CODECS[name].encode(values)), values.numel())


# Layout.


def test_names_and_sizes() -> None:
    assert ALL == ["bf16", "fp16", "fp32", "int4", "int8", "topk"]
    assert {name: CODECS[name].is_lossy for name in ALL} == {name: name != "fp32" for name in ALL}
    sizes = {name: [CODECS[name].size_bytes(n) for n in (1, 64, 65, 65_536, 65_537)] for name in ALL}
    assert sizes == {
        "fp32": [4, 256, 260, 262_144, 262_148],
        "fp16": [2, 128, 130, 131_072, 131_074],
        "bf16": [2, 128, 130, 131_072, 131_074],
        "int8": [66, 66, 132, 67_584, 67_650],
        "int4": [34, 34, 68, 34_816, 34_850],
        "topk": [8, 20, 24, 16_388, 16_400],
    }


def test_bytes_of_a_round_are_within_the_bounds_of_the_issue() -> None:
    """4 peers, 22.7M values: each sends three quarters twice."""
    limits = {"fp32": 137e6, "int8": 36e6, "int4": 19e6}
    for name, limit in limits.items():
        assert 2 * 0.75 * CODECS[name].size_bytes(22_713_216) <= limit


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_encoded_size(name: str, size: int) -> None:
    codec = CODECS[name]
    data = codec.encode(delta(size))
    assert data.nbytes == len(data) == codec.size_bytes(size)
    assert codec.decode(data, size).shape == (size,)


def test_fp32_and_halves_by_hand() -> None:
    values = vector(1.0, -2.5, 3e-5)
    assert bytes(CODECS["fp32"].encode(values)) == struct.pack("<3f", 1.0, -2.5, 3e-5)
    assert bytes(CODECS["fp16"].encode(values)) == struct.pack("<3e", 1.0, -2.5, 3e-5)
    assert bytes(CODECS["bf16"].encode(vector(1.0, -2.5))) == bytes.fromhex("803f20c0")


def test_fp32_is_not_copied() -> None:
    values = vector(1.0, 2.0)
    data = CODECS["fp32"].encode(values)
    values[0] = 5.0
    assert struct.unpack("<2f", data) == (5.0, 2.0)
    decoded = CODECS["fp32"].decode(data, 2)
    values[0] = 6.0
    assert decoded.tolist() == [5.0, 2.0]  # what was decoded is


def test_int8_by_hand() -> None:
    """Block 0: largest 127, scale 1. Block 1: largest 254, scale 2 and 3 / 2 lies between two codes."""
    values = torch.zeros(66)
    values[0], values[1], values[2], values[64], values[65] = 127.0, -5.4, 2.5, -254.0, 3.0
    data = bytes(CODECS["int8"].encode(values))
    assert data[:4] == bytes.fromhex("803f0040")  # bfloat16 1.0 and 2.0
    codes = struct.unpack("128b", data[4:])
    assert codes[:3] == (127, -5, 2)  # 2.5 goes to the even one
    assert codes[64:66] == (-127, 2)
    assert set(codes[66:]) == {0}
    decoded = CODECS["int8"].decode(data, 66)
    assert decoded[[0, 1, 2, 64, 65]].tolist() == [127.0, -5.0, 2.0, -254.0, 4.0]


def test_int4_by_hand() -> None:
    """Two blocks of scale 0.5 and 1; byte j holds codes j and j + 64."""
    values = torch.zeros(128)
    values[0], values[1], values[64], values[65] = 3.5, -1.0, -7.0, 2.4
    data = bytes(CODECS["int4"].encode(values))
    assert data[:4] == bytes.fromhex("003f803f")
    assert data[4:6] == bytes([0x97, 0x2E])  # (7, -7), (-2, 2)
    assert set(data[6:]) == {0}
    decoded = CODECS["int4"].decode(data, 128)
    assert decoded[[0, 1, 64, 65]].tolist() == [3.5, -1.0, -7.0, 2.0]


def test_topk_by_hand() -> None:
    """Of 33 values three; the tie between -1 and 1 goes to the first."""
    values = torch.zeros(33)
    values[3], values[7], values[20], values[32] = -1.0, 4.0, 1.0, -2.0
    data = bytes(CODECS["topk"].encode(values))
    assert data == struct.pack("<f3H3e", 2.0**-12, 3, 7, 32, -4096.0, 16384.0, -8192.0)
    kept = CODECS["topk"].decode(data, 33)
    assert kept.tolist() == [*[0.0] * 3, -1.0, *[0.0] * 3, 4.0, *[0.0] * 24, -2.0]


# Error.


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1e-30, 1e-9, 1e-4, 1.0, 1e30])
def test_blockwise_error_is_half_a_step(name: str, size: int, length: float) -> None:
    """A step is the largest of the block over 127 or 7, and up to 1/128 more for the scale's eight bits."""
    values = delta(size, length=length)
    errors = (through(name, values) - values).abs()
    steps = {"int8": 127, "int4": 7}[name]
    for start in range(0, size, 64):
        largest = values[start : start + 64].abs().max()
        assert errors[start : start + 64].max() <= 0.5001 * (1 + 1 / 128) * largest / steps


@pytest.mark.parametrize(("name", "bits"), [("fp16", 11), ("bf16", 8)])
def test_error_of_halves(name: str, bits: int) -> None:
    values = delta(70_000, length=1.0)
    values = values[values.abs() > 2.0**-14]  # above float16's subnormal numbers
    errors = (through(name, values) - values).abs() / values.abs()
    assert 2.0 ** -(bits + 1) < errors.max() <= 2.0**-bits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1e-30, 1e-9, 1e-4, 1.0, 1e30])
def test_topk_keeps_the_largest(size: int, length: float) -> None:
    values = delta(size, length=length)
    decoded = through("topk", values)
    kept = set(decoded.nonzero().flatten().tolist())
    assert kept == set(values.abs().topk(-(-size // 16)).indices.tolist())
    where = sorted(kept)
    assert torch.allclose(decoded[where], values[where], rtol=2.0**-11, atol=0.0)


@pytest.mark.parametrize("size", [17, 1000, 5000])
def test_topk_takes_the_first_of_equal_ones(size: int) -> None:
    """All equal; and few large ones, which a sample of one in 16 misses or over-estimates."""
    num_kept = -(-size // 16)
    assert through("topk", torch.ones(size)).nonzero().flatten().tolist() == list(range(num_kept))
    spiked = torch.zeros(size)
    spiked[::16] = torch.arange(1.0, len(spiked[::16]) + 1)  # exactly the sampled ones
    assert torch.allclose(through("topk", spiked), spiked, rtol=1e-3)
    assert through("topk", torch.zeros(size)).tolist() == [0.0] * size


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_the_ends_of_float32(name: str) -> None:
    largest, smallest = float(np.finfo(np.float32).max), 1e-45
    for value in (0.0, -0.0, smallest, -smallest, 1e-38, 65504.0, 65520.0, 1e20, 1e38, largest, -largest):
        for values in (torch.full((130,), value), torch.nn.functional.pad(vector(value), (3, 70))):
            decoded = through(name, values)
            assert bool(torch.isfinite(decoded).all())
            assert bool((decoded.abs() <= values.abs() * 1.01 + 1e-38).all())
            assert bool((decoded * values >= 0).all())


def test_saturation() -> None:
    largest = float(np.finfo(np.float32).max)
    assert through("fp16", vector(1e6, -65520.0, 65519.0, 1.0)).tolist() == [65504.0, -65504.0, 65504.0, 1.0]
    bf16_largest = float(torch.finfo(torch.bfloat16).max)
    assert through("bf16", vector(largest, -largest, 1.0)).tolist() == [bf16_largest, -bf16_largest, 1.0]
    assert through("int8", vector(largest, -largest))[0].item() == 127 * 2.0**120
    assert through("int4", vector(1e37, -largest)).tolist()[1] == -7 * 2.0**120
    assert through("topk", vector(largest)).item() == 32752 * 2.0**113


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 64, 129])
def test_no_codec_takes_what_is_not_finite(name: str, value: float, index: int) -> None:
    values = delta(130)
    values[index] = value
    with pytest.raises(ValueError, match="not finite"):
        CODECS[name].encode(values)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "values", [torch.zeros(0), torch.zeros(2, 2), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2]]
)
def test_what_is_no_part_is_refused(name: str, values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a part is"):
        CODECS[name].encode(values)


@pytest.mark.parametrize("name", ALL)
def test_encoding_and_decoding_are_repeatable_and_leave_the_input(name: str) -> None:
    """At any address and alignment, into a new tensor or into part of another."""
    codec, values = CODECS[name], delta(70_000)
    before, data = values.clone(), bytes(codec.encode(values))
    shifted = torch.cat([torch.zeros(1), values])[1:]
    assert bytes(codec.encode(shifted)) == data
    assert torch.equal(values, before)
    decoded = codec.decode(data, 70_000)
    frame = memoryview(b"\x01" + data + b"\x02")[1:-1]  # odd, as in a message, and read-only
    whole = torch.full((70_003,), 7.0)
    out = whole[1:-2]
    assert codec.decode(frame, 70_000, out) is out
    assert out.numpy().tobytes() == decoded.numpy().tobytes()
    assert (whole[0].item(), whole[-2:].tolist()) == (7.0, [7.0, 7.0])
    with pytest.raises(ValueError, match="room"):
        codec.decode(data, 70_000, whole)


_COUNT_THREADS = """
import os, numpy, torch
from peer.aggregate import combine
from peer.compression import CODECS
from peer.outer import outer_step

values = torch.from_numpy(numpy.linspace(-1.0, 1.0, 1 << 17, dtype=numpy.float32))
before = len(os.listdir("/proc/self/task"))
for codec in CODECS.values():
    codec.decode(codec.encode(values), 1 << 17)
for rule in ("mean", "median"):
    combine(rule, [values] * 3, [1.0, 1.0, 2.0])
outer_step("plain", values, values, lr=0.5, momentum=0.0)
after = len(os.listdir("/proc/self/task"))
values + values
print(after - before, len(os.listdir("/proc/self/task")) - after)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_is_started_where_torch_alone_would() -> None:
    """In the network's thread, waiting for threads that finetuning keeps busy took 11 ms instead of 0.06."""
    output = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    by_ours, by_torch = map(int, output.split())
    assert by_ours == 0
    assert by_torch > 0  # so the count can tell


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1, 64, 100, 4096, 70_001])
def test_encoded_and_decoded_in_one_go(name: str, size: int) -> None:
    """Residuals come from the one, states from the other: they are hashed, so a zero's sign counts, too."""
    codec, values = CODECS[name], delta(size)
    values[::7] *= -1e-9  # rounded to zero from below
    data, decoded = codec.encode_and_decode(values)
    assert bytes(data) == bytes(codec.encode(values.clone()))
    data, decoded = codec.encode_and_decode(values)
    assert decoded.view(torch.int32).tolist() == codec.decode(data, size).view(torch.int32).tolist()


# Error feedback.


@pytest.mark.parametrize("name", LOSSY)
def test_error_feedback_loses_nothing(name: str) -> None:
    """50 rounds of one gradient: what arrived and what is kept are all of it; what is kept stops growing."""
    codec, num_rounds = CODECS[name], 50
    gradient = delta(1000)
    arrived, kept = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000)
    without = num_rounds * through(name, gradient).double()
    sizes = []
    for _ in range(num_rounds):
        kept += gradient
        data = codec.encode(kept)
        arrived += codec.decode(data, 1000).double()
        residual_into(kept, bytes(data), codec)
        sizes.append(float(kept.norm()))
    wanted = num_rounds * gradient.double()
    assert float((arrived + kept.double() - wanted).norm() / wanted.norm()) < 1e-6
    error, error_without = float((arrived - wanted).norm()), float((without - wanted).norm())
    assert error < error_without / 2
    assert max(sizes[40:]) < 1.5 * max(sizes[20:30])


# Hostile bytes.


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_size_is_refused(name: str) -> None:
    codec = CODECS[name]
    data = bytes(codec.encode(delta(100)))
    for wrong in (b"", data[:-1], data + b"\0"):
        with pytest.raises(ValueError, match="bytes, expected"):
            codec.decode(wrong, 100)
    with pytest.raises(ValueError, match="bytes, expected"):
        codec.decode(data, 10_000)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("fp32", struct.pack("<2f", 1.0, math.nan)),
        ("fp32", struct.pack("<2f", -math.inf, 1.0)),
        ("fp16", struct.pack("<2e", 1.0, math.nan)),
        ("fp16", struct.pack("<2e", 1.0, -math.inf)),
        ("bf16", bytes.fromhex("803f80ff")),
        ("bf16", bytes.fromhex("803fc07f")),
        *((name, bytes.fromhex(scale) + bytes(size)) for scale in ("817b", "807f", "c07f", "80bf", "0080")
          for name, size in (("int8", 64), ("int4", 32))),
        ("topk", struct.pack("<fHe", 1.0, 2, 1.0)),  # beyond the end
        ("topk", struct.pack("<fHe", math.nan, 0, 1.0)),
        ("topk", struct.pack("<fHe", math.inf, 0, 0.0)),
        ("topk", struct.pack("<fHe", 3e38, 0, 2.0)),
        ("topk", struct.pack("<fHe", 1.0, 0, math.inf)),
    ],
)  # fmt: skip
def test_data_that_no_encoder_makes_is_refused_and_writes_nothing(name: str, data: bytes) -> None:
    out = vector(5.0, 6.0)
    with pytest.raises(ValueError, match=r"not finite|scale|indices"):
        CODECS[name].decode(data, 2, out)
    assert out.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("indices", [(3, 3), (4, 3), (0, 32), (65_535, 0)])
def test_topk_refuses_indices_that_do_not_ascend(indices: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="indices"):
        CODECS["topk"].decode(struct.pack("<f2H2e", 1.0, *indices, 1.0, 1.0), 32)


@pytest.mark.parametrize("counts", [(4096, 0), (4098, 0), (0, 0), (2**32 - 1, 4098)])
def test_topk_refuses_counts_of_other_indices(counts: tuple[int, int]) -> None:
    """4097 of 65,537 values are kept; here the first 4097 of the first run."""
    low = np.arange(4097, dtype="<u2").tobytes()
    values = np.ones(4097, "<f2").tobytes()

    def part(first: int, second: int) -> bytes:
        return struct.pack("<f2I", 1.0, first, second) + low + values

    assert CODECS["topk"].decode(part(4097, 0), 65_537).sum() == 4097
    with pytest.raises(ValueError, match="counts"):
        CODECS["topk"].decode(part(*counts), 65_537)


def test_topk_beyond_a_run_of_indices() -> None:
    """The largest 12,289 of 196,609 values: all of the second run's last ones, and two of the other runs."""
    values = torch.zeros(3 * 65_536 + 1)
    values[2 * 65_536 - 12_287 : 2 * 65_536] = torch.arange(2.0, 12_289.0)
    values[0], values[-1] = 3e4, -3e4
    decoded = through("topk", values)
    assert torch.equal(decoded.nonzero(), values.nonzero())
    assert torch.allclose(decoded, values, rtol=2.0**-11, atol=0.0)


@given(st.data(), st.sampled_from(ALL), st.sampled_from([1, 5, 64, 70, 129]))
def test_any_bytes_give_finite_values_or_a_value_error(
    data: st.DataObject, name: str, num_values: int
) -> None:
    codec = CODECS[name]
    size = codec.size_bytes(num_values)
    raw = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.binary(max_size=2 * size)))
    try:
        decoded = codec.decode(raw, num_values)
    except ValueError:
        return
    assert len(raw) == size
    assert decoded.shape == (num_values,)
    assert bool(torch.isfinite(decoded).all())


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200))
def test_finite_values_come_back_finite(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    for name in ALL:
        decoded = through(name, values)
        assert bool(torch.isfinite(decoded).all())
        assert through(name, values).numpy().tobytes() == decoded.numpy().tobytes()
    assert through("fp32", values).numpy().tobytes() == values.numpy().tobytes()
