"""Is the outer step what its papers say, and the same bits wherever it is computed?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peer import outer
from peer.outer import buffer_names, num_buffers, outer_step

KINDS = ["plain", "nesterov", "adam"]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def random_vector(size: int, seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def step(
    kind: str, state: torch.Tensor, delta: torch.Tensor, lr: float = 1.0, momentum: float = 0.5
) -> torch.Tensor:
    return outer_step(kind, state, delta, lr=lr, momentum=momentum)


def test_buffers_sort_behind_every_tensor_of_a_model() -> None:
    assert [num_buffers(kind) for kind in KINDS] == [0, 1, 2]
    assert buffer_names("adam") == ("~outer.m", "~outer.v")
    for kind in KINDS:
        names = ["zzz.weight", "encoder.layer.0.weight", *buffer_names(kind)]
        assert sorted(names)[2:] == list(buffer_names(kind))


def test_plain_by_hand() -> None:
    assert step("plain", vector(1.0, 2.0), vector(4.0, -1.0)).tolist() == [5.0, 1.0]
    assert step("plain", vector(1.0, 2.0), vector(4.0, -1.0), lr=0.5).tolist() == [3.0, 1.5]


def test_plain_with_lr_1_is_the_sum_to_the_bit() -> None:
    state, delta = random_vector(5000, 0), 1e-3 * random_vector(5000, 1)
    assert step("plain", state, delta).numpy().tobytes() == (state + delta).numpy().tobytes()


def test_nesterov_by_hand() -> None:
    """u = 0.5 x 2 + 4 = 5; x = 1 + 0.1 x (4 + 0.5 x 5) = 1.65."""
    assert step("nesterov", vector(1.0, 2.0), vector(4.0), lr=0.1).tolist() == [
        pytest.approx(1.65, abs=1e-6),
        5.0,
    ]


def test_adam_by_hand() -> None:
    """m = 0.5 x 2 + 0.5 x 4 = 3; v = 0.99 x 100 + 0.01 x 16 = 99.16; x = 1 + 0.1 x 3 / (9.958 + 0.001)."""
    after = step("adam", vector(1.0, 2.0, 100.0), vector(4.0), lr=0.1)
    assert after[1].item() == 3.0
    assert after[2].item() == pytest.approx(99.16, rel=1e-6)
    assert after[0].item() == pytest.approx(1.0 + 0.1 * 3.0 / (math.sqrt(99.16) + 0.001), rel=1e-6)


def test_adam_from_zero_buffers_stays_bounded() -> None:
    """A first delta far above tau moves by lr (1 - b1) / sqrt(1 - b2); of zero by nothing."""
    after = step("adam", torch.zeros(6), vector(1e6, 0.0), lr=0.01, momentum=0.9)
    assert after[0].item() == pytest.approx(0.01 * 0.1 / 0.1, rel=1e-4)
    assert after[1].item() == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nesterov_is_that_of_torch(momentum: float) -> None:
    size = 1000
    parameter = torch.nn.Parameter(random_vector(size, 0))
    state = torch.cat([parameter.detach().clone(), torch.zeros(size)])
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for round_ in range(1, 21):
        delta = 0.1 * random_vector(size, round_)
        parameter.grad = -delta
        optimizer.step()
        state = outer_step("nesterov", state, delta, lr=0.7, momentum=momentum)
    assert torch.allclose(state[:size], parameter.detach(), rtol=0.0, atol=1e-6)


def test_adam_against_float64() -> None:
    size = 1000
    state = torch.cat([random_vector(size, 0), torch.zeros(2 * size)])
    x, m, v = state.double().numpy().reshape(3, size).copy()
    for round_ in range(1, 21):
        delta = 0.01 * random_vector(size, round_)
        state = outer_step("adam", state, delta, lr=0.01, momentum=0.9)
        d = delta.double().numpy()
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d
        x = x + 0.01 * m / (np.sqrt(v) + 1e-3)
    assert np.allclose(state.double().numpy(), np.concatenate([x, m, v]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_out_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1000
    state = torch.cat([random_vector(size, 0), random_vector(size * num_buffers(kind), 1).abs()])
    delta = random_vector(size, 2)
    before = state.clone()
    whole = step(kind, state, delta, lr=0.3)
    assert torch.equal(state, before)  # not changed
    monkeypatch.setattr(outer, "CHUNK_VALUES", 333)
    assert step(kind, state, delta, lr=0.3).numpy().tobytes() == whole.numpy().tobytes()
    assert outer_step(kind, state, delta, lr=0.3, momentum=0.5, out=state) is state
    assert state.numpy().tobytes() == whole.numpy().tobytes()


def test_every_operation_is_rounded_by_itself() -> None:
    """Pinned to float64 rounded to float32 after each operation, which is exact for + - x / and roots."""

    def f32(value: float) -> float:
        return float(np.float32(value))

    size = 200
    state = torch.cat([random_vector(size, 0), random_vector(size, 1), random_vector(size, 2).abs()])
    delta = random_vector(size, 3)
    after = step("adam", state, delta, lr=0.3, momentum=0.9).reshape(3, size).T.tolist()
    beta1, rest1, beta2, rest2 = f32(0.9), f32(1.0 - 0.9), f32(0.99), f32(1.0 - 0.99)
    for (x, m, v), d, new in zip(state.reshape(3, size).T.tolist(), delta.tolist(), after, strict=True):
        m = f32(f32(m * beta1) + f32(d * rest1))
        v = f32(f32(v * beta2) + f32(f32(d * d) * rest2))
        move = f32(m / f32(f32(math.sqrt(v)) + f32(1e-3)))
        assert new == [f32(x + f32(move * f32(0.3))), m, v]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_sizes(kind: str) -> None:
    rows = 1 + num_buffers(kind)
    with pytest.raises(ValueError, match="state"):
        step(kind, torch.zeros(4 * rows + 1), torch.zeros(4))
    with pytest.raises(ValueError, match="state"):
        step(kind, torch.zeros(4 * rows, dtype=torch.float64), torch.zeros(4))
    with pytest.raises(ValueError, match="delta"):
        step(kind, torch.zeros(4 * rows), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="next state"):
        outer_step(kind, torch.zeros(rows), torch.zeros(1), lr=1.0, momentum=0.0, out=torch.zeros(7))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="lion"):
        num_buffers("lion")
    with pytest.raises(ValueError, match="lion"):
        step("lion", torch.zeros(1), torch.zeros(1))
