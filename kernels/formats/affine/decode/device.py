"""`lopro::decode_prepare` and `lopro::decode_product`: the two launches of a packed site for a few tokens.

Both are `triton_op`s, so Inductor and AOTInductor compile the kernels inside and an artifact needs no Python.
`decode/reference.py` defines what they return.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.formats.affine.decode.triton import prepare_kernel, product_kernel
from lopro_fx.kernels.formats.affine.packing.format import WORD, group_count
from lopro_fx.kernels.tiles import NATIVE, main_width, stand_in

# Columns of a fixed-point group where the weights have one scale per row.
_WIDE_GROUP = 128


def activation_group(group_size: int) -> int:
    """Columns that share a fixed-point step: the weights' own groups, so that integer sums are scaled once a group."""
    return _WIDE_GROUP if group_size == -1 else group_size


def prepare(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, down: Tensor | None, bits: int, group_size: int,
    norm: Tensor | None = None, eps: float = 0.0, gate: Tensor | None = None, activation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rotate an activation and write it as 16-bit fixed point, with partial sums of the down-projection.

    Args:
        x: (M, K) fp32, fp16 or bf16, with contiguous columns.
        perm, signs, block: as in `lopro::rotate` with `skip` 0.
        down: int8 or fp16 (R, K), or None; its scale is applied by `decode_product`.
        bits, group_size: of the weights that will be multiplied.
        norm, eps, gate, activation: prologue as in `prologue/reference.py`, with norm or gate, not both; gate (M, K)
            has contiguous columns.

    Returns:
        words int32 (M, 2, fields, words): high and low bytes of the fixed-point values, four a word.
        steps fp32 (M, 2, groups): the value of one step, and that times the sum of the group's integers.
        latent fp32 (chunks, M, R): partial sums of A x'; R is 0 without a down factor.
    """
    m, k = x.shape
    width = main_width(bits)
    group = activation_group(group_size)
    chunk = max(block, group, _WIDE_GROUP)
    words, fields = -(-k // WORD) * width, 8 // width
    groups, chunks = group_count(k, group), -(-k // chunk)
    rank = 0 if down is None else down.shape[0]
    out = x.new_empty((m, 2, fields, words), dtype=torch.int32)
    steps = x.new_empty((m, 2, groups), dtype=torch.float32)
    latent = x.new_empty((chunks, m, rank), dtype=torch.float32)
    absent = stand_in(signs, perm, down, norm, x)
    wrap_triton(prepare_kernel)[(m, chunks)](
        x, absent if norm is None else norm, absent if gate is None else gate, absent if perm is None else perm,
        absent if signs is None else signs, absent if down is None else down, out, steps, latent,
        m, K=k, R=rank, WORDS=words, FIELDS=fields, GROUP=group, GROUPS=groups, CHUNK=chunk,
        LOG_BLOCK=block.bit_length() - 1, BLOCK_R=triton.next_power_of_2(max(rank, 1)),
        X_ROW=x.stride(0), GATE_ROW=0 if gate is None else gate.stride(0), EPS=eps,
        ACTIVATION="" if gate is None else activation, HAS_NORM=norm is not None, HAS_PERM=perm is not None,
        HAS_SIGNS=signs is not None,
    )  # fmt: skip
    return out, steps, latent


def product(
    words: Tensor, steps: Tensor, latent: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
    down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, bits: int, group_size: int, splits: int,
    dtype: torch.dtype, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gemv of a prepared activation and a packed weight, plus low-rank branch, bias and residual.

    Args:
        words, steps: from `decode_prepare`.
        latent: fp32 (parts, M, R), summed over its parts: from `decode_prepare`, or A x' itself.
        codes, scales, zeros, bias, up, up_scale, bits, group_size: as in `lopro::packed_linear`.
        down_scale: fp16 (R,), or None where `latent` holds it already.
        splits: parts of the columns, each with programs of its own. They are summed afterwards, so the result doesn't
            depend on the order in which programs finish.
        dtype: of the result.
        residual: (M, N), contiguous, added to the result before it is rounded.

    Returns:
        (M, N) of `dtype`.
    """
    m, _, fields, count = words.shape
    n, weight_groups = scales.shape
    width = main_width(bits)
    rank = 0 if up is None else up.shape[1]
    chunks = latent.shape[0]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    group_words = activation_group(group_size) * width // WORD
    block_w = max(min(_block_words(bits), triton.next_power_of_2(count)), group_words)
    block_n = _block_rows(n, dispatch.processors(words.device))
    # Partial sums stay fp32; a single part is written in `dtype`.
    y = words.new_empty((splits, m, n), dtype=dtype if splits == 1 else torch.float32)
    wrap_triton(product_kernel)[(triton.cdiv(n, block_n), splits, m)](
        words, steps, latent, codes, scales, zeros, words if bias is None else bias,
        words if down_scale is None else down_scale, words, words if up is None else up,
        words if up_scale is None else up_scale, words if residual is None else residual, y, m,
        N=n, R=rank, PART_ROWS=n // parts, WORDS=count, FIELDS=fields, BITS=bits, WIDTH=width,
        WORDS_IN_GROUP=group_words, GROUPS=steps.shape[2], WEIGHT_GROUPS=weight_groups, CHUNKS=chunks,
        SPLITS=splits, BLOCK_N=block_n,
        BLOCK_W=block_w, BLOCK_R=triton.next_power_of_2(max(rank, 1)), BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        HAS_BIAS=bias is not None,
        HAS_DOWN_SCALE=down_scale is not None, HAS_CORE=False, HAS_UP_SCALE=up_scale is not None,
        HAS_RESIDUAL=residual is not None, STAGES=_STAGES, NATIVE=NATIVE, num_warps=_WARPS,
    )  # fmt: skip
    return y.view(m, n) if splits == 1 else y.sum(0).to(dtype)


# The functions above stay callable as they are, so that launches can be recorded without a device.
decode_prepare = registry.register_triton("decode_prepare", prepare)
decode_product = registry.register_triton("decode_product", product)

# Steps in flight, and warps: with fewer, programs would keep less in flight than an H200's bandwidth needs.
_STAGES, _WARPS = 3, 4


def _block_rows(rows: int, processors: int) -> int:
    """Rows of a program: fewer reread the activation, more leave multiprocessors without a second program."""
    return 32 if triton.cdiv(rows, 32) >= 2 * processors else 16


def _block_words(bits: int) -> int:
    """Words of a row that one step reads: 512 bytes, a 16-byte vectorised load per lane; half with a second plane."""
    return 64 if bits == 3 else 128


def choose_splits(rows: int, words: int, processors: int) -> int:
    """Parts of the columns: several only where rows alone don't fill the multiprocessors, as their sum is a launch."""
    programs = triton.cdiv(rows, _block_rows(rows, processors))
    splits = 1
    while 2 * programs * splits < 3 * processors and words >= 2 * splits * 2 * _block_words(2):
        splits *= 2
    return splits
