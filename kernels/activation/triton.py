"""`reference.integers` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.activation.reference import LEAST as _LEAST

LEAST = tl.constexpr(_LEAST)
# Adding it rounds a number below 2^22 to an integer, halves to even: the sum has no bits for a fraction.
ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit
def integers(
    parts,  # (PARTS, GROUP) fp32
    TOP: tl.constexpr,
    CLIP: tl.constexpr = 1.0,
):
    """int32 (PARTS, GROUP) in [-TOP, TOP], and the step fp32 (PARTS,)."""
    most = tl.max(tl.abs(parts), axis=1)
    live = most > LEAST
    if CLIP != 1.0:
        most = most * CLIP
    inverse = tl.where(live, tl.div_rn(TOP * 1.0, tl.where(live, most, 1.0)), 0.0)
    step = tl.where(live, most * (1.0 / TOP), 0.0)
    codes = ((parts * inverse[:, None] + ROUNDER) - ROUNDER).to(tl.int32)
    if CLIP != 1.0:
        codes = tl.minimum(tl.maximum(codes, -TOP), TOP)
    return codes, step
