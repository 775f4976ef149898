"""The Triton kernels of solvers, which round columns, against their definitions in ATen."""

from __future__ import annotations

import pytest
import torch

import lopro_fx  # noqa: F401
from lopro_fx.kernels.formats.affine import grid
from lopro_fx.kernels.formats.affine.columns import device as kernels
from lopro_fx.kernels.formats.affine.columns import reference
from lopro_fx.kernels.formats.affine.grid import Grid
from lopro_fx.kernels.formats.trellis.encode import device as search
from lopro_fx.kernels.formats.trellis.encode import reference as search_reference
from lopro_fx.methods.ldlq import feedback
from tests.helpers import assert_close, damped, generator, gram_of, heavy_tailed

SHAPES = [(64, 20), (37, 33), (128, 16), (1, 1)]


@pytest.mark.parametrize(("width", "rows"), [*SHAPES, (150, 5)])
@pytest.mark.parametrize("steps", [0, 5])
def test_grids(device: torch.device, width: int, rows: int, steps: int) -> None:
    block = torch.randn(width, rows, generator=generator(width)).to(device)
    block[:, 0] = 0
    weights = torch.rand(width, generator=generator(1)).to(device) + 0.1
    got, wanted = kernels.fit_grid(block, 3, weights, steps), grid.fit_grid(block, 3, weights, steps)
    errors = [weights @ (own.value(own.round(block)) - block).square() for own in (wanted, got)]
    assert_close("errors", errors[0], errors[1], 1e-3)


@pytest.mark.parametrize(("width", "rows"), SHAPES)
@pytest.mark.parametrize("own", [False, True])
def test_rounding(device: torch.device, width: int, rows: int, own: bool) -> None:
    block = torch.randn(width, rows, generator=generator(width)).to(device)
    fitted = grid.fit_grid(block, 3)
    if own:
        scale = fitted.scale * (torch.rand(width, 1, generator=generator(2)).to(device) + 0.5)
        fitted = Grid(scale, fitted.zero.expand(width, rows).contiguous(), fitted.levels)
    upper = feedback(gram_of(heavy_tailed(3 * width, width, 0)), 0.01).upper.to(device)
    error, codes = kernels.round_columns(block, block * 1.1, upper, fitted)
    wanted = reference.round_columns(block, block * 1.1, upper, fitted)
    # A tie may go either way, and what follows it then differs.
    assert (codes == wanted[1]).float().mean() > 0.99
    assert_close("error", block - fitted.value(codes.float()), error, 1e-5)


@pytest.mark.parametrize(("width", "rows", "group"), [(64, 20, 32), (100, 17, 64), (40, 3, 40), (1, 1, 32)])
@pytest.mark.parametrize("scales", [False, True])
def test_descent(device: torch.device, width: int, rows: int, group: int, scales: bool) -> None:
    block = torch.randn(width, rows, generator=generator(width)).to(device)
    gram = damped(gram_of(heavy_tailed(3 * width, width, 1)), 0.1).to(device)
    grids = [grid.fit_grid(part, 3) for part in block.split(group)]
    codes = torch.cat([g.round(part) for g, part in zip(grids, block.split(group), strict=True)]).to(torch.uint8)
    index = torch.arange(width, device=device) // group
    found = []
    for module in (reference, kernels):
        own = Grid(torch.stack([g.scale for g in grids]), torch.stack([g.zero for g in grids]), 8)
        code = codes.clone()
        error = block - Grid(own.scale[index], own.zero[index], 8).value(code.float())
        module.descend_columns(code, error, gram @ error, gram, own, group, scales)
        assert_close("E", block - Grid(own.scale[index], own.zero[index], 8).value(code.float()), error, 1e-4)
        found.append((code, ((gram @ error) * error).sum().item()))
    assert (found[0][0] == found[1][0]).float().mean() > 0.98
    assert found[1][1] == pytest.approx(found[0][1], rel=0.01)


@pytest.mark.parametrize(("step", "pair"), [(3, 1), (2, 1), (4, 1), (3, 2), (5, 2)])
def test_trellis_search(device: torch.device, step: int, pair: int) -> None:
    strips = [9, 1, 4]
    rng, rows = generator(step), sum(strips)
    weight = torch.randn(2 * pair, rows, generator=rng)
    upper = torch.eye(2 * pair) + torch.randn(2 * pair, 2 * pair, generator=rng).triu(1) * 0.3
    pivots, importance = torch.rand(2 * pair, generator=rng) + 0.5, torch.rand(rows, generator=rng) + 0.5
    operands = (weight, weight * 1.1, upper, pivots, importance)
    error, states = search_reference.encode(weight, weight * 1.1, *operands[2:], strips, step, pair, 12)
    got = search.encode(*(t.to(device) for t in operands), strips, step, pair, 12)
    assert torch.equal(got[1].cpu(), states)
    assert_close("error", error, got[0].cpu(), 1e-6)
