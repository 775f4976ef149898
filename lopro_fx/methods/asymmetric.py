"""Asymmetric target: weights that make up for the drift of their inputs.

Layers before have been quantised, so a layer reads x where the unquantised model reads x0. With a = 1,

    W* = W + a W E[(x0 - x) xᵀ] H⁻¹

is the least-squares answer of the unquantised output, W x0, on x (GPTAQ 2504.02692; Qronos 2505.11695). All of it
overfits to the calibration text: a part of it, damped, is better on other text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.methods.ldlq import damped
from lopro_fx.methods.observers import Statistics

_DAMP = 0.2


def compensated(weight: Tensor, stats: Statistics, part: float) -> Tensor:
    """Return W* fp32 (m, n) for the part `part`, by the Gram and the drift of `stats`."""
    if not stats.tokens or not stats.drift.any():
        return weight
    # Few tokens say little of the drift too, see `prior`.
    damp = _DAMP + (weight.shape[1] / max(stats.distinct, 1)) ** 2
    return weight + part * torch.linalg.solve(damped(stats.gram, damp), (weight @ stats.drift).T).T
