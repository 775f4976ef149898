"""Grids: how far a rounded weight may be from the weight, and that the clipping search never loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.kernels.formats.affine.grid import fit_grid
from lopro_fx.kernels.formats.affine.quantizer import AffineQuantizer
from tests.helpers import generator

BITS = (2, 3, 4, 8)


@st.composite
def blocks(draw: st.DrawFn) -> Tensor:
    """(g, m) weights of one group: any scale from 1e-4 to 1e4, centred or one-sided, some rows constant."""
    rng = generator(draw(st.integers(0, 9999)))
    block = torch.randn(draw(st.integers(1, 64)), draw(st.integers(1, 6)), generator=rng)
    block += draw(st.sampled_from((0.0, 3.0, -3.0)))
    if draw(st.booleans()):
        block[:, 0] = block[0, 0]
    return block * 10.0 ** draw(st.integers(-4, 4))


@given(blocks(), st.sampled_from(BITS))
def test_without_clipping_no_weight_is_off_by_more_than_half_a_step(block: Tensor, bits: int) -> None:
    grid = fit_grid(block, bits, None, 0)
    width = block.amax(0).clamp_min(0) - block.amin(0).clamp_max(0)
    # fp16 keeps 11 bits of the scale, which moves the grid's far end by that part of its range.
    assert ((grid.value(grid.round(block)) - block).abs() <= grid.scale / 2 + width * 2**-10).all()


@given(blocks(), st.sampled_from(BITS), st.sampled_from((0, 1, 7, 24)))
def test_codes_and_scales_fit_their_types(block: Tensor, bits: int, steps: int) -> None:
    grid = fit_grid(block, bits, None, steps)
    codes = grid.round(block)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= (1 << bits) - 1
    significand = torch.frexp(grid.scale).mantissa * 2**11
    assert torch.equal(significand, significand.round())
    zero_codes = grid.zero - 0.5
    assert torch.equal(zero_codes, zero_codes.round().clamp(0, (1 << bits) - 1))


@given(blocks(), st.sampled_from(BITS), st.booleans())
def test_more_clipping_steps_are_never_worse(block: Tensor, bits: int, weighted: bool) -> None:
    weights = torch.rand(block.shape[0], generator=generator(1)) + 0.1 if weighted else torch.ones(block.shape[0])

    def error(steps: int) -> Tensor:
        grid = fit_grid(block, bits, weights, steps)
        return weights.double() @ (grid.value(grid.round(block)) - block).double().square()

    full, few, many = error(0), error(6), error(24)
    slack = 1 + 1e-5
    assert (few <= full * slack).all()
    assert (many <= few * slack).all()


def test_weighting_a_column_makes_its_error_smaller() -> None:
    block = torch.randn(64, 50, generator=generator())
    weights = torch.ones(64)
    weights[0] = 1e3

    def error(weights: Tensor | None) -> float:
        grid = fit_grid(block, 3, weights, 24)
        return (grid.value(grid.round(block)) - block)[0].square().sum().item()

    assert error(weights) < 0.5 * error(None)


@given(blocks(), st.sampled_from(BITS))
def test_a_grid_scales_with_its_weights(block: Tensor, bits: int) -> None:
    plain, doubled = fit_grid(block, bits), fit_grid(block * 2, bits)
    normal = plain.scale >= 2**-14  # below, fp16 rounds the two scales differently
    assert torch.equal(doubled.round(block * 2)[:, normal], plain.round(block)[:, normal])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.7, -0.02, 1e-6, -1e4])
def test_a_constant_row_is_held_within_one_step(bits: int, value: float) -> None:
    block = torch.full((32, 1), value)
    grid = fit_grid(block, bits)
    # A subnormal scale moves by up to 2**-25 when it is rounded, and the far end of the grid by all steps of it.
    assert ((grid.value(grid.round(block)) - block).abs() <= grid.scale + (1 << bits) * 2**-25).all()
    assert grid.scale.item() <= abs(value) / ((1 << bits) - 1) * 1.001 + 2**-24


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_row_stays_below_any_weight_that_matters(bits: int) -> None:
    grid = fit_grid(torch.zeros(32, 3), bits)
    assert grid.value(grid.round(torch.zeros(32, 3))).abs().max() < 1e-6


@given(st.sampled_from(BITS), st.sampled_from((32, 64, -1)), st.integers(1, 5), st.integers(1, 100))
def test_rounding_to_nearest_has_a_grid_for_every_group(bits: int, group_size: int, rows: int, width: int) -> None:
    weight = torch.randn(rows, width, generator=generator(width))
    rounded = AffineQuantizer(bits=bits, group_size=group_size, clip_steps=0).nearest(weight, ())
    groups = 1 if group_size == -1 else -(-width // group_size)
    assert rounded.codes.shape == weight.shape
    assert rounded.codes.max().item() < 1 << bits
    assert rounded.scales.shape == rounded.zeros.shape == (rows, groups)
    step = rounded.scales.repeat_interleave(width if group_size == -1 else group_size, 1)[:, :width]
    assert ((rounded.dense() - weight).abs() <= step * 0.5 + 0.02).all()
