"""The input transform: orthogonal, exact where it only moves values, and undone by its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx.kernels.rotate.reference import (
    block_hadamard,
    hadamard_signs,
    pack_signs,
    rotate,
    unpack_signs,
    unrotate,
)
from tests.helpers import TOLERANCE, assert_close, generator

WIDTHS = (1, 99, 576, 1536, 2880)


@st.composite
def transforms(draw: st.DrawFn) -> tuple[int, torch.Tensor | None, torch.Tensor | None, int, int]:
    """(width, perm, signs, block, skip): any width up to 200, any power of two that divides what is rotated."""
    block = 1 << draw(st.integers(0, 6))
    skip = draw(st.integers(0, 40))
    width = skip + block * draw(st.integers(1, max(1, 160 // block)))
    rng = generator(draw(st.integers(0, 999)))
    perm = torch.randperm(width, generator=rng).to(draw(st.sampled_from((torch.int16, torch.int32))))
    signs = pack_signs(torch.randint(0, 2, (width,), generator=rng) * 2 - 1)
    return width, draw(st.sampled_from((None, perm))), draw(st.sampled_from((None, signs))), block, skip


def _largest_block(width: int) -> int:
    return min(256, width & -width)


@given(transforms())
def test_matrix_is_orthogonal(case: tuple) -> None:
    width, *args = case
    transposed = rotate(torch.eye(width, dtype=torch.float64), *args)
    assert (transposed @ transposed.T - torch.eye(width, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("skip", [0, 64])
def test_odd_widths_stay_orthogonal(width: int, skip: int) -> None:
    skip = min(skip, width - 1)
    rng = generator(width)
    perm = torch.randperm(width, generator=rng).to(torch.int16)
    signs = pack_signs(torch.randint(0, 2, (width,), generator=rng) * 2 - 1)
    args = (perm, signs, _largest_block(width - skip), skip)
    x = torch.randn(4, width, generator=rng, dtype=torch.float64)
    moved = rotate(x, *args)
    assert_close("inner products", x @ x.T, moved @ moved.T, 1e-14)
    assert_close("inverse", x, unrotate(moved, *args), 1e-14)


@given(transforms(), st.sampled_from((torch.float32, torch.float64)))
def test_inverse_undoes_it(case: tuple, dtype: torch.dtype) -> None:
    width, *args = case
    x = torch.randn(3, width, generator=generator(1), dtype=dtype)
    assert_close("unrotate(rotate(x))", x, unrotate(rotate(x, *args), *args), TOLERANCE[dtype])
    assert_close("rotate(unrotate(x))", x, rotate(unrotate(x, *args), *args), TOLERANCE[dtype])


@given(transforms(), st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)))
def test_skipped_columns_are_gathered_bit_exactly(case: tuple, dtype: torch.dtype) -> None:
    width, perm, signs, block, skip = case
    x = torch.randn(3, width, generator=generator(1), dtype=torch.float64).to(dtype)
    gathered = x if perm is None else x[:, perm.long()]
    moved = rotate(x, perm, signs, block, skip)
    assert moved.dtype == dtype
    assert torch.equal(moved[:, :skip], gathered[:, :skip])


@given(transforms())
def test_every_block_keeps_its_norm(case: tuple) -> None:
    width, perm, signs, block, skip = case
    x = torch.randn(3, width, generator=generator(1), dtype=torch.float64)
    gathered = x if perm is None else x[:, perm.long()]
    before = gathered[:, skip:].unflatten(1, (-1, block)).norm(dim=-1)
    after = rotate(x, perm, signs, block, skip)[:, skip:].unflatten(1, (-1, block)).norm(dim=-1)
    assert_close("block norms", before, after, 1e-13)


@given(transforms())
def test_it_is_the_dense_matrix_of_its_definition(case: tuple) -> None:
    width, perm, signs, block, skip = case
    gather = torch.eye(width, dtype=torch.float64)
    if perm is not None:
        gather = gather[:, perm.long()]
    flips = torch.ones(width, dtype=torch.float64)
    if signs is not None and block > 1:
        flips[skip:] = unpack_signs(signs, width)[skip:].double()
    blocks = [hadamard_signs(block).double() / block**0.5] * ((width - skip) // block)
    dense = gather @ torch.diag(flips) @ torch.block_diag(torch.eye(skip, dtype=torch.float64), *blocks)
    x = torch.randn(3, width, generator=generator(1), dtype=torch.float64)
    assert_close("x T", x @ dense, rotate(x, perm, signs, block, skip), 1e-13)


@pytest.mark.parametrize("size", [1 << i for i in range(11)])
def test_hadamard_is_symmetric_and_its_own_inverse(size: int) -> None:
    signs = hadamard_signs(size)
    assert torch.equal(signs, signs.T)
    assert torch.equal(signs.double() @ signs.double(), size * torch.eye(size, dtype=torch.float64))
    x = torch.randn(2, 3 * size, generator=generator(), dtype=torch.float64)
    assert_close("H H x", x, block_hadamard(block_hadamard(x, size), size), 1e-13)
    assert_close("H x", x.unflatten(1, (3, size)) @ signs.double() / size**0.5,
                 block_hadamard(x, size).unflatten(1, (3, size)), 1e-13)  # fmt: skip


@given(st.integers(1, 70), st.integers(0, 999))
def test_signs_round_trip(width: int, seed: int) -> None:
    signs = torch.randint(0, 2, (width,), generator=generator(seed)) * 2 - 1
    packed = pack_signs(signs)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-width // 8)
    assert torch.equal(unpack_signs(packed, width).long(), signs)


def test_the_lowest_bit_is_the_first_sign() -> None:
    assert pack_signs(torch.tensor([-1, 1, 1, 1, 1, 1, 1, 1, 1, -1])).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(5, 512, generator=generator()).to(dtype)
    assert torch.equal(rotate(x, None, None, 256, 0), rotate(x.float(), None, None, 256, 0).to(dtype))


@pytest.mark.usefixtures("poisoned_memory")
@given(transforms())
def test_inverse_writes_every_value(case: tuple) -> None:
    width, *args = case
    assert torch.isfinite(unrotate(torch.ones(2, width), *args)).all()


def test_wide_inputs_take_an_int32_permutation() -> None:
    width = 40_000
    perm = torch.randperm(width, generator=generator())
    x = torch.arange(width, dtype=torch.float32)
    assert torch.equal(rotate(x, perm.to(torch.int32), None, 1, 0), x[perm])
    assert torch.equal(unrotate(x[perm], perm.to(torch.int32), None, 1, 0), x)
