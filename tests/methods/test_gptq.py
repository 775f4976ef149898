"""Rounding with error feedback: the identities that it rests on, its bounds, and matrices that it must survive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.kernels.formats.affine.grid import fit_grid
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.methods.ldlq import feedback, proxy_loss, round_with_feedback
from tests.helpers import assert_close, damped, generator, gram_of, heavy_tailed
from tests.methods.problems import affine

BITS = (2, 3, 4, 8)
widths = st.integers(1, 130)
group_sizes = st.sampled_from((32, 64, 128, -1))


def _weight(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=generator(seed + 100))


def _step(rounded: AffineRounded) -> Tensor:
    width = rounded.codes.shape[1]
    size = width if rounded.group_size == -1 else rounded.group_size
    return rounded.scales.repeat_interleave(size, 1)[:, :width]


@given(widths, st.integers(0, 99))
def test_factors_multiply_back_to_the_damped_gram(width: int, seed: int) -> None:
    gram = gram_of(heavy_tailed(4 * width, width, seed))
    fb = feedback(gram, 0.01)
    upper, pivots = fb.upper.double(), fb.pivots.double()
    assert_close("U diag(d) Uᵀ", damped(gram, 0.01), upper * pivots @ upper.T, 1e-5)
    assert torch.equal(fb.upper, fb.upper.triu())
    assert_close("diagonal of U", torch.ones(width), fb.upper.diagonal(), 1e-6)
    assert (fb.pivots > 0).all()
    assert fb.damp == 0.01


@given(st.sampled_from(BITS), group_sizes, widths, st.integers(0, 99))
def test_each_column_is_rounded_to_nearest_after_the_feedback(bits: int, size: int, width: int, seed: int) -> None:
    """And the proxy loss on the damped Gram is the pivots times these rounding errors squared, nothing else."""
    weight, gram = _weight(5, width, seed), gram_of(heavy_tailed(4 * width, width, seed))
    fb = feedback(gram, 0.01)
    rounded = round_with_feedback(weight, fb, affine(bits, size))
    error = (weight - rounded.dense()).double()
    rounding = error @ fb.upper.double()
    inside = (rounded.codes > 0) & (rounded.codes < (1 << bits) - 1)
    assert (rounding.abs() <= _step(rounded) * 0.5001 + 1e-5)[inside].all()
    loss = (error @ damped(gram, 0.01).double() * error).sum()
    assert_close("loss", loss, (rounding.square() * fb.pivots.double()).sum(), 1e-4)


@given(st.sampled_from(BITS), group_sizes, widths, st.integers(0, 99))
def test_a_diagonal_gram_is_plain_rounding(bits: int, size: int, width: int, seed: int) -> None:
    weight = _weight(5, width, seed)
    diagonal = torch.rand(width, generator=generator(seed)) + 0.1
    fb = feedback(torch.diag(diagonal), 0)
    rounded = round_with_feedback(weight, fb, affine(bits, size))
    blocks = zip(
        weight.T.split(width if size == -1 else size), diagonal.split(width if size == -1 else size), strict=True
    )
    nearest = []
    for block, weights in blocks:
        grid = fit_grid(block, bits, weights)
        nearest.append(grid.value(grid.round(block)))
    # A weight half-way between two codes may go either way, so errors are compared, not codes.
    assert_close("errors", (torch.cat(nearest).T - weight).abs(), (rounded.dense() - weight).abs(), 1e-4)


@given(st.sampled_from(BITS), st.sampled_from((32, 64)), st.integers(1, 3), st.integers(0, 99))
def test_an_order_of_whole_groups_is_rounding_the_permuted_matrix(bits: int, size: int, groups: int, seed: int) -> None:
    width = size * groups
    weight, gram = _weight(4, width, seed), gram_of(heavy_tailed(4 * width, width, seed))
    order = affine(3, size).order(gram)
    fb = feedback(gram[order][:, order], 0.01)
    ordered = round_with_feedback(weight, fb, affine(bits, size), order=order)
    permuted = round_with_feedback(weight[:, order], fb, affine(bits, size))
    assert torch.equal(ordered.codes[:, order], permuted.codes)
    assert torch.equal(ordered.scales[:, order[::size] // size], permuted.scales)
    assert torch.equal(ordered.zeros[:, order[::size] // size], permuted.zeros)
    assert torch.equal(ordered.dense()[:, order], permuted.dense())


@given(st.sampled_from(BITS), group_sizes, widths, st.integers(0, 99))
def test_static_grids_allow_any_order(bits: int, size: int, width: int, seed: int) -> None:
    """Each column is rounded to nearest, on the grid of its own group, after the feedback of those before it."""
    weight, gram = _weight(5, width, seed), gram_of(heavy_tailed(4 * width, width, seed))
    order = torch.randperm(width, generator=generator(seed))
    fb = feedback(gram[order][:, order], 0.01)
    rounded = round_with_feedback(weight, fb, affine(bits, size), order=order, static=True)
    pivots = torch.empty(width).index_copy_(0, order, fb.pivots)
    whole = width if size == -1 else size
    for i, (block, weights) in enumerate(zip(weight.T.split(whole), pivots.split(whole), strict=True)):
        assert torch.equal(rounded.scales[:, i], fit_grid(block, bits, weights).scale)
    rounding = (weight - rounded.dense()).double()[:, order] @ fb.upper.double()
    inside = ((rounded.codes > 0) & (rounded.codes < (1 << bits) - 1))[:, order]
    assert (rounding.abs() <= _step(rounded)[:, order] * 0.5001 + 1e-5)[inside].all()


@given(group_sizes, widths, st.integers(0, 99))
def test_an_order_covers_short_last_groups(size: int, width: int, seed: int) -> None:
    weight, gram = _weight(4, width, seed), gram_of(heavy_tailed(4 * width, width, seed))
    order = affine(3, size).order(gram)
    assert torch.equal(order.sort().values, torch.arange(width))
    rounded = round_with_feedback(weight, feedback(gram[order][:, order], 0.01), affine(8, size), order=order)
    assert proxy_loss(weight - rounded.dense(), gram) < 1e-2 * proxy_loss(weight, gram)


@given(st.sampled_from(BITS), group_sizes, widths, st.integers(0, 99))
def test_codes_stay_in_range_and_grids_fit_fp16(bits: int, size: int, width: int, seed: int) -> None:
    weight, gram = _weight(3, width, seed), gram_of(heavy_tailed(2 * width, width, seed))
    rounded = round_with_feedback(weight, feedback(gram, 0.01), affine(bits, size))
    assert rounded.codes.dtype == rounded.zeros.dtype == torch.uint8
    assert rounded.codes.max().item() < 1 << bits
    assert rounded.zeros.max().item() < 1 << bits
    assert torch.equal(rounded.scales.half().float(), rounded.scales)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_beats_rounding_to_nearest(bits: int, seed: int) -> None:
    weight, gram = _weight(32, 128, seed), gram_of(heavy_tailed(512, 128, seed))
    order = affine(3, 32).order(gram)
    fb = feedback(gram[order][:, order], 0.01)
    with_feedback = round_with_feedback(weight, fb, affine(bits, 32), order=order)
    nearest = affine(bits, 32, 24).nearest(weight, ())
    assert proxy_loss(weight - with_feedback.dense(), gram) < 0.9 * proxy_loss(weight - nearest.dense(), gram)


def test_eight_bits_leave_almost_nothing() -> None:
    weight, gram = _weight(16, 128), gram_of(heavy_tailed(512, 128))
    rounded = round_with_feedback(weight, feedback(gram, 0.01), affine(8, 32))
    assert proxy_loss(weight - rounded.dense(), gram) < 5e-5 * proxy_loss(weight, gram)


@pytest.mark.usefixtures("poisoned_memory")
@given(st.sampled_from(BITS), group_sizes, widths, st.booleans())
def test_every_result_is_written(bits: int, size: int, width: int, ordered: bool) -> None:
    gram = gram_of(heavy_tailed(2 * width, width))
    order = affine(3, size).order(gram) if ordered else None
    moved = gram if order is None else gram[order][:, order]
    dense = round_with_feedback(_weight(3, width), feedback(moved, 0.01), affine(bits, size), order=order).dense()
    assert torch.isfinite(dense).all()
    assert dense.abs().max() < 100


@given(st.integers(2, 60), st.integers(1, 3), st.integers(0, 99))
def test_a_singular_gram_is_damped_until_it_factors(width: int, rank: int, seed: int) -> None:
    assume(rank < width)
    rows = torch.randn(rank, width, generator=generator(seed))
    gram = rows.T @ rows * 1e3
    fb = feedback(gram, 0.0)
    assert_close("factors", damped(gram, fb.damp), fb.upper.double() * fb.pivots.double() @ fb.upper.double().T, 1e-4)
    assert (fb.pivots > 0).all()
    assert torch.isfinite(round_with_feedback(_weight(3, width), fb, affine(3, 32)).dense()).all()


def test_an_indefinite_gram_records_the_damping_that_it_took() -> None:
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    fb = feedback(indefinite, 0.01)
    assert fb.damp > 1.0
    upper = fb.upper.double()
    assert_close("factors", damped(indefinite, fb.damp), upper * fb.pivots.double() @ upper.T, 1e-6)


def test_no_damping_can_mend_a_gram_that_is_not_a_number() -> None:
    with pytest.raises(ArithmeticError, match="no Cholesky factor"):
        feedback(torch.full((3, 3), torch.nan), 0.01)


def test_a_zero_gram_is_rounding_to_nearest() -> None:
    weight = _weight(4, 96)
    rounded = round_with_feedback(weight, feedback(torch.zeros(96, 96), 0.01), affine(3, 32))
    nearest = affine(3, 32, 24).nearest(weight, ())
    assert_close("errors", (nearest.dense() - weight).abs(), (rounded.dense() - weight).abs(), 1e-4)
