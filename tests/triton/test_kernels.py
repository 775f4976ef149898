"""Each Triton kernel against its reference, over widths that nothing divides, with uninitialised memory poisoned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional

from lopro_fx.kernels.activation.reference import integers
from lopro_fx.kernels.formats.affine.decode import reference as decode_reference
from lopro_fx.kernels.formats.affine.decode.device import activation_group, decode_prepare, decode_product
from lopro_fx.kernels.formats.affine.dense_int8.device import dense_int8_device
from lopro_fx.kernels.formats.affine.dense_int8.reference import dense_int8, doubled
from lopro_fx.kernels.formats.affine.linear.device import packed_linear_device, step_of
from lopro_fx.kernels.formats.affine.packing.device import dequantize_device
from lopro_fx.kernels.formats.affine.packing.format import dequantize, pack
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.fragments import centred_codes, in_order, load_words, ordered
from lopro_fx.kernels.project.reference import dense_factor, project
from lopro_fx.kernels.rotate.device import chunk_for, rotate_device, rotate_project
from lopro_fx.kernels.rotate.reference import rotate
from lopro_fx.kernels.tiles import dot4, main_width
from tests.helpers import TOLERANCE, assert_close, generator
from tests.triton.conftest import INTERPRETED
from tests.triton.problems import problem

packed_linear = reference("affine", "linear")
packed_site = reference("affine", "site")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# bf16 has no NumPy type, so the interpreter can't multiply it.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# Fixed point rounds an activation by at most 2^-16 of its group's largest entry, which here is 30 times the others.
DECODE_TOLERANCE = {dtype: max(ratio, 5e-4) for dtype, ratio in TOLERANCE.items()}


@triton.jit
def _dot4_kernel(a_ptr, b_ptr, y_ptr, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, 64)
    acc = tl.full((64,), 5, tl.int32)
    tl.store(y_ptr + at, dot4(tl.load(a_ptr + at), tl.load(b_ptr + at), acc, SIGNED, NATIVE))


@pytest.mark.parametrize("native", [False] if INTERPRETED else [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_four_bytes_times_four_bytes(device: torch.device, signed: bool, native: bool) -> None:
    a, b = torch.randint(-(2**31), 2**31, (2, 64), generator=generator(), dtype=torch.int32).to(device)
    y = torch.empty(64, dtype=torch.int32, device=device)
    _dot4_kernel[(1,)](a, b, y, SIGNED=signed, NATIVE=native)
    left = a.cpu().numpy().view(np.uint8).reshape(64, 4).astype(np.int64)
    right = b.cpu().numpy().view(np.int8 if signed else np.uint8).reshape(64, 4).astype(np.int64)
    np.testing.assert_array_equal(y.cpu().numpy(), (left * right).sum(1) + 5)


@triton.jit
def _operands_kernel(
    codes_ptr,  # (16, ROW) int32
    zeros_ptr,  # (16,) fp32
    weight_ptr,  # (ROWS, COLUMNS)
    ROWS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = COLUMNS * WIDTH // 32
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    main, high = load_words(codes_ptr, ROWS - 3, 0, WORDS, BITS, WIDTH, ROWS, WORDS, WARPS)
    zero = tl.load(zeros_ptr + rows)[:, None]
    weight = centred_codes(main, high, zero, weight_ptr.dtype.element_ty, BITS, WIDTH, ROWS, WORDS, NATIVE)
    at = rows[:, None] * COLUMNS + columns[None, :]
    tl.store(weight_ptr + at, in_order(weight, WIDTH, ROWS, WORDS))


@pytest.mark.parametrize("native", [False] if INTERPRETED else [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "warps"), [(16, 4), (64, 4), (128, 4), (128, 8)])
def test_operands_of_a_product_are_exact_and_in_one_order(
    device: torch.device, rows: int, warps: int, bits: int, dtype: torch.dtype, native: bool
) -> None:
    columns, width = 128, main_width(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator())
    zeros = torch.randint(0, 2**bits, (rows,), generator=generator(1)) + 0.5
    weight = torch.empty(rows, columns, dtype=dtype, device=device)
    _operands_kernel[(1,)](
        pack(codes, bits).to(device), zeros.to(device), weight, ROWS=rows, BITS=bits, WIDTH=width,
        COLUMNS=columns, NATIVE=native, WARPS=warps, num_warps=warps,
    )  # fmt: skip
    codes[-3:] = 0
    expected = ordered((codes - zeros[:, None]).to(dtype), width, columns)
    assert sorted(ordered(torch.arange(columns)[None], width, columns)[0].tolist()) == list(range(columns))
    assert torch.equal(weight.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "block", "skip", "permuted", "signed"),
    [
        (576, 64, 0, False, True),
        (576, 256, 64, True, True),
        (2880, 64, 0, True, False),
        (640, 128, 256, False, False),
        (48, 16, 0, True, True),
        (1024, 1024, 0, False, True),
        (99, 1, 0, True, False),
        (96, 32, 64, True, True),
    ],
)
def test_rotate(
    device: torch.device, dtype: torch.dtype, k: int, block: int, skip: int, permuted: bool, signed: bool
) -> None:
    p = problem(3, k, 1, 2, 32, block=block, skip=skip, permuted=permuted, signed=signed, dtype=dtype)
    arguments = p.args(device)[:5]
    expected, got = rotate(*arguments), rotate_device(*arguments)
    assert_close("rotated", expected, got, TOLERANCE[dtype])
    assert torch.equal(expected[:, :skip], got[:, :skip])
    for order in ((2, 64), (2, 128), (4, 128), (8, 64)):
        if skip % order[1] == 0:
            assert torch.equal(ordered(got, *order), rotate_device(*arguments, None, 0.0, None, "", *order))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "block", "skip", "rank", "factor_bits"),
    [(576, 64, 0, 4, 8), (5000, 8, 0, 19, 8), (640, 128, 256, 3, 8), (99, 1, 0, 16, 16), (96, 32, 64, 1, 8)],
)
def test_rotate_project(
    device: torch.device, dtype: torch.dtype, k: int, block: int, skip: int, rank: int, factor_bits: int
) -> None:
    p = problem(3, k, 1, 2, 32, rank=rank, factor_bits=factor_bits, block=block, skip=skip, dtype=dtype)
    *arguments, down, scale = p.args(device)[:7]
    expected = rotate(*arguments)
    for chunk in {chunk_for(1, k, block), chunk_for(3, k, block)}:
        got, parts = rotate_project(*arguments, down, scale, chunk)
        assert_close("rotated", expected, got, TOLERANCE[dtype])
        assert parts.shape == (-(-skip // chunk) - (skip - k) // chunk, 3, rank)
        assert_close("latent", project(expected.float(), down, scale), parts.sum(0), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group_size", "k", "n"),
    [(2, 32, 99, 33), (2, 64, 576, 40), (3, 64, 160, 17), (3, -1, 99, 5), (4, 128, 256, 20), (8, 32, 40, 130),
     (8, 128, 130, 7)],
)  # fmt: skip
def test_dequantize(device: torch.device, dtype: torch.dtype, bits: int, group_size: int, k: int, n: int) -> None:
    p = problem(1, k, n, bits, group_size)
    arguments = (p.codes.to(device), p.scales.to(device), p.zeros.to(device), bits, group_size, k, dtype)
    assert torch.equal(dequantize(*arguments), dequantize_device(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group_size", "k", "n", "rank", "factor_bits", "parts"),
    [(2, 64, 192, 40, 3, 8, 1), (3, 32, 99, 33, 16, 16, 1), (4, 128, 256, 66, 19, 8, 3), (8, -1, 130, 17, 1, 8, 1)],
)
def test_dequantize_with_the_branch(
    device: torch.device, dtype: torch.dtype, bits: int, group_size: int, k: int, n: int, rank: int,
    factor_bits: int, parts: int,
) -> None:  # fmt: skip
    p = problem(1, k, n, bits, group_size, rank=rank, factor_bits=factor_bits, parts=parts)
    down, down_scale, codes, scales, zeros, _, up, up_scale = p.args(device)[5:13]
    branch = dense_factor(up, up_scale, 1) @ dense_factor(down, down_scale, 0)
    expected = dequantize(codes, scales, zeros, bits, group_size, k, torch.float32) + branch
    arguments = (codes, scales, zeros, bits, group_size, k, dtype, up, up_scale, down, down_scale)
    assert_close("weight", expected, dequantize_device(*arguments), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("bits", "group_size", "k", "n"), [(2, 64, 192, 40), (3, 32, 99, 33), (4, 128, 300, 66), (4, -1, 130, 17)]
)
def test_doubled_codes_are_whole(device: torch.device, bits: int, group_size: int, k: int, n: int) -> None:
    p = problem(1, k, n, bits, group_size)
    arguments = (p.codes.to(device), p.scales.to(device), p.zeros.to(device), bits, group_size, k)
    expected = doubled(*arguments)
    assert torch.equal(expected, dequantize_device(*arguments, torch.int8))
    scale = p.scales.to(device, torch.float64).repeat_interleave(k if group_size == -1 else group_size, 1)[:, :k]
    torch.testing.assert_close(expected * scale / 2, dequantize(*arguments, torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("group_size", "act_group", "k", "n", "m", "rank"),
    [
        (128, -1, 384, 130, 140, 4),
        (64, 64, 200, 70, 260, 0),
        (32, 128, 256, 17, 3, 16),
        (-1, -1, 99, 33, 1, 3),
        (-1, 32, 160, 300, 65, 5),
    ],
)
def test_dense_int8(
    device: torch.device, dtype: torch.dtype, halves: int, group_size: int, act_group: int, k: int, n: int, m: int,
    rank: int,
) -> None:  # fmt: skip
    p = problem(m, k, n, 4, group_size, rank=rank, biased=rank > 3, dtype=dtype, parts=1 if n % 2 else 2)
    x, _, _, _, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = p.args(device)
    whole, steps = integers(x, 127, act_group)
    latent = None if down is None else project(x, down, down_scale)
    rest = (scales, bias, latent, up, up_scale, group_size, act_group, dtype)
    weight = doubled(codes, scales, zeros, 4, group_size, k)
    activation, steps = whole.flatten(-2)[:, :k].to(torch.int8).contiguous(), steps.T.contiguous()
    got = dense_int8_device(activation, steps, weight, *rest, halves)
    assert got.dtype == dtype
    assert_close("y", dense_int8(activation, steps, weight, *rest), got, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("bits", "group_size", "k", "m", "block", "permuted"),
    [(2, 64, 576, 2, 64, True), (3, 32, 99, 1, 1, False), (4, 128, 640, 3, 128, False), (8, -1, 260, 1, 4, True)],
)
def test_prepare(device: torch.device, bits: int, group_size: int, k: int, m: int, block: int, permuted: bool) -> None:
    p = problem(m, k, 1, bits, group_size, rank=3, block=block, permuted=permuted)
    x, perm, signs, _, _, down = p.args(device)[:6]
    words, steps, latent = decode_prepare(x, perm, signs, block, down, bits, group_size)
    expected_words, expected_steps = decode_reference.prepare(x, perm, signs, block, bits, activation_group(group_size))
    assert_close("steps", expected_steps, steps, 1e-4)
    # A value half-way between two integers may go either way, so a few words differ, by one step.
    assert words.shape == expected_words.shape
    assert (words != expected_words).float().mean() < 0.02
    assert_close("latent", project(rotate(x, perm, signs, block, 0), down, None), latent.sum(0), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("bits", "group_size", "k", "n", "m", "rank", "block"),
    [
        (2, 64, 576, 40, 1, 4, 64),
        (2, 32, 99, 33, 2, 0, 1),
        (2, -1, 300, 70, 1, 3, 4),
        (3, 64, 576, 40, 2, 3, 64),
        (3, 32, 96, 5, 3, 2, 32),
        (3, -1, 99, 33, 1, 5, 1),
        (4, 128, 256, 17, 1, 0, 256),
        (4, 64, 2880, 24, 1, 16, 64),
        (8, 128, 640, 20, 1, 2, 128),
        (8, -1, 20, 1, 1, 2, 4),
    ],
)
def test_decode(
    device: torch.device, dtype: torch.dtype, splits: int, bits: int, group_size: int, k: int, n: int, m: int,
    rank: int, block: int,
) -> None:  # fmt: skip
    p = problem(m, k, n, bits, group_size, rank=rank, block=block, permuted=n % 2 == 0, biased=rank > 2, dtype=dtype,
                factor_bits=16 if rank == 5 else 8)  # fmt: skip
    # In fp32: the reference would round the rotated activation to its type, which one output alone can show.
    expected = packed_site(*replace(p, x=p.x.float(), bias=None if p.bias is None else p.bias.float()).args())
    x, perm, signs, _, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = p.args(device)
    words, steps, latent = decode_prepare(x, perm, signs, block, down, bits, group_size)
    got = decode_product(
        words, steps, latent, codes, scales, zeros, bias, down_scale, up, up_scale, bits, group_size, splits, dtype
    )
    assert got.dtype == dtype
    assert_close("y", expected, got.cpu(), DECODE_TOLERANCE[dtype])


def test_fixed_point_costs_less_than_half_precision_does(device: torch.device) -> None:
    """The same numbers multiplied in fp64: 16-bit fixed point is closer to it than an fp16 activation is."""
    p = problem(1, 2048, 64, 3, 64)
    weight = dequantize(p.codes, p.scales, p.zeros, 3, 64, 2048, torch.float64)
    exact = functional.linear(p.x.double(), weight)
    words, steps, latent = decode_prepare(p.x.to(device), None, None, 1, None, 3, 64)
    packed = (p.codes.to(device), p.scales.to(device), p.zeros.to(device))
    got = decode_product(words, steps, latent, *packed, None, None, None, None, 3, 64, 1, torch.float32)
    error = (got.cpu().double() - exact).norm()
    assert error < 0.5 * (functional.linear(p.x.half().double(), weight) - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "group_size", "k", "n", "m", "rank", "tokens", "splits"),
    [
        (2, 64, 576, 40, 20, 4, 16, 1),
        (2, 32, 99, 33, 2, 0, 16, 2),
        (3, 64, 576, 70, 2, 3, 64, 2),
        (3, -1, 99, 33, 1, 5, 16, 1),
        (4, 128, 256, 17, 130, 0, 0, 1),
        (4, 64, 1536, 24, 1, 16, 16, 4),
        (4, 32, 200, 70, 9, 0, 16, 1),
        (3, 32, 416, 20, 70, 3, 0, 1),
        (8, 32, 96, 5, 3, 2, 16, 1),
        (8, -1, 640, 20, 65, 2, 64, 1),
    ],
)
def test_packed_linear(
    device: torch.device, dtype: torch.dtype, bits: int, group_size: int, k: int, n: int, m: int, rank: int,
    tokens: int, splits: int,
) -> None:  # fmt: skip
    p = problem(m, k, n, bits, group_size, rank=rank, biased=rank > 2, dtype=dtype, factor_bits=16 if rank == 5 else 8)
    x, _, _, _, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = p.args(device)
    latent = project(x, down, down_scale) if down is not None else None
    expected = packed_linear(x, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size)
    parts = None if latent is None else torch.stack([latent.float() / 4, latent.float() * 3 / 4])
    rows = ordered(x, main_width(bits), step_of(dtype, bits, group_size))
    got = packed_linear_device(rows, codes, scales, zeros, bias, parts, up, up_scale, bits, group_size, tokens, splits)
    assert got.dtype == dtype
    assert_close("y", expected, got, 2 * TOLERANCE[dtype])


def test_splits_do_not_depend_on_the_order_of_programs(device: torch.device) -> None:
    p = problem(1, 4096, 64, 3, 64, rank=4, block=256)
    x, perm, signs, block, _, down, down_scale, codes, scales, zeros, _, up, up_scale, _, _ = p.args(device)
    prepared = decode_prepare(x, perm, signs, block, down, 3, 64)
    rest = (codes, scales, zeros, None, down_scale, up, up_scale, 3, 64, 4, torch.float32)
    assert torch.equal(decode_product(*prepared, *rest), decode_product(*prepared, *rest))


@pytest.mark.parametrize("parts", [2, 3])
def test_merged_linears_keep_scales_of_their_own(device: torch.device, parts: int) -> None:
    p = problem(1, 192, 66, 3, 64, rank=3, block=64, parts=parts)
    x, perm, signs, block, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = p.args(device)
    assert up_scale.shape == (parts, 3)
    expected = packed_site(*p.args())
    prepared = decode_prepare(x, perm, signs, block, down, 3, 64)
    got = decode_product(*prepared, codes, scales, zeros, bias, down_scale, up, up_scale, 3, 64, 1, torch.float32)
    assert_close("decode", expected, got.cpu(), 5e-4)
    rotated = rotate(x, perm, signs, block, 0)
    latent = project(rotated, down, down_scale).unsqueeze(0)
    got = packed_linear_device(ordered(rotated, 2, 64), codes, scales, zeros, bias, latent, up, up_scale, 3, 64, 16, 1)
    assert_close("matmul", expected, got.cpu(), 1e-5)


@pytest.mark.parametrize("unit", [2.0**-90, 2.0**90])
@pytest.mark.parametrize("factor_bits", [8, 16])
def test_scales_outside_fp16(device: torch.device, unit: float, factor_bits: int) -> None:
    """Scales in fp32, those of fp16 factors too, which have none elsewhere."""
    p = problem(2, 192, 66, 3, 64, rank=3, block=64, factor_bits=factor_bits)
    up_scale = torch.ones(3) if p.up_scale is None else p.up_scale.float()
    p = replace(p, scales=p.scales.float() * unit, up_scale=up_scale * unit)
    x, perm, signs, block, _, down, down_scale, codes, scales, zeros, _, up, up_scale, _, _ = p.args(device)
    expected = packed_site(*p.args())
    assert torch.isfinite(expected).all()
    prepared = decode_prepare(x, perm, signs, block, down, 3, 64)
    got = decode_product(*prepared, codes, scales, zeros, None, down_scale, up, up_scale, 3, 64, 1, torch.float32)
    assert_close("decode", expected, got.cpu(), 5e-4)
    rotated = rotate(x, perm, signs, block, 0)
    latent = project(rotated, down, down_scale).unsqueeze(0)
    got = packed_linear_device(ordered(rotated, 2, 64), codes, scales, zeros, None, latent, up, up_scale, 3, 64, 16, 1)
    assert_close("matmul", expected, got.cpu(), 1e-5)
    branch = (up, up_scale, down, down_scale)
    weight = dequantize_device(codes, scales, zeros, 3, 64, 192, torch.float32, *branch)
    assert_close("dense", expected, functional.linear(rotated, weight).cpu(), 1e-5)
