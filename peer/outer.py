"""What is done with the fused delta? The outer step from one round's state to the next.

A state is one flat vector: the backbone, then the optimizer's buffers, each as long as the backbone, in the
order of `buffer_names`. All buffers of round 0 are zeros. The fused delta is minus the outer gradient.

| kind | buffers | step, with x the backbone, d the delta |
|---|---|---|
| plain | none | x + lr d; with lr 1 the fusion of ColD Fusion (section 3) |
| nesterov | velocity u | u <- mu u + d; x <- x + lr (d + mu u) |
| adam | m, v | m <- b1 m + (1 - b1) d; v <- b2 v + (1 - b2) d d; x <- x + lr m / (sqrt(v) + tau) |

nesterov is DiLoCo's (Douillard et al. 2023, algorithm 1) in the form of PyTorch's SGD, mu the spec's
momentum.

adam is FedAdam (Reddi et al. 2021, algorithm 2): no bias correction, b1 the spec's momentum, b2 0.99, tau
0.001; v starts at 0. Its lr is a length: where |d| is far below tau, one step moves by lr (1 - b1) d / tau,
so lr of about tau is a gentle start.

Deterministic across machines: float32, element by element, each product, sum, quotient and root rounded by
itself as IEEE 754 says. numpy's square root is the processor's; torch's may be a library's that is only
nearly right, and so its last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_Array = np.ndarray[Any, Any]

ADAM_BETA2 = 0.99
ADAM_TAU = 1e-3
CHUNK_VALUES = 1 << 20  # in work at once: 4 MB for each temporary, however long the state is
_BUFFERS = {"plain": (), "nesterov": ("~outer.velocity",), "adam": ("~outer.m", "~outer.v")}
OUTER_OPTIMIZERS = tuple(_BUFFERS)


def buffer_names(kind: str) -> tuple[str, ...]:
    """In the order of the state; as names of tensors they sort behind those of a model. Raises ValueError."""
    if kind not in _BUFFERS:
        raise ValueError(f"unknown outer optimizer {kind!r}")
    return _BUFFERS[kind]


def num_buffers(kind: str) -> int:
    return len(buffer_names(kind))


def outer_step(
    kind: str,
    state: torch.Tensor,
    fused_delta: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next state, in `out` where given, which may be `state` itself.

    state, out: (B x (1 + num_buffers),), fused_delta: (B,), float32. Raises ValueError for other sizes or
    kinds.
    """
    rows = 1 + num_buffers(kind)
    out = torch.empty_like(state) if out is None else out
    _check(state, fused_delta, out, rows)
    old, new = state.numpy().reshape(rows, -1), out.numpy().reshape(rows, -1)
    delta, step = fused_delta.numpy(), np.empty(min(CHUNK_VALUES, fused_delta.numel()), np.float32)
    for start in range(0, delta.size, CHUNK_VALUES):
        part = slice(start, min(start + CHUNK_VALUES, delta.size))
        work = step[: part.stop - part.start]
        if kind == "nesterov":
            _nesterov(old[1, part], new[1, part], delta[part], work, np.float32(momentum))
        elif kind == "adam":
            _adam(old[1:, part], new[1:, part], delta[part], work, momentum)
        else:
            np.copyto(work, delta[part])
        work *= np.float32(lr)
        np.add(old[0, part], work, out=new[0, part])
    return out


def _nesterov(old: _Array, new: _Array, delta: _Array, step: _Array, momentum: np.float32) -> None:
    np.multiply(old, momentum, out=new)
    new += delta
    np.multiply(new, momentum, out=step)
    step += delta


def _adam(old: _Array, new: _Array, delta: _Array, step: _Array, beta1: float) -> None:
    first, second = new
    np.multiply(delta, np.float32(1.0 - beta1), out=step)
    np.multiply(old[0], np.float32(beta1), out=first)
    first += step
    np.multiply(delta, delta, out=step)
    step *= np.float32(1.0 - ADAM_BETA2)
    np.multiply(old[1], np.float32(ADAM_BETA2), out=second)
    second += step
    np.sqrt(second, out=step)
    step += np.float32(ADAM_TAU)
    np.divide(first, step, out=step)


def _check(state: torch.Tensor, fused_delta: torch.Tensor, out: torch.Tensor, rows: int) -> None:
    for name, tensor, size in [
        ("delta", fused_delta, fused_delta.numel()),
        ("state", state, rows * fused_delta.numel()),
        ("next state", out, rows * fused_delta.numel()),
    ]:
        if tensor.shape != (size,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"the {name} is no contiguous float32 vector of {size} values")
