"""What is assumed of directions that calibration saw little or nothing of: that they count as much as the mean one.

Least squares has no answer there, and any answer that fits calibration explodes on other text. With n features and t
distinct tokens, (n / t)² times the mean diagonal is added to the Gram: nothing beside the rounding's own damping once
tokens are many times the features, and all but the data-free Gram where they are few.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lopro_fx.methods.observers import Gram, Statistics

# Part of the mean diagonal that both factors of a low-rank branch are fitted with. It is ten times that of the
# rounding: a factor grows without bound in directions that calibration hardly saw, and other text does see them.
FACTOR_DAMP = 0.1


def informed(stats: Statistics) -> Statistics:
    """Statistics whose Gram holds the prior, in a unit in which its mean diagonal is 1 to 2; identity for all zeros."""
    gram, n = stats.gram, stats.gram.shape[0]
    mean = gram.diagonal().mean().item()
    if not mean > 0:
        return _with(stats, torch.eye(n, dtype=gram.dtype, device=gram.device))
    gram = gram * 2.0 ** (1 - math.frexp(mean)[1])
    if stats.tokens:
        gram.diagonal().add_((n / max(stats.distinct, 1)) ** 2 * gram.diagonal().mean())
    return _with(stats, gram)


def _with(stats: Statistics, gram: Tensor) -> Statistics:
    return replace(stats, values={**stats.values, Gram.name: gram})
