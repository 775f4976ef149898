"""Transforms of a group: exact rewrites, loss kept, and orders that do not depend on units."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx import LoPRo
from lopro_fx.kernels.rotate.reference import unpack_signs
from lopro_fx.layer import Transform
from lopro_fx.methods import rotation
from lopro_fx.methods.rotation import (
    as_index,
    energy_order,
    importance_order,
    largest_block,
    mixing_order,
    random_signs,
)
from tests.helpers import assert_close, generator, gram_of, heavy_tailed
from tests.methods.problems import affine, run


@st.composite
def transforms(draw: st.DrawFn) -> tuple[int, Transform]:
    width = draw(st.sampled_from((1, 7, 48, 99, 128, 160)))
    rng = generator(draw(st.integers(0, 999)))
    skip = draw(st.sampled_from([s for s in (0, 16, 64) if s <= width]))
    block = largest_block(width - skip, draw(st.sampled_from((1, 8, 256))))
    perm = as_index(torch.randperm(width, generator=rng)) if draw(st.booleans()) else None
    signs = random_signs(width, rng) if draw(st.booleans()) else None
    return width, Transform(perm, signs, block, skip)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@given(transforms())
def test_the_rewrite_is_exact(case: tuple[int, Transform]) -> None:
    width, transform = case
    weight, x, left, right = (
        _normal(9, width),
        _normal(width, 4, seed=1),
        _normal(9, 3, seed=2),
        _normal(3, width, seed=3),
    )
    moved = transform.forward(x.T).T
    got = transform.forward(weight - left @ right) @ moved + left @ (transform.forward(right) @ moved)
    assert_close("W x", weight @ x, got, 1e-12)


@given(transforms())
def test_the_loss_is_the_same_on_both_sides(case: tuple[int, Transform]) -> None:
    width, transform = case
    error, gram = _normal(6, width), gram_of(_normal(3 * width, width, seed=1))
    moved_error, moved = transform.forward(error), transform.gram(gram)
    assert_close("tr(E H Eᵀ)", (error @ gram * error).sum(), (moved_error @ moved * moved_error).sum(), 1e-12)
    assert_close("symmetry", moved, moved.T, 1e-14)
    assert_close("inverse", error, transform.inverse(moved_error), 1e-13)


@given(st.integers(0, 5000), st.sampled_from((1, 2, 64, 256, 1024)))
def test_the_block_is_the_largest_power_of_two_that_divides(width: int, limit: int) -> None:
    block = largest_block(width, limit)
    assert block & (block - 1) == 0
    assert block <= limit
    if width:
        assert width % block == 0
        assert block == limit or width % (block * 2)
    else:
        assert block == 1


@given(st.integers(2, 60), st.integers(0, 999), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_orders_ignore_units(width: int, seed: int, gram_unit: float, weight_unit: float) -> None:
    gram, residual = gram_of(heavy_tailed(3 * width, width, seed)).double(), _normal(8, width, seed=seed)
    # A power of two scales without rounding, so that ties can't fall the other way.
    h, w = 2.0 ** round(torch.tensor(gram_unit).log2().item()), 2.0 ** round(torch.tensor(weight_unit).log2().item())
    order = importance_order(residual, gram)
    assert torch.equal(order.sort().values, torch.arange(width))
    assert torch.equal(importance_order(residual * w, gram * h), order)
    assert torch.equal(energy_order(gram * h), energy_order(gram))
    assert torch.equal(affine(3, 32).order(gram * h), affine(3, 32).order(gram))


@given(st.integers(3, 60), st.integers(0, 999), st.integers(1, 3))
def test_dead_columns_come_last(width: int, seed: int, dead: int) -> None:
    rows = heavy_tailed(3 * width, width, seed)
    gone = torch.randperm(width, generator=generator(seed))[:dead]
    rows[:, gone] = 0
    residual = _normal(8, width, seed=seed)
    residual[:, gone] = 0
    order = importance_order(residual, gram_of(rows))
    assert set(order[-dead:].tolist()) == set(gone.tolist())
    assert set(energy_order(gram_of(rows))[-dead:].tolist()) == set(gone.tolist())


def test_all_columns_dead_is_still_a_permutation() -> None:
    assert torch.equal(importance_order(torch.ones(2, 5), torch.zeros(5, 5)).sort().values, torch.arange(5))


def test_equal_weights_rank_by_energy() -> None:
    energies = torch.tensor([3.0, 9.0, 1.0, 27.0])
    order = importance_order(torch.ones(4, 4), torch.diag(energies))
    assert order.tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(("width", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_permutations_take_the_narrowest_type(width: int, dtype: torch.dtype) -> None:
    index = as_index(torch.arange(width))
    assert index.dtype == dtype
    assert index.max() == width - 1


def test_group_order_keeps_groups_whole_and_ranks_them() -> None:
    diagonal = torch.tensor([1.0, 2.0, 9.0, 8.0, 4.0, 5.0, 0.5])
    assert affine(3, 2).order(torch.diag(diagonal)).tolist() == [2, 3, 5, 4, 1, 0, 6]
    assert affine(3, -1).order(torch.diag(diagonal)).tolist() == [2, 3, 5, 4, 1, 0, 6]


def test_signs_are_random_and_repeatable() -> None:
    signs = unpack_signs(random_signs(1000, generator(1)), 1000)
    assert 400 < (signs < 0).sum() < 600
    assert torch.equal(random_signs(1000, generator(1)), random_signs(1000, generator(1)))
    assert not torch.equal(random_signs(1000, generator(1)), random_signs(1000, generator(2)))


@given(st.integers(1, 4), st.integers(2, 9), st.sampled_from((16, 64)), st.booleans(), st.integers(0, 99))
def test_columns_are_mixed_where_blocks_differ(rows: int, blocks: int, block: int, zeros: bool, seed: int) -> None:
    weight = torch.randn(64 * rows, blocks * block, generator=generator(seed))
    if zeros:
        weight[::2] = 0
    assert mixing_order(weight, block, generator(seed)) is None
    weight[:, :block] *= 2
    order = mixing_order(weight * 2.0 ** (seed - 50), block, generator(seed))
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(blocks * block))
    before, after = (w.square().unflatten(1, (-1, block)).mean((0, 2)).var() for w in (weight, weight[:, order]))
    assert after < before


def test_what_one_block_covers_is_not_mixed() -> None:
    weight = torch.randn(8, 64, generator=generator()) * torch.arange(64)
    assert mixing_order(weight, 64, generator()) is None
    assert mixing_order(weight, 1, generator()) is None
    assert mixing_order(torch.zeros(8, 64), 16, generator()) is None


@pytest.mark.parametrize("format", ["affine", "trellis"])
def test_mixing_lowers_the_loss_of_heads_that_differ(format: str) -> None:
    """Heads that write much and are read with large weights, as in attention's output."""
    head = torch.linspace(0.25, 2, 8).repeat_interleave(16)
    x = torch.randn(512, 128, generator=generator(1)) * head
    weight = torch.randn(96, 128, generator=generator(2)) * head
    config = LoPRo(bits=3, rank=0, block_size=16, format=format, window=12 if format == "trellis" else None)
    mixed = run(([weight], x), config)
    assert mixed.transform.perm is not None
    with mock.patch.object(rotation, "_SPREAD", torch.inf):
        plain = run(([weight], x), config)
    assert plain.transform.perm is None
    assert mixed.relative < 0.9 * plain.relative


def test_the_identity_returns_its_input() -> None:
    x = torch.ones(2, 3)
    assert Transform().forward(x) is x
    assert Transform(signs=random_signs(3, generator())).inverse(x) is x
