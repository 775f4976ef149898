"""A site's prologue inside the kernels that load its input."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns that a step of the loop over a row reads.
_STEP = tl.constexpr(1024)


@triton.jit
def inverse_rms(x_ptr, K: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean(x^2) + EPS) of a whole row x (K,), fp32: every program of a row computes the same."""
    total = tl.zeros((_STEP,), tl.float32)
    for start in tl.static_range(0, K, _STEP):
        k = start + tl.arange(0, _STEP)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total += x * x
    return 1.0 / tl.sqrt(tl.sum(total, axis=0) * (1.0 / K) + EPS)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation of fp32 x, by its name in `reference.ACTIVATIONS`."""
    if NAME == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(NAME == "gelu_tanh")
        # 1 + tanh(t) is 2 sigmoid(2 t).
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y
