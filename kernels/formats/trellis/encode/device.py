"""The search for tensors of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels.formats.trellis.encode.triton import encode_kernel

# Costs of a thread: 2^WINDOW of them are spread over this many threads at most.
_THREADS = 512


def encode(
    columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor, importance: Tensor, strips: Sequence[int],
    step: int, pair: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.encode`."""
    width, rows = columns.shape
    most = max(strips)
    counts = torch.tensor(strips, dtype=torch.int32, device=columns.device)
    firsts = torch.tensor([0, *accumulate(strips)][:-1], dtype=torch.int32, device=columns.device)
    back = torch.empty(len(strips), most, 1 << (window - step), dtype=torch.uint8, device=columns.device)
    error = torch.empty_like(columns, memory_format=torch.contiguous_format)
    states = torch.empty(width // pair, rows, dtype=torch.int32, device=columns.device)
    wrap_triton(encode_kernel)[(len(strips),)](
        columns.contiguous(), target.clone(memory_format=torch.contiguous_format), upper.contiguous(),
        pivots.contiguous(), importance.contiguous(), firsts, counts, back, error, states, rows, most, WIDTH=width,
        STEP=step, PAIR=pair, WINDOW=window, BLOCK_M=256, num_warps=_THREADS // 32,
    )  # fmt: skip
    return error, states.to(torch.int16)
