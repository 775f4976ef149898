"""What comes before the products of experts of every format, by Triton."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.prologue.reference import prologue
from lopro_fx.kernels.routed.choice import DECODE_PAIRS
from lopro_fx.kernels.routed.reference import require_fit


def experts_site(
    x: Tensor, ids: Tensor, slots: int, experts: int, perm: Tensor | None, signs: Tensor | None, block: int, skip: int,
    down: Tensor | None, down_scale: Tensor | None, up: Tensor | None, cells: Tensor | None, bits: int,
    group_size: int, gate: Tensor | None, activation: str,
    fused: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor], apart: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:  # fmt: skip
    """Gate, rotate and project, in one launch for few pairs.

    Args:
        bits, group_size: of the fixed point that `fused` reads.
        fused: the product of words, steps and latents of `experts_prepare` or `decode_prepare`, and contiguous ids.
        apart: the product of a rotated activation and its latents.
        all others: as in `definition.experts_site`.

    Returns:
        What `fused` or `apart` returns.
    """
    require_fit(x, ids, experts, x.shape[-1], slots)
    # Unrotated columns shift the Hadamard blocks against the groups: the rotation then has a launch of its own.
    if dispatch.at_most(ids.shape[0], DECODE_PAIRS) and not dispatch.at_most(ids.shape[0], 0) and not skip:
        from lopro_fx.kernels.formats.affine.decode.device import decode_prepare
        from lopro_fx.kernels.formats.affine.experts.device import experts_prepare

        x, gate, ids = _rows(x), None if gate is None else _rows(gate), ids.contiguous()
        if down is None or up is None:
            words, steps, _ = decode_prepare(x, perm, signs, block, None, bits, group_size, None, 0.0, gate, activation)
            return fused(words, steps, None, ids)
        words, steps, latent = experts_prepare(
            x, ids, slots, experts, perm, signs, block, down, cells, up.shape[2], bits, group_size, gate, activation
        )
        return fused(words, steps, latent, ids)
    if perm is not None or block > 1:
        from lopro_fx.kernels.rotate.device import rotate_device

        gate = None if gate is None else _rows(gate)
        x = rotate_device(_rows(x), perm, signs, block, skip, None, 0.0, gate, activation)
    else:
        x, _ = prologue(x, None, None, 0.0, gate, activation)
    return apart(x, None if down is None else project(x, down, down_scale))


def _rows(x: Tensor) -> Tensor:
    """x with contiguous columns."""
    return x if x.stride(1) == 1 and isinstance(x.stride(0), int) else x.contiguous()
