"""The compiled search, for fp32 tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lopro_fx.kernels.cpu.native import call
from lopro_fx.kernels.formats.trellis.code import table


def encode(
    columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor, importance: Tensor, strips: Sequence[int],
    step: int, pair: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.encode`."""
    width, rows = columns.shape
    error, states = columns.new_empty(width, rows), columns.new_empty(width // pair, rows, dtype=torch.int16)
    counts = torch.tensor(strips, dtype=torch.int64, device="cpu")
    read = [t.contiguous() for t in (columns, target.clone(), upper, pivots, importance)]
    call("lopro_trellis_encode", width, rows, step, pair, window, counts, len(counts), *read, _values(window, pair),
         error, states)  # fmt: skip
    return error, states


@cache
def _values(window: int, pair: int) -> Tensor:
    return table(window, pair).T.contiguous()
