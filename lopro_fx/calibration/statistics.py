"""What calibration measures of the tensor that a group of Linears reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.errors import CalibrationError


@dataclass(frozen=True)
class Statistics:
    """`gram` fp32 (n, n) = E[x xᵀ], `magnitude` fp32 (n,) = E|x|, `tokens` rows counted; tokens = 0 is data-free.

    `rows` fp32 (m,) weighs the error of each output feature of all Linears; None counts them the same.
    """

    gram: Tensor
    magnitude: Tensor
    tokens: int
    rows: Tensor | None = None


def data_free(in_features: int) -> Statistics:
    """Identity Gram: every input direction counts the same."""
    return Statistics(torch.eye(in_features), torch.ones(in_features), 0)


def measure(
    inputs: Sequence[Tensor],
    name: str,
    node: str,
    token_clip: float = 0,
    importance: Sequence[Tensor] | None = None,
) -> Statistics:
    """Accumulate over batches; each input is (..., n) of any float dtype.

    `importance`, fp32 (tokens,) for each batch, weighs tokens in the Gram. After that, a token whose squared norm is
    above `token_clip` times the median is scaled down to that, again in the Gram only (0: no token is). One
    attention-sink token may be 10⁵ times larger than the rest: unclipped, it is the whole Gram, and the damping that is
    relative to it drowns every other token.

    Raises:
        CalibrationError: a value is NaN or infinite; names the node, the layer that reads it and the batch.
    """
    n = inputs[0].shape[-1]
    norms = [batch.reshape(-1, n).to(torch.float32).square().sum(1) for batch in inputs]
    weights = importance or [torch.ones(len(norm)) for norm in norms]
    every = torch.cat(norms) * torch.cat(list(weights))
    # Zero tokens, such as padding, would make the median zero where they are the most.
    limit = token_clip * (every[every > 0].median() if every.any() else 0)
    gram, magnitude, tokens = torch.zeros(n, n), torch.zeros(n), 0
    for index, (batch, norm, weight) in enumerate(zip(inputs, norms, weights, strict=True)):
        if not torch.isfinite(norm).all():
            row = int((~torch.isfinite(norm)).nonzero()[0])
            raise CalibrationError(
                f"node '{node}', read by '{name}', is not finite in calibration batch {index}, row {row}; look for an "
                "overflow before it (try --dtype float32) or a damaged weight"
            )
        rows = batch.reshape(-1, n).to(torch.float32)
        magnitude += rows.abs().sum(0)
        tokens += rows.shape[0]
        if token_clip:
            weight = weight * (limit / (norm * weight).clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
        if token_clip or importance:
            rows = rows * weight.sqrt().unsqueeze(1)
        gram.addmm_(rows.T, rows)
    count = max(tokens, 1)
    return Statistics(gram / count, magnitude / count, tokens)
