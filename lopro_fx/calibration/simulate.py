"""Simulate a solved layer's operators while later layers are calibrated: stored numbers, in the model's dtype.

Packed weights are unpacked once instead of once a batch, which changes no result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from lopro_fx.kernels.formats.registry import dequantize
from lopro_fx.kernels.routed.reference import routed_linear
from lopro_fx.layer import Input, Layer, branch

# x (..., in_features) and a bias to (..., out_features), all of one dtype; of experts, x, ids and slots to what
# `lopro::routed_linear` gives.
Simulated = Callable[..., Tensor]


def simulated(shared: Input, layer: Layer, dtype: torch.dtype) -> Simulated:
    """Return `rotate`, `project`, `round_activation` and the format's linear as one function, for x of `dtype`."""
    return learned(shared, layer, None, dtype)


def learned(shared: Input, layer: Layer, weight: Tensor | None, dtype: torch.dtype) -> Simulated:
    """`simulated` with another dense weight (None: the layer's own), differentiable in it and in x.

    A rounded activation has the gradient of the identity.
    """
    weight = dequantize(layer.weight, dtype) if weight is None else weight.to(dtype)
    if layer.experts:
        return _experts(shared, layer, weight, dtype)
    low_rank = None
    if layer.up is not None and shared.down is not None:
        low_rank = shared.down.dense().to(dtype), layer.up.dense().to(dtype)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        moved = shared.transform.forward(x)
        y = linear(_rounded(shared, moved), weight, bias)
        return y if low_rank is None else y + linear(linear(moved, low_rank[0]), low_rank[1])

    return run


def _rounded(shared: Input, moved: Tensor) -> Tensor:
    if shared.activation is None:
        return moved
    rounded = shared.activation.forward(moved.detach())
    return moved + (rounded - moved.detach()) if moved.requires_grad else rounded


def _experts(shared: Input, layer: Layer, weight: Tensor, dtype: torch.dtype) -> Simulated:
    # Dense: a product with it has the values of the operator's two, up to rounding in `dtype`.
    dense = None if layer.up is None or shared.down is None else branch(shared.down, layer).to(dtype)

    def run(x: Tensor, ids: Tensor, slots: int) -> Tensor:
        moved = shared.transform.forward(x)
        y = routed_linear(_rounded(shared, moved), ids, weight, slots)
        return y if dense is None else y + routed_linear(moved, ids, dense, slots)

    return run
