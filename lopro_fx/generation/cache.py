"""Keys and values in 8 or 4 bits: a step and an offset for each token and head, beside the codes in one tensor.

A row of `width` numbers is `width * bits / 8` bytes of codes, then the upper halves of two fp32 numbers: the step and
the least value. Both are rounded outwards, so that the range holds every number of the row. All is plain arithmetic on
elements, which compilers merge into the attention's loops.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (0, 4, 8)
# Bytes of a row's step and least value.
_BESIDE = 4
# Largest relative error of the upper half of an fp32 number. A number that may be cut is moved outwards by twice that.
_SLACK = 2.0**-7


def stored_width(width: int, bits: int) -> int:
    """Bytes of a row of `width` numbers, which is even; with bits = 0, the numbers themselves."""
    return width if bits == 0 else width * bits // 8 + _BESIDE


def stored(x: Tensor, bits: int) -> Tensor:
    """Round x (..., width) of any float dtype to uint8 (..., stored_width); NaN and infinity give garbage rows."""
    wide = x.to(torch.float32)
    low = wide.amin(-1, keepdim=True)
    low = _upper(low - low.abs() * (2 * _SLACK))
    top = (1 << bits) - 1
    step = (wide.amax(-1, keepdim=True) - low) / top
    step = _upper(step * (1 + 2 * _SLACK))
    codes = torch.where(step > 0, (wide - low) / torch.where(step > 0, step, 1.0), 0.0).round().clamp(0, top)
    codes = codes.to(torch.uint8)
    if bits == 4:
        first, last = codes.chunk(2, -1)
        codes = first | (last << 4)
    return torch.cat([codes, *_bytes(step), *_bytes(low)], -1)


def restored(rows: Tensor, width: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `stored`: uint8 (..., stored_width) to (..., width) of `dtype`."""
    codes = rows[..., :-_BESIDE]
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    step, low = _number(rows[..., -4:-2]), _number(rows[..., -2:])
    return (codes[..., :width].to(torch.float32) * step + low).to(dtype)


def _upper(x: Tensor) -> Tensor:
    """fp32 cut to its upper half."""
    return ((x.view(torch.int32) >> 16) << 16).view(torch.float32)


def _bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    upper = x.view(torch.int32) >> 16
    return (upper & 255).to(torch.uint8), ((upper >> 8) & 255).to(torch.uint8)


def _number(pair: Tensor) -> Tensor:
    low, high = pair[..., :1].to(torch.int32), pair[..., 1:].to(torch.int32)
    return ((low << 16) | (high << 24)).view(torch.float32)
