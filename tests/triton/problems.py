"""Random packed sites of any size, and trellis weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.packing.format import group_count, pack
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.kernels.rotate.reference import pack_signs
from tests.helpers import generator


@dataclass(frozen=True)
class Problem:
    """Arguments of `lopro::packed_site`, in its order."""

    x: Tensor
    perm: Tensor | None
    signs: Tensor | None
    block: int
    skip: int
    down: Tensor | None
    down_scale: Tensor | None
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    up: Tensor | None
    up_scale: Tensor | None
    bits: int
    group_size: int

    def args(self, device: torch.device | str = "cpu") -> tuple:
        """On a device."""
        return tuple(v.to(device) if isinstance(v, Tensor) else v for v in self.__dict__.values())


def problem(
    m: int, k: int, n: int, bits: int, group_size: int, *, rank: int = 0, block: int = 1, skip: int = 0,
    permuted: bool = False, signed: bool = True, biased: bool = False, factor_bits: int = 8, parts: int = 1,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Problem:  # fmt: skip
    """Activations (m, k) with a few outliers, a weight (n, k), factors of `rank` whose up-scales differ in `parts`."""
    rng = generator(seed)
    groups = group_count(k, group_size)
    x = torch.randn(m, k, generator=rng)
    x[:, torch.randint(0, k, (2,), generator=rng)] *= 30
    perm = torch.randperm(k, generator=rng).to(torch.int16) if permuted else None
    signs = pack_signs(torch.randint(0, 2, (k,), generator=rng) * 2 - 1) if signed and block > 1 else None
    down = up = down_scale = up_scale = None
    if rank and factor_bits == 8:
        down = torch.randint(-127, 128, (rank, k), generator=rng, dtype=torch.int8)
        up = torch.randint(-127, 128, (n, rank), generator=rng, dtype=torch.int8)
        down_scale, up_scale = ((torch.rand(rows, rank, generator=rng) / 500 + 1e-3).half() for rows in (1, parts))
        down_scale, up_scale = down_scale[0], up_scale if parts > 1 else up_scale[0]
    elif rank:
        down, up = (torch.randn(shape, generator=rng).half() / 8 for shape in ((rank, k), (n, rank)))
    return Problem(
        x.to(dtype), perm, signs, block, skip, down, down_scale,
        pack(torch.randint(0, 1 << bits, (n, k), generator=rng), bits),
        (torch.rand(n, groups, generator=rng) / (1 << bits) + 0.01).half(),
        pack(torch.randint(0, 1 << bits, (n * groups,), generator=rng), bits),
        torch.randn(n, generator=rng).to(dtype) if biased else None, up, up_scale, bits, group_size,
    )  # fmt: skip


def trellis_weight(
    n: int, k: int, bits: float, columns: int, strip: int, *, dtype: torch.dtype = torch.float16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales (n,) of `dtype` and codes of a trellis weight (n, k); bits after the last row are random too."""
    rng = generator(seed)
    words = code_words((n, k), round(bits * columns), columns, strip)
    codes = torch.randint(-(2**31), 2**31, (words,), generator=rng, dtype=torch.int32)
    return (torch.rand(n, generator=rng) / 16 + 0.01).to(dtype), codes
