"""The public operators on the Triton side of their switch, for every size class of tokens."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.packed_int8.reference import packed_int8
from lopro_fx.kernels.formats.registry import reference
from tests.helpers import TOLERANCE, assert_close, generator
from tests.triton.conftest import INTERPRETED
from tests.triton.problems import problem
from tests.triton.test_kernels import DTYPES

packed_site = reference("affine", "site")

ops = torch.ops.lopro


@pytest.mark.parametrize("tokens", [1, 3, 40, 200, dispatch.DENSE_TOKENS + 3])
@pytest.mark.parametrize(("bits", "skip"), [(3, 0), (4, 64)])
def test_operators_agree_with_their_references(device: torch.device, tokens: int, bits: int, skip: int) -> None:
    p = problem(tokens, 192, 72, bits, 64, rank=4, block=64, skip=skip, permuted=True, biased=True)
    expected = packed_site(*p.args())
    x, perm, signs, block, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = p.args(device)
    with dispatch.triton_on_cpu() if INTERPRETED else contextlib.nullcontext():
        whole = ops.packed_site(*p.args(device))
        rotated = ops.rotate(x.view(1, tokens, -1), perm, signs, block, skip)
        latent = ops.project(rotated, down, down_scale)
        parts = ops.packed_linear(rotated, codes, scales, zeros, bias, latent, up, up_scale, bits, 64)
    assert_close("packed_site", expected, whole.cpu(), 5e-4)
    assert_close("rotate, project, packed_linear", expected, parts[0].cpu(), 5e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("before", "tokens", "k", "rank", "block", "skip"),
    [
        ("norm", 1, 1216, 4, 64, 0),
        ("norm", 1, 99, 0, 1, 0),
        ("norm", 3, 1216, 4, 64, 64),
        ("norm", 2, 2048, 0, 128, 0),
        ("norm", 3, 192, 2, 1, 0),
        ("norm", dispatch.NORM_TOKENS + 1, 192, 4, 64, 0),
        ("silu", 1, 640, 4, 128, 0),
        ("silu", 3, 640, 0, 64, 64),
        ("silu", dispatch.DENSE_TOKENS + 3, 96, 2, 32, 0),
        ("gelu", 2, 192, 4, 64, 0),
        ("gelu_tanh", 1, 192, 0, 1, 0),
        ("", 1, 4096, 4, 64, 0),
        ("", 2, 4096, 0, 64, 0),
    ],
)
def test_what_stands_around_a_site(
    device: torch.device, dtype: torch.dtype, before: str, tokens: int, k: int, rank: int, block: int, skip: int
) -> None:
    p = problem(tokens, k, 40, 3, 64 if k > 99 else 32, rank=rank, block=block, skip=skip, permuted=block > 1,
                dtype=dtype)  # fmt: skip
    rng = generator(1)
    # Parts of wider rows, as a merged gate and up projection leaves them, and a residual that is no view.
    x, gate = torch.cat([p.x, torch.randn(tokens, k, generator=rng).to(dtype)], 1).to(device).split(k, 1)
    residual = torch.randn(tokens, 40, generator=rng).to(device, dtype)
    around: dict[str, Any] = {"residual": residual}
    if before == "norm":
        around |= {"norm": torch.randn(k, generator=rng).to(device, dtype), "eps": 1e-2}
    elif before:
        around |= {"gate": gate, "activation": before}
    _, *site = p.args(device)
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in around.items()}
    expected = packed_site(x.float(), *site, **wide)
    with dispatch.triton_on_cpu() if INTERPRETED else contextlib.nullcontext():
        got = ops.packed_site(x, *site, **around)
    assert got.dtype == dtype
    assert_close(f"{before} and residual", expected, got, max(4 * TOLERANCE[dtype], 5e-4))


@pytest.mark.parametrize(
    ("bits", "group_size", "act_bits", "act_group", "k", "tokens", "skip"),
    [(4, 64, 8, 64, 192, 5, 0), (4, 128, 8, -1, 300, 1, 0), (8, -1, 8, -1, 260, 70, 0), (4, 32, 4, 128, 256, 20, 0),
     (3, 64, 8, 32, 192, 3, 64), (2, -1, 8, 32, 96, 2, 0), (4, 64, 8, -1, 192, dispatch.DENSE_TOKENS + 3, 0),
     (3, 32, 4, 64, 128, dispatch.DENSE_TOKENS + 1, 64), (8, 64, 8, -1, 64, dispatch.DENSE_TOKENS + 1, 0)],
)  # fmt: skip
def test_integer_activations(
    device: torch.device, bits: int, group_size: int, act_bits: int, act_group: int, k: int, tokens: int, skip: int
) -> None:
    block = 64 if k % 64 == 0 else 4
    p = problem(tokens, k, 70, bits, group_size, rank=3, block=block, skip=skip, permuted=True, biased=True, parts=2)
    x, perm, signs, block, skip, down, down_scale, codes, scales, zeros, bias, up, up_scale, _, _ = p.args(device)
    latent = ops.project(ops.rotate(x, perm, signs, block, skip), down, down_scale)
    rest = (codes, scales, zeros, bias, latent, up, up_scale, bits, group_size, act_bits, act_group)
    expected = packed_int8(x, perm, signs, block, skip, *rest)
    with dispatch.triton_on_cpu() if INTERPRETED else contextlib.nullcontext():
        got = ops.packed_int8(x, perm, signs, block, skip, *rest)
    # A value half-way between two integers may go either way in the two rotations.
    assert_close("packed_int8", expected, got, 2e-3 if act_bits == 8 else 2e-2)
