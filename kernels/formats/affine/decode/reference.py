"""The definition of the decode operators, plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.activation.reference import integers
from lopro_fx.kernels.formats.affine.packing.format import WORD
from lopro_fx.kernels.rotate.reference import rotate

FIXED_TOP = 32767


def fixed_point(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """16-bit block fixed point of x (M, K): `activation.reference.integers`, as int32."""
    fixed, step = integers(x, FIXED_TOP, group)
    return fixed.to(torch.int32), step


def prepare(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """`words` and `steps` of `lopro::decode_prepare`."""
    m, k = x.shape
    fixed, step = fixed_point(rotate(x.to(torch.float32), perm, signs, block, 0), group)
    steps = torch.stack([step, step * fixed.sum(-1)], 1)
    width = 2 if bits == 3 else bits
    count, fields = -(-k // WORD) * width, 8 // width
    flat = torch.nn.functional.pad(fixed.flatten(1), (0, 4 * fields * count))[:, : 4 * fields * count]
    flat = flat.view(m, count, 4, fields)
    place = 8 * torch.arange(4, dtype=torch.int32, device=x.device).view(4, 1)
    high, low = (((part & 255).to(torch.int64) << place).sum(2) for part in (flat >> 8, flat))
    return torch.stack([high, low], 1).transpose(2, 3).to(torch.int32).contiguous(), steps
