"""Registration of `lopro::packed_site`."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.packed_linear.op import packed_linear, product
from lopro_fx.kernels.packed_site import reference
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.rotate.op import rotate


def packed_site(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """`reference.packed_site`: two launches, more where partial sums or full weights are written."""
    if not dispatch.runs_triton(x):
        return reference.packed_site(
            x, perm, signs, block, skip, down, down_scale, codes, scales, zeros, bias, up, up_scale, bits, group_size
        )
    rows = x.reshape(-1, x.shape[-1])
    # Columns left alone shift the Hadamard blocks away from the groups, so the rotation has a launch of its own then.
    if dispatch.at_most(rows.shape[0], dispatch.DECODE_TOKENS) and not skip:
        from lopro_fx.kernels.decode.device import choose_splits, decode_prepare, decode_product

        words, steps, latent = decode_prepare(rows.contiguous(), perm, signs, block, down, bits, group_size)
        splits = choose_splits(scales.shape[0], words.shape[-1], dispatch.processors(x.device))
        y = decode_product(
            words, steps, latent, codes, scales, zeros, bias, down_scale, up, up_scale, bits, group_size, splits,
            x.dtype,
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])
    if down is not None and (perm is not None or block > 1):
        from lopro_fx.kernels.rotate.device import chunk_for, rotate_project

        chunk = chunk_for(rows.shape[0], rows.shape[1], block)
        rows, parts = rotate_project(rows.contiguous(), perm, signs, block, skip, down, down_scale, chunk)
        y = product(rows, codes, scales, zeros, bias, parts, up, up_scale, bits, group_size)
        return y.view(*x.shape[:-1], y.shape[-1])
    if perm is not None or block > 1:
        x = rotate(x, perm, signs, block, skip)
    latent = None if down is None else project(x, down, down_scale)
    return packed_linear(x, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size)


registry.register(
    "packed_site(Tensor x, Tensor? perm, Tensor? signs, int block, int skip, Tensor? down, Tensor? down_scale, "
    "Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, Tensor? up, Tensor? up_scale, int bits, int group_size) "
    "-> Tensor",
    packed_site,
)
