"""The definition of `lopro::routed_linear`, plain ATen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def by_expert(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has rows, and those rows: int64, rising.

    Args:
        ids: int64 or int32 (rows,).
        experts: number of experts.

    Raises:
        ValueError: an id is not in [0, experts).
    """
    if not ids.numel():
        return
    least, most = ids.min().item(), ids.max().item()
    if least < 0 or most >= experts:
        raise ValueError(f"expert ids are {least} to {most}, and there are {experts} experts")
    counts = torch.bincount(ids, minlength=experts).tolist()
    for expert, rows in enumerate(ids.argsort(stable=True).split(counts)):
        if rows.numel():
            yield expert, rows


def routed_linear(x: Tensor, ids: Tensor, weight: Tensor, slots: int) -> Tensor:
    """Multiply each token by the weights of its experts.

    Args:
        x: (tokens, in_features).
        ids: int64 or int32 (tokens * slots,), the experts of a token beside one another.
        weight: (experts, out_features, in_features) of x's dtype.
        slots: experts of a token.

    Returns:
        (tokens * slots, out_features) of x's dtype.

    Raises:
        ValueError: an id is none of an expert, or the shapes don't fit.
    """
    require_fit(x, ids, weight.shape[0], weight.shape[2], slots)
    y = x.new_zeros(ids.shape[0], weight.shape[1])
    for expert, rows in by_expert(ids, weight.shape[0]):
        y[rows] = torch.nn.functional.linear(x[rows // slots], weight[expert])
    return y


def require_fit(x: Tensor, ids: Tensor, experts: int, in_features: int, slots: int) -> None:
    """Require operands that fit `experts` weights of `in_features` columns.

    Raises:
        ValueError: they don't.
    """
    if x.dim() != 2 or ids.dim() != 1 or x.shape[1] != in_features or slots < 1 or ids.shape[0] != x.shape[0] * slots:
        raise ValueError(
            f"{experts} experts of {in_features} columns: x is {tuple(x.shape)} and ids {tuple(ids.shape)} with "
            f"{slots} slots; give (tokens, {in_features}) and (tokens * slots,)"
        )
