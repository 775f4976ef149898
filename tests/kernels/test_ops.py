"""The `lopro::` operators of one layer: gradients, and values against dense fp64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.formats.affine.packing.format import dequantize, group_count, pack
from lopro_fx.kernels.project.reference import dense_factor
from lopro_fx.kernels.rotate.reference import pack_signs, unrotate
from tests.helpers import TOLERANCE, assert_close, generator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ops = torch.ops.lopro


def _activation(width: int, dtype: torch.dtype, *lead: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(*lead, width, generator=generator(7)).to(dtype).requires_grad_(requires_grad)


def _rotation(width: int) -> tuple[Tensor, Tensor]:
    rng = generator(3)
    perm = torch.randperm(width, generator=rng).to(torch.int16)
    return perm, pack_signs(torch.randint(0, 2, (width,), generator=rng) * 2 - 1)


def _factor(shape: tuple[int, int], dim: int, bits: int) -> tuple[Tensor, Tensor | None]:
    rng = generator(5)
    if bits == 16:
        return (torch.randn(shape, generator=rng) / 8).to(torch.float16), None
    scale = (torch.rand(shape[dim], generator=rng) / 500 + 1e-3).to(torch.float16)
    return torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8), scale


def _weight(out: int, width: int, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    rng, groups = generator(11), group_count(width, group_size)
    codes = torch.randint(0, 1 << bits, (out, width), generator=rng)
    zeros = torch.randint(0, 1 << bits, (out * groups,), generator=rng)
    scales = (torch.rand(out, groups, generator=rng) / (1 << bits)).to(torch.float16)
    return pack(codes, bits), scales, pack(zeros, bits)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(
    ("bits", "group_size", "width"), [(2, 32, 99), (3, 64, 576), (4, 128, 96), (8, -1, 40), (4, 32, 1)]
)
def test_whole_layer_equals_dense_fp64(dtype: torch.dtype, bits: int, group_size: int, width: int) -> None:
    out, rank, block = 24, 4, 8 if width % 8 == 0 else 1
    perm, signs = _rotation(width)
    packed, bias = _weight(out, width, bits, group_size), torch.randn(out, generator=generator()).to(dtype)
    down, up = _factor((rank, width), 0, 8), _factor((out, rank), 1, 8)
    x = _activation(width, dtype, 3, 2)
    rotated = ops.rotate(x, perm, signs, block, 0)
    latent = ops.project(rotated, *down)
    got = ops.packed_linear(rotated, *packed, bias, latent, *up, bits, group_size)
    weight = dequantize(*packed, bits, group_size, width, torch.float64)
    weight = weight + dense_factor(*up, 1).double() @ dense_factor(*down, 0).double()
    expected = x.double() @ unrotate(weight, perm, signs, block, 0).T + bias.double()
    assert got.dtype == dtype
    # Weights and factors are fp32 values of the same numbers, so fp64 is limited by fp32's own rounding of them.
    assert_close(f"{dtype} layer", expected, got, max(TOLERANCE[dtype], TOLERANCE[torch.float32]))


@pytest.mark.parametrize("group_size", [32, -1])
def test_branch_and_bias_are_added_once(group_size: int) -> None:
    x, packed = _activation(64, torch.float32, 5), _weight(10, 64, 4, group_size)
    latent, up = _activation(4, torch.float32, 5), _factor((10, 4), 1, 8)
    bias = torch.randn(10, generator=generator())
    plain = ops.packed_linear(x, *packed, None, None, None, None, 4, group_size)
    whole = ops.packed_linear(x, *packed, bias, latent, *up, 4, group_size)
    assert_close("branch", plain + bias + latent @ dense_factor(*up, 1).T, whole, TOLERANCE[torch.float32])


def test_gradient_of_rotate_is_the_inverse() -> None:
    perm, signs = _rotation(72)
    x = _activation(72, torch.float64, 3, requires_grad=True)
    slope = torch.randn(3, 72, generator=generator(), dtype=torch.float64)
    ops.rotate(x, perm, signs, 32, 8).backward(slope)
    assert x.grad is not None
    assert_close("gradient", unrotate(slope, perm, signs, 32, 8), x.grad, 1e-14)


def test_gradient_of_packed_linear_is_the_transposed_weight() -> None:
    packed, x = _weight(10, 72, 3, 32), _activation(72, torch.float64, 3, requires_grad=True)
    slope = torch.randn(3, 10, generator=generator(), dtype=torch.float64)
    ops.packed_linear(x, *packed, None, None, None, None, 3, 32).backward(slope)
    assert x.grad is not None
    assert_close("gradient", slope @ dequantize(*packed, 3, 32, 72, torch.float64), x.grad, 1e-14)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows(rows: int) -> None:
    x, (perm, signs) = _activation(72, torch.float32, rows), _rotation(72)
    y = ops.packed_linear(ops.rotate(x, perm, signs, 8, 0), *_weight(10, 72, 3, 32), None, None, None, None, 3, 32)
    assert y.shape == (rows, 10)
