"""The definition of a site's prologue, plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def prologue(x: Tensor, norm: Tensor | None, eps: float, gate: Tensor | None, activation: str) -> Tensor:
    """activation(gate) * x, then x / sqrt(mean(x^2) + eps) * norm; each where its operand is given.

    Args:
        x: (..., n) floating point; narrower types are computed in fp32 and rounded once.
        norm: (n,), the weight of an RMS norm over the last dimension.
        eps: of that norm.
        gate: of x's shape.
        activation: of the gate, one of `ACTIVATIONS`.

    Returns:
        A tensor of x's shape and dtype; x itself without a norm and a gate.
    """
    if norm is None and gate is None:
        return x
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    if gate is not None:
        wide = ACTIVATIONS[activation](gate.to(wide.dtype)) * wide
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm.to(wide.dtype)
    return wide.to(x.dtype)
