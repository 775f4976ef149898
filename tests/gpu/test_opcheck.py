"""`torch.library.opcheck` of every operator that launches a Triton kernel.

Sizes are static: those of weights are compile-time constants of the kernels, and programs never free them. A free
number of tokens is covered by `test_compile.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.project.reference import project
from tests.triton.problems import Problem, problem

pytestmark = pytest.mark.gpu
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def _check(name: str, *args: Any) -> None:
    torch.library.opcheck(getattr(torch.ops.lopro, name).default, args, test_utils=CHECKS)


def _problem(tokens: int, rank: int = 4) -> Problem:
    from lopro_fx.kernels.decode import device as decode
    from lopro_fx.kernels.dense_int8 import device as dense_int8
    from lopro_fx.kernels.packed_linear import device as packed_linear
    from lopro_fx.kernels.packing import device as packing
    from lopro_fx.kernels.rotate import device as rotate

    assert all((decode, dense_int8, packed_linear, packing, rotate)), "importing them registers their operators"
    return problem(tokens, 192, 72, 3, 64, rank=rank, block=64, permuted=True, biased=True, dtype=torch.bfloat16)


def test_rotate_device() -> None:
    x, perm, signs, block = _problem(3).args("cuda")[:4]
    _check("rotate_device", x, perm, signs, block, 0)
    _check("rotate_device", x, None, None, block, 64)
    _check("rotate_device", x, None, signs, block, 0, x[0], 1e-5, None, "")


def test_rotate_project() -> None:
    x, perm, signs, block, _, down, scale = _problem(3).args("cuda")[:7]
    _check("rotate_project", x, perm, signs, block, 0, down, scale, 64)
    _check("rotate_project", x, None, None, block, 64, down, None, 256)
    _check("rotate_project", x, perm, signs, block, 0, down, scale, 64, None, 0.0, x + 1, "silu")


@pytest.mark.parametrize("rank", [0, 4])
def test_decode_prepare(rank: int) -> None:
    x, perm, signs, block, _, down = _problem(1, rank).args("cuda")[:6]
    _check("decode_prepare", x, perm, signs, block, down, 3, 64)
    _check("decode_prepare", x, perm, signs, block, down, 3, 64, x[0], 1e-5, None, "")
    _check("decode_prepare", x, perm, signs, block, down, 3, 64, None, 0.0, x + 1, "gelu")


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("splits", [1, 2])
def test_decode_product(rank: int, splits: int) -> None:
    p = _problem(1, rank).args("cuda")
    x, perm, signs, block, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, bits, group_size = p
    prepared = torch.ops.lopro.decode_prepare(x, perm, signs, block, down, bits, group_size)
    rest = (codes, scales, zeros, bias, down_scale, up, up_scale, bits, group_size, splits, torch.bfloat16)
    _check("decode_product", *prepared, *rest)
    _check("decode_product", *prepared, *rest, torch.ones(1, 72, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize(("tokens", "shape", "splits"), [(3, 16, 2), (40, 64, 1), (130, 0, 1)])
def test_packed_linear_device(tokens: int, shape: int, splits: int) -> None:
    x, _, _, _, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = _problem(tokens).args("cuda")
    latent = project(x, down, down_scale).unsqueeze(0)
    _check("packed_linear_device", x, codes, scales, zeros, bias, latent, up, up_scale, 3, 64, shape, splits)
    _check("packed_linear_device", x, codes, scales, zeros, None, None, None, None, 3, 64, shape, splits)
    residual = torch.ones(tokens, 72, dtype=torch.bfloat16, device="cuda")
    _check("packed_linear_device", x, codes, scales, zeros, None, None, None, None, 3, 64, shape, splits, residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_device(dtype: torch.dtype) -> None:
    codes, scales, zeros = _problem(1).args("cuda")[7:10]
    _check("dequantize_device", codes, scales, zeros, 3, 64, 192, dtype)
    down, down_scale, *_, up, up_scale = _problem(1).args("cuda")[5:13]
    _check("dequantize_device", codes, scales, zeros, 3, 64, 192, dtype, up, up_scale, down, down_scale)
    _check("dequantize_device", codes, scales, zeros, 3, 64, 192, torch.int8)


@pytest.mark.parametrize("act_group", [-1, 64])
def test_integer_products(act_group: int) -> None:
    from lopro_fx.kernels.packed_int8.device import columns

    x, perm, signs, block, _, down, down_scale, *weight, bias, up, up_scale, _, _ = _problem(3).args("cuda")
    size = columns(64, act_group)
    _check("round_device", x, perm, signs, block, 8, act_group, size)
    integers, steps, sums = torch.ops.lopro.round_device(x, perm, signs, block, 8, act_group, size)
    branch = (bias, project(x, down, down_scale), up, up_scale)
    rest = (64, act_group, torch.bfloat16)
    _check("int8_matmul_device", integers, steps, sums, *weight, *branch, 3, 64, act_group, 16, torch.bfloat16)
    dense = torch.ops.lopro.dequantize_device(*weight, 3, 64, 192, torch.int8)
    for halves in (1, 2):
        _check("dense_int8_device", integers, steps, dense, weight[1], *branch, *rest, halves)
        _check("dense_int8_device", integers, steps, dense, weight[1], None, None, None, None, *rest, halves)
