"""The compiled loops over columns against their definition in ATen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.kernels.cpu.native import forced, library
from lopro_fx.kernels.formats.affine import grid
from lopro_fx.kernels.formats.affine.columns import native, reference
from lopro_fx.kernels.formats.affine.grid import Grid
from lopro_fx.methods.ldlq import feedback
from tests.helpers import assert_close, damped, generator, gram_of, heavy_tailed

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

# Paths that the processor lacks run as its best one.
paths = st.sampled_from(("portable", "avx2", "avx512"))
bits, widths, rows, seeds = st.sampled_from((2, 3, 4, 8)), st.integers(1, 150), st.integers(1, 70), st.integers(0, 99)


def _block(width: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """fp32 (width, rows) weights and a Gram (width, width)."""
    return torch.randn(width, rows, generator=generator(seed)), damped(
        gram_of(heavy_tailed(3 * width, width, seed)), 0.1
    )


@given(bits, widths, rows, st.sampled_from((0, 1, 24)), st.booleans(), paths, seeds)
def test_grids_have_the_error_of_the_definition(
    bits: int, width: int, rows: int, steps: int, weighted: bool, path: str, seed: int
) -> None:
    block, _ = _block(width, rows, seed)
    block[:, 0] = seed % 3 - 1  # equal weights, or zeros
    weights = torch.rand(width, generator=generator(seed)) + 0.1 if weighted else None
    with forced(path):
        found = native.fit_grid(block, bits, weights, steps)
    wanted = grid.fit_grid(block, bits, weights, steps)

    def error(own: Grid) -> Tensor:
        counts = torch.ones(width) if weights is None else weights
        return counts.double() @ (own.value(own.round(block)) - block).double().square()

    # Two ranges of nearly equal error may change places.
    assert_close("errors", error(wanted), error(found), 1e-3)
    assert (found.scale == wanted.scale).float().mean() > 0.95


@given(bits, widths, rows, st.booleans(), paths, seeds)
def test_rounding_is_the_definition(bits: int, width: int, rows: int, own: bool, path: str, seed: int) -> None:
    block, gram = _block(width, rows, seed)
    fitted, fb = grid.fit_grid(block, bits), feedback(gram, 0.01)
    if own:  # a grid for each column
        factor = torch.rand(width, 1, generator=generator(seed)) + 0.5
        fitted = Grid(fitted.scale * factor, fitted.zero.expand(width, rows).contiguous(), fitted.levels)
    target = block + torch.randn(width, rows, generator=generator(seed + 1)) * 0.1
    with forced(path):
        error, codes = native.round_columns(block, target.clone(), fb.upper, fitted)
    assert_close("errors", block - fitted.value(codes.float()), error, 1e-5)
    # Each column is rounded to nearest after the feedback of those before it; ties may go either way.
    wanted = target + fb.upper.triu(1).T @ error
    off = (fitted.value(codes.float()) - wanted).abs() - (fitted.value(fitted.round(wanted)) - wanted).abs()
    assert (off <= 1e-4 * fitted.scale).all()


@given(bits, st.sampled_from((32, 64, 128, 150)), widths, rows, st.booleans(), paths, seeds)
@settings(max_examples=40)
def test_descent_is_the_definition(
    bits: int, group: int, width: int, rows: int, scales: bool, path: str, seed: int
) -> None:
    block, gram = _block(width, rows, seed)
    own = [grid.fit_grid(part, bits) for part in block.split(group)]
    codes = torch.cat([g.round(part) for g, part in zip(own, block.split(group), strict=True)]).to(torch.uint8)
    start = Grid(torch.stack([g.scale for g in own]), torch.stack([g.zero for g in own]), 1 << bits)
    index = torch.arange(width) // group

    def run(descend: object) -> tuple[Tensor, Tensor]:
        found, moved = codes.clone(), Grid(start.scale.clone(), start.zero, start.levels)
        error = block - Grid(moved.scale[index], moved.zero[index], moved.levels).value(found.float())
        descend(found, error, gram @ error, gram, moved, group, scales)  # pyright: ignore[reportCallIssue]
        assert_close("error", block - Grid(moved.scale[index], moved.zero[index], 0).value(found.float()), error, 1e-4)
        return ((gram.double() @ error.double()) * error.double()).sum(0), found

    before = block - Grid(start.scale[index], start.zero[index], 0).value(codes.float())
    with forced(path):
        loss, found = run(native.descend_columns)
    wanted, other = run(reference.descend_columns)
    assert (loss <= ((gram @ before) * before).sum(0).double() * (1 + 1e-4) + 1e-9).all()
    # A tie that goes another way leads to other codes after it, of about the same loss.
    assert (found == other).float().mean() > 0.9
    assert loss.sum() == pytest.approx(wanted.sum().item(), rel=0.02)
