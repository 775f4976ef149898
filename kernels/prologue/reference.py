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


def prologue(
    x: Tensor, perm: Tensor | None, norm: Tensor | None, eps: float, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Compute activation(gate) * x, then x / sqrt(mean(x^2) + eps), gathered by `perm`, * norm; each if given.

    The norm's weight is in the order of the gathered columns, so that a kernel needn't wait for `perm` to load it.

    Args:
        x: (..., n) floating point; narrower types are computed in fp32 and rounded once.
        perm: as in `lopro::rotate`; nothing is gathered without a norm.
        norm: (n,), the weight of an RMS norm over the last dimension.
        eps: of that norm.
        gate: of x's shape.
        activation: of the gate, one of `ACTIVATIONS`.

    Returns:
        A tensor of x's shape and dtype (x itself without norm and gate), and the permutation that is still to apply.
    """
    if norm is None and gate is None:
        return x, perm
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    if gate is not None:
        wide = ACTIVATIONS[activation](gate.to(wide.dtype)) * wide
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if perm is not None:
            wide, perm = wide.index_select(-1, perm.to(torch.int32)), None
        wide = wide * norm.to(wide.dtype)
    return wide.to(x.dtype), perm
