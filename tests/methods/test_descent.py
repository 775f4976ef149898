"""Descent on codes and scales: it never raises the loss, stops at an optimum, and keeps codes and scales in range."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lopro_fx.kernels.formats.affine.descent import descend
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.methods.ldlq import feedback, proxy_loss, round_with_feedback
from tests.helpers import damped, generator, gram_of, heavy_tailed
from tests.methods.problems import affine

widths = st.integers(1, 130)
group_sizes = st.sampled_from((32, 64, -1))


def _problem(width: int, seed: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(rows, width, generator=generator(seed + 100))
    return weight, gram_of(heavy_tailed(2 * width, width, seed))


def _loss(weight: torch.Tensor, gram: torch.Tensor, rounded: AffineRounded) -> float:
    return proxy_loss((weight - rounded.dense()).double(), gram.double())


@given(st.sampled_from((2, 3, 4)), group_sizes, widths, st.integers(0, 99))
def test_each_sweep_lowers_the_loss_or_leaves_it(bits: int, size: int, width: int, seed: int) -> None:
    weight, gram = _problem(width, seed)
    start = affine(bits, size, 4).nearest(weight, ())
    losses = [_loss(weight, damped(gram, 0.01), descend(weight, damped(gram, 0.01), start, n)) for n in range(4)]
    for before, after in pairwise(losses):
        assert after <= before * (1 + 1e-5)


@given(st.sampled_from((2, 3, 4, 8)), group_sizes, widths, st.integers(0, 99))
def test_codes_and_scales_stay_in_range(bits: int, size: int, width: int, seed: int) -> None:
    weight, gram = _problem(width, seed)
    rounded = descend(weight, damped(gram, 0.01), affine(bits, size, 0).nearest(weight, ()), 2)
    assert rounded.codes.dtype == torch.uint8
    assert int(rounded.codes.max()) < 1 << bits
    assert (rounded.scales > 0).all()
    assert torch.equal(rounded.scales, rounded.scales.half().float())


def test_no_single_code_can_be_improved_at_the_end() -> None:
    weight, gram = _problem(40, 3)
    rounded = descend(weight, damped(gram, 0.01), affine(3, -1, 4).nearest(weight, ()), 60)
    norm = damped(gram, 0.01)
    best = _loss(weight, norm, rounded)
    for column in range(40):
        for step in (-1, 1):
            codes = rounded.codes.to(torch.int16)
            codes[:, column] = (codes[:, column] + step).clamp(0, 7)
            other = AffineRounded(codes.to(torch.uint8), rounded.scales, rounded.zeros, 3, -1)
            error = ((weight - other.dense()) @ norm * (weight - other.dense())).sum(1)
            now = ((weight - rounded.dense()) @ norm * (weight - rounded.dense())).sum(1)
            assert (error >= now * (1 - 1e-4)).all()
    assert best < _loss(weight, norm, affine(3, -1, 4).nearest(weight, ()))


@given(st.sampled_from((2, 3, 4)), group_sizes, st.integers(2, 300), st.integers(0, 99))
@settings(max_examples=20)
def test_no_scale_can_be_improved_at_the_end(bits: int, size: int, width: int, seed: int) -> None:
    """By least squares on its group alone, but for the rounding of the scale to 11 bits."""
    weight, gram = _problem(width, seed)
    norm = damped(gram, 0.01).double()
    rounded = descend(weight, norm.float(), affine(bits, size, 4).nearest(weight, ()), 60)
    error, level = (weight - rounded.dense()).double(), (rounded.dense() / _spread(rounded.scales, rounded)).double()
    for group in range(rounded.scales.shape[1]):
        own = torch.zeros(width, dtype=torch.float64)
        own[group * size : (group + 1) * size if size > 0 else width] = 1
        part = level * own
        step = ((error @ norm) * part).sum(1) / ((part @ norm) * part).sum(1)
        assert (step.abs() <= rounded.scales[:, group] * 2**-10 + 1e-6).all()


def _spread(scales: torch.Tensor, rounded: AffineRounded) -> torch.Tensor:
    width = rounded.codes.shape[1]
    return scales.repeat_interleave(width if rounded.group_size == -1 else rounded.group_size, 1)[:, :width]


def test_a_gram_of_rank_one_changes_nothing_for_the_worse() -> None:
    weight = torch.randn(4, 64, generator=generator(1))
    vector = torch.randn(1, 64, generator=generator(2))
    gram = vector.T @ vector
    start = round_with_feedback(weight, feedback(gram, 0.01), affine(3, 32))
    rounded = descend(weight, damped(gram, 0.01), start, 3)
    assert torch.isfinite(rounded.dense()).all()
    assert _loss(weight, damped(gram, 0.01), rounded) <= _loss(weight, damped(gram, 0.01), start)


def test_no_sweep_is_no_change() -> None:
    weight, gram = _problem(64, 1)
    start = affine(3, 32, 4).nearest(weight, ())
    assert descend(weight, damped(gram, 0.01), start, 0) is start
