"""Every launch of every Triton kernel at the shapes of large models, recorded without a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.ahead import Launch, record
from lopro_fx.kernels.formats.affine.columns import device as columns_of_groups
from lopro_fx.kernels.formats.affine.decode import device as decode
from lopro_fx.kernels.formats.affine.decode.device import activation_group
from lopro_fx.kernels.formats.affine.dense_int8 import device as dense_int8
from lopro_fx.kernels.formats.affine.experts import device as affine_experts
from lopro_fx.kernels.formats.affine.grid import Grid
from lopro_fx.kernels.formats.affine.linear import device as packed_linear
from lopro_fx.kernels.formats.affine.packed_int8 import device as packed_int8
from lopro_fx.kernels.formats.affine.packing import device as packing
from lopro_fx.kernels.formats.affine.packing.format import group_count, packed_words
from lopro_fx.kernels.formats.registry import empty
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.kernels.formats.trellis.decode import device as trellis_decode
from lopro_fx.kernels.formats.trellis.encode import device as trellis_encode
from lopro_fx.kernels.formats.trellis.experts import device as trellis_experts
from lopro_fx.kernels.formats.trellis.format import step_of
from lopro_fx.kernels.formats.trellis.packing import device as trellis_packing
from lopro_fx.kernels.rotate import device as rotate
from lopro_fx.kernels.routed import device as routed
from lopro_fx.kernels.tiles import main_width

# Hadamard block of the rotation.
_BLOCK = 256


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(n: int, k: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = group_count(k, group_size)
    return (
        _empty(n, packed_words(k, bits), dtype=torch.int32),
        _empty(n, groups, dtype=torch.float16),
        _empty(packed_words(n * groups, bits), dtype=torch.int32),
    )


def launches(
    bits: int, group_size: int = 128, n: int = 28672, k: int = 8192, rank: int = 16,
    dtype: torch.dtype = torch.bfloat16, capability: int = 90,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    """(what it is, launch) of a whole site: rotation, decode, every tile of the matmuls, dequantisation.

    Args:
        bits, group_size: of the packed weight (n, k).
        rank: of the int8 low-rank factors.
        dtype: of the activations; decoding takes one token.
        capability: 90 for sm_90, whose tiles are others for some kernels.
    """
    x, weight = _empty(1, k, dtype=dtype), _weight(n, k, bits, group_size)
    signs = _empty(-(-k // 8), dtype=torch.uint8)
    scale = _empty(rank, dtype=torch.float16)
    down, up = _empty(rank, k, dtype=torch.int8), _empty(n, rank, dtype=torch.int8)
    yield "rotate", record(rotate.launch, rotate, x, None, signs, _BLOCK, 0)[0]
    chunk = rotate.chunk_for(2, k, _BLOCK)
    several = _empty(16, k, dtype=dtype)
    norm = (_empty(k, dtype=dtype), 1e-5, None, "")
    for name, one, many in (
        ("", (), ()),
        (", norm", norm, norm),
        (", gate", (None, 0.0, x, "silu"), (None, 0.0, several, "silu")),
    ):
        rows = (several, None, signs, _BLOCK, 0, down, scale, chunk, *many)
        yield f"rotate, project{name}", record(rotate.launch_project, rotate, *rows)[0]
        token = (x, None, signs, _BLOCK, down, bits, group_size, *one)
        yield f"decode, prepare{name}", record(decode.prepare, decode, *token)[0]
    group = decode.activation_group(group_size)
    words = _empty(1, 2, 8 // main_width(bits), packed_words(k, bits) * main_width(bits) // bits, dtype=torch.int32)
    steps = _empty(1, 2, group_count(k, group), dtype=torch.float32)
    latent = _empty(-(-k // _BLOCK), 1, rank, dtype=torch.float32)
    yield (
        "decode, product",
        record(
            decode.product, decode, words, steps, latent, *weight, None, scale, up, scale, bits, group_size, 1, dtype
        )[0],
    )
    for tokens in (tokens for tokens in packed_linear._SHAPES if tokens or capability >= 90):
        rows = _empty(tokens or 2048, k, dtype=dtype)
        latent = _empty(16, tokens or 2048, rank, dtype=torch.float32)
        yield (
            f"matmul, {tokens or 'many'} tokens",
            record(
                packed_linear.launch, packed_linear, rows, *weight, None, latent, up, scale, bits, group_size, tokens, 1
            )[0],
        )
    size = packed_int8.columns(group_size, group_size)
    yield "int8, round", record(packed_int8.round_rows, packed_int8, x, None, signs, _BLOCK, 8, group_size, size)[0]
    for tokens in packed_int8._SHAPES:
        count = tokens or 2048
        rows = (
            _empty(count, k, dtype=torch.int8),
            _empty(group_count(k, group_size), count, dtype=torch.float32),
            _empty(-(-k // size), count, dtype=torch.float32),
        )
        latent = _empty(count, rank, dtype=dtype)
        branch = (None, latent, up, scale, bits, group_size, group_size, tokens, dtype)
        yield (
            f"int8, matmul, {tokens or 'many'} tokens",
            record(packed_int8.matmul, packed_int8, *rows, *weight, *branch)[0],
        )
    if bits <= 4:
        rows = _empty(2048, k, dtype=torch.int8)
        dense = (rows, _empty(1, 2048, dtype=torch.float32), _empty(n, k, dtype=torch.int8), weight[1])
        branch = (None, _empty(2048, rank, dtype=dtype), up, scale, group_size, -1, dtype, 2 if capability == 90 else 1)
        yield "int8, dense matmul", record(dense_int8.launch, dense_int8, *dense, *branch)[0]
        yield "int8, dequantize", record(packing.launch, packing, *weight, bits, group_size, k, torch.int8)[0]
    factors = (up, scale, down, scale)
    yield "dequantize", record(packing.launch, packing, *weight, bits, group_size, k, dtype, *factors)[0]


# Bits and columns of a step.
TRELLIS = ((1.5, 2), (2.0, 2), (2.5, 2), (2.0, 1), (3.0, 1), (4.0, 1))


def trellis_launches(
    bits: float, columns: int, window: int = 16, strip: int = 512, n: int = 28672, k: int = 8192, rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    """(what it is, launch) of the kernels of a trellis weight (n, k); all else of a site is in `launches`."""
    step = round(bits * columns)
    weight = (_empty(n, dtype=torch.float16), _empty(code_words((n, k), step, columns, strip), dtype=torch.int32))
    spec = (step, columns, window, strip, k)
    scale = _empty(rank, dtype=torch.float16)
    down, up = _empty(rank, k, dtype=torch.int8), _empty(n, rank, dtype=torch.int8)
    words, steps = _empty(1, 2, 1, -(-k // 32) * 8, dtype=torch.int32), _empty(1, 2, -(-k // 128), dtype=torch.float32)
    latent = _empty(-(-k // _BLOCK), 1, rank, dtype=torch.float32)
    name = f"trellis, {'1 column' if columns == 1 else f'{columns} columns'}"
    operands = (words, steps, latent, *weight, None, scale, up, scale, *spec, 1, dtype)
    yield f"{name}, decode, product", record(trellis_decode.product, trellis_decode, *operands)[0]
    operands = (*weight, *spec, dtype, up, scale, down, scale)
    yield f"{name}, dequantize", record(trellis_packing.launch, trellis_packing, *operands)[0]


def solver_launches(rows: int = 4096, windows: tuple[int, ...] = (14,)) -> Iterator[tuple[str, Launch]]:
    """(what it is, launch) of the kernels that round the columns of a weight of `rows` rows."""

    def fp32(*shape: int) -> Tensor:
        return _empty(*shape, dtype=torch.float32)

    for width in (32, 64, 128, 256):
        block, square = fp32(width, rows), fp32(width, width)
        if width <= 128:
            grid = Grid(fp32(rows), fp32(rows), 8)
            operands = (columns_of_groups, block, block, square, grid)
            yield f"round {width} columns", record(columns_of_groups.round_columns, *operands)[0]
        codes, scale = _empty(width, rows, dtype=torch.uint8), fp32(rows)
        operands = (columns_of_groups, codes, block, block, square, scale, scale, 7, width <= 128)
        yield f"descend {width} columns", record(columns_of_groups.descend_group, *operands)[0]
    yield "fit grids", record(columns_of_groups.fit_grid, columns_of_groups, fp32(64, rows), 3, fp32(64), 24)[0]
    for bits, pair in TRELLIS:
        for window in windows:
            block = fp32(64, rows)
            operands = (block, block, fp32(64, 64), fp32(64), fp32(rows), [512] * (rows // 512))
            yield (
                f"trellis search, {bits:g} bits, {pair} columns, window {window}",
                record(trellis_encode.encode, trellis_encode, *operands, round(bits * pair), pair, window)[0],
            )


def expert_launches(
    format: str, spec: dict[str, Any], capability: int, experts: int = 128, n: int = 1536, k: int = 2048,
    slots: int = 8, rank: int = 16, dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    """(what it is, launch) of the kernels of experts (n, k) in a format, with branches in a grid, and cores."""

    packed = tuple(empty(format, (experts, n, k), spec).tensors.values())
    up, up_scale = _empty(12, n, rank, dtype=torch.int8), _empty(12, rank, dtype=torch.float16)
    cells, ids = _empty(experts, 2, dtype=torch.int32), _empty(slots, dtype=torch.int64)
    core, latent = _empty(experts, rank, rank, dtype=torch.float16), _empty(1, 12 * rank, dtype=dtype)
    yield "experts, latents", record(routed.latents, routed, latent, ids, slots, rank, experts, cells, core)[0]
    tokens = 2048
    many = _empty(tokens, k, dtype=dtype), _empty(1, tokens * slots, rank, dtype=torch.float32)
    places = _empty(tokens * slots, dtype=torch.int64), _empty(experts + 1, dtype=torch.int32)
    module: Any
    if format == "affine":
        module, bits = affine_experts, spec["bits"]
        numbers, last = (bits, spec["group_size"]), ()
        width, group = main_width(bits), activation_group(spec["group_size"])
    else:
        module, numbers, last = trellis_experts, (step_of(spec), spec["columns"], spec["window"], spec["strip"]), (k,)
        width, group = 8, 128
    words = _empty(1, 2, 8 // width, k // 32 * width, dtype=torch.int32)
    steps = _empty(1, 2, group_count(k, group), dtype=torch.float32)
    weight = (*packed, up, up_scale, cells, *numbers)
    down, down_scale = _empty(12 * rank, k, dtype=torch.int8), _empty(12 * rank, dtype=torch.float16)
    signs, x = _empty(k // 8, dtype=torch.uint8), _empty(1, k, dtype=dtype)
    fixed = numbers if format == "affine" else (8, -1)
    given = (x, ids, slots, experts, None, signs, 256, down, cells, rank, *fixed, x, "silu")
    yield f"experts, {format}, decode, prepare", record(affine_experts.prepare, affine_experts, *given)[0]
    parts = _empty(k // 256, slots, rank, dtype=torch.float32)
    few = (words, steps, parts, ids, slots, *packed, down_scale, up, up_scale, cells, core, *numbers, *last, 1, dtype)
    yield f"experts, {format}, decode, product", record(module.product, module, *few)[0]
    for tile in (16, 64, 0):
        if tile or capability >= 90:
            operands = (*many, *places, slots, *weight, tile)
            yield f"experts, {format}, matmul, {tile or 'many'} pairs", record(module.matmul, module, *operands)[0]
