"""Keys and values in 8 or 4 bits: a step and an offset for each token and head, beside the codes in one tensor.

A row of `width` numbers is `width * bits / 8` bytes of codes, then the upper two bytes of the step and the upper three
of the least value, as fp32. Both are cut outwards, so that the range holds every number of the row. All is plain
arithmetic on elements, which compilers merge into the attention's loops.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (0, 4, 8)
# Bytes of a row's step and least value.
_BESIDE = 5
# Largest relative error of the upper two and three bytes of an fp32 number; a number is moved outwards by twice that
# before it is cut.
_OF_TWO, _OF_THREE = 2.0**-7, 2.0**-15


def stored_width(width: int, bits: int) -> int:
    """Bytes of a row of `width` numbers, which is even; with bits = 0, the numbers themselves."""
    return width if bits == 0 else width * bits // 8 + _BESIDE


def stored(x: Tensor, bits: int) -> Tensor:
    """Round x (..., width) of any float dtype to uint8 (..., stored_width); NaN and infinity give garbage rows."""
    wide, top = x.to(torch.float32), (1 << bits) - 1
    low = wide.amin(-1, keepdim=True)
    low = _cut(low - low.abs() * (2 * _OF_THREE), 3)
    # Divided first: the difference of two numbers may be beyond fp32.
    step = wide.amax(-1, keepdim=True) / top - low / top
    step = _cut(step * (1 + 2 * _OF_TWO), 2)
    codes = torch.where(step > 0, (wide - low) / torch.where(step > 0, step, 1.0), 0.0).round().clamp(0, top)
    codes = codes.to(torch.uint8)
    if bits == 4:
        first, last = codes.chunk(2, -1)
        codes = first | (last << 4)
    return torch.cat([codes, *_bytes(step, 2), *_bytes(low, 3)], -1)


def restored(rows: Tensor, width: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `stored`: uint8 (..., stored_width) to (..., width) of `dtype`."""
    codes = rows[..., :-_BESIDE]
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    step, low = _number(rows[..., -5:-3]), _number(rows[..., -3:])
    most = torch.finfo(dtype).max
    return (codes[..., :width].to(torch.float32) * step + low).clamp(-most, most).to(dtype)


def _cut(x: Tensor, count: int) -> Tensor:
    """fp32 cut to its upper `count` bytes."""
    gone = 8 * (4 - count)
    return ((x.view(torch.int32) >> gone) << gone).view(torch.float32)


def _bytes(x: Tensor, count: int) -> list[Tensor]:
    """The upper `count` bytes of fp32, the lowest first."""
    whole = x.view(torch.int32)
    return [((whole >> 8 * place) & 255).to(torch.uint8) for place in range(4 - count, 4)]


def _number(rows: Tensor) -> Tensor:
    """fp32 (..., 1) from its upper bytes."""
    count = rows.shape[-1]
    parts = [rows[..., place : place + 1].to(torch.int32) << 8 * (4 - count + place) for place in range(count)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole | part
    return whole.view(torch.float32)
