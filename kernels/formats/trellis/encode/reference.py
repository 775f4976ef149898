"""The search in plain ATen: the definition of the compiled one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lopro_fx.kernels.formats.trellis.code import table


def search(
    first: Tensor, second: Tensor, carry: float, weight: Tensor, ratio: float, step: int, values: Tensor
) -> Tensor:
    """States of one column of a strip, or of a pair of columns, by least weighted squared error.

    The error of a row is `weight * (e² + ratio * (second + carry * e - v1)²)` with `e = first - v0`; v0 and v1 are the
    values of its state.

    Args:
        first, second, weight: fp32 (rows,).
        carry, ratio: of a pair; 0 for one column.
        step: new bits of a row. The last row is the first step; state 0 comes before it.
        values: fp32 (2^window, 1 or 2).

    Returns:
        int64 (rows,).
    """
    size, device = values.shape[0], first.device
    prefixes = size >> step
    cost = torch.full((size,), torch.inf, dtype=torch.float32, device=device)
    cost[0] = 0
    winners = torch.empty(len(first), prefixes, dtype=torch.int64, device=device)
    for row in range(len(first) - 1, -1, -1):
        least, winners[row] = cost.view(1 << step, prefixes).min(0)
        error = first[row] - values[:, 0]
        squared = error.square()
        if values.shape[1] == 2:
            squared = squared + ratio * (second[row] + carry * error - values[:, 1]).square()
        cost = least.repeat_interleave(1 << step) + weight[row] * squared
    states, state = torch.empty(len(first), dtype=torch.int64, device=device), cost.argmin()
    for row in range(len(first)):
        states[row] = state
        prefix = state >> step
        state = winners[row][prefix] * prefixes + prefix
    return states


def encode(
    columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor, importance: Tensor, strips: Sequence[int],
    step: int, pair: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Round a block of columns, one (or a pair) after another, with feedback.

    Args:
        columns: fp32 (width, rows), transposed weights in units of their rows' scales; width is a multiple of `pair`.
        target: the same with the feedback of earlier blocks; it is changed.
        upper: fp32 (width, width) unit upper triangular.
        pivots: fp32 (width,).
        importance: fp32 (rows,), weights of the rows' squared errors.
        strips: rows of each strip.
        step, pair, window: of the code.

    Returns:
        `columns` less the rounded values, fp32 (width, rows), and states, int16 (width / pair, rows), to be read as
        unsigned.
    """
    values = table(window, pair).to(columns.device)
    error, states = (
        torch.empty_like(columns),
        torch.empty(len(columns) // pair, columns.shape[1], dtype=torch.int64, device=columns.device),
    )
    for j in range(0, len(columns), pair):
        carry = float(upper[j, j + 1]) if pair == 2 else 0.0
        ratio = float(pivots[j + 1] / pivots[j]) if pair == 2 else 0.0
        # The target of the second column, but for its part in the first one's rounding error.
        second = target[j + 1] + carry * (columns[j] - target[j]) if pair == 2 else target[j]
        parts = zip(
            target[j].split(list(strips)), second.split(list(strips)), importance.split(list(strips)), strict=True
        )
        states[j // pair] = torch.cat([search(a, b, carry, w, ratio, step, values) for a, b, w in parts])
        error[j : j + pair] = columns[j : j + pair] - values[states[j // pair]].T
        target[j + pair :] += upper[j : j + pair, j + pair :].T @ error[j : j + pair]
    return error, states.to(torch.int16)
