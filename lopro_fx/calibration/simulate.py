"""Simulate a solved layer's operators while later layers are calibrated: stored numbers, in the model's dtype.

Packed weights are unpacked once instead of once a batch, which changes no result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from lopro_fx.kernels.formats.registry import dequantize
from lopro_fx.layer import Input, Layer

# x (..., in_features) and a bias to (..., out_features), all of one dtype.
Simulated = Callable[[Tensor, Tensor | None], Tensor]


def simulated(shared: Input, layer: Layer, dtype: torch.dtype) -> Simulated:
    """Return `rotate`, `project`, `round_activation` and the format's linear as one function, for x of `dtype`."""
    weight = dequantize(layer.weight, dtype)
    branch = None
    if layer.up is not None and shared.down is not None:
        branch = shared.down.dense().to(dtype), layer.up.dense().to(dtype)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        moved = shared.transform.forward(x)
        rounded = moved if shared.activation is None else shared.activation.forward(moved)
        y = linear(rounded, weight, bias)
        return y if branch is None else y + linear(linear(moved, branch[0]), branch[1])

    return run
