"""Tiles of shared factors against singular value decompositions, and what is stored of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.methods.tiles import (
    Tiles,
    extra_bits,
    residuals,
    stored,
    tiled,
    tiled_with_core,
    unwhitened,
    whitened,
)
from tests.helpers import assert_close, generator, gram_of, heavy_tailed

FITS = pytest.mark.parametrize("fit", [tiled, tiled_with_core])
Fit = Callable[..., Tiles]
_GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 3))
_SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def _blocks(experts: int, out: int = 10, width: int = 14, seed: int = 0) -> Tensor:
    return torch.randn(experts, out, width, generator=generator(seed))


def _cells(rows: int, columns: int, experts: int | None = None, seed: int = 0) -> Tensor:
    """Distinct random cells; the grid's last row and column are taken."""
    index = torch.arange(rows * columns)
    every = torch.stack([index // columns, index % columns], 1).flip(0)
    order = torch.randperm(len(index) - 1, generator=generator(seed)) + 1
    return every[torch.cat([order.new_zeros(1), order])][:experts]


def _matrix(blocks: Tensor, cells: Tensor) -> Tensor:
    """The matrix of all blocks, fp64 (columns * out, rows * in)."""
    rows, columns = (cells.amax(0) + 1).tolist()
    matrix = torch.zeros(columns, blocks.shape[1], rows, blocks.shape[2], dtype=torch.float64)
    for block, (row, column) in zip(blocks, cells.tolist(), strict=True):
        matrix[column, :, row] = block
    return matrix.flatten(2).flatten(0, 1)


def _tail(matrix: Tensor, rank: int) -> float:
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()


def _error(tiles: Tiles, blocks: Tensor, weights: Tensor | None = None) -> float:
    errors = residuals(tiles, blocks)
    return (errors if weights is None else errors * weights).sum().item()


def _dense(tiles: Tiles) -> Tensor:
    return torch.stack([tiles.dense(expert) for expert in range(len(tiles.cells))])


def _energy(blocks: Tensor) -> float:
    return blocks.square().sum().item()


def _root(width: int, seed: int = 0) -> Tensor:
    """Cholesky factor of the Gram of correlated inputs."""
    return torch.linalg.cholesky(gram_of(heavy_tailed(8 * width, width, seed)))


@FITS
@given(grid=_GRIDS, shape=_SHAPES, more=st.integers(0, 3), seed=st.integers(0, 99))
def test_factors_of_full_rank_are_exact(
    fit: Fit, grid: tuple[int, int], shape: tuple[int, int], more: int, seed: int
) -> None:
    (rows, columns), (out, width) = grid, shape
    blocks, cells = _blocks(rows * columns, out, width, seed), _cells(rows, columns, seed=seed)
    rank = min(rows * width, columns * out) + more
    tiles = fit(blocks, cells, rank, generator(seed))
    assert tiles.down.shape == (rows, rank, width)
    assert tiles.up.shape == (columns, out, rank)
    assert_close("blocks", blocks, _dense(tiles), 1e-5)


@given(_GRIDS, _SHAPES, st.integers(1, 5), st.integers(0, 99))
def test_full_grids_are_near_the_truncated_svd(
    grid: tuple[int, int], shape: tuple[int, int], rank: int, seed: int
) -> None:
    (rows, columns), (out, width) = grid, shape
    blocks, cells = _blocks(rows * columns, out, width, seed), _cells(rows, columns, seed=seed)
    whole, best = _energy(blocks), _tail(_matrix(blocks, cells), rank)
    error = _error(tiled(blocks, cells, rank, generator(seed)), blocks)
    assert best - 1e-5 * whole <= error <= 1.02 * best + 1e-5 * whole
    assert error <= whole * (1 + 1e-5)


@given(_GRIDS, st.integers(1, 9), _SHAPES, st.integers(1, 5), st.integers(0, 99))
def test_private_factors_bound_shared_ones(
    grid: tuple[int, int], experts: int, shape: tuple[int, int], rank: int, seed: int
) -> None:
    (rows, columns), (out, width) = grid, shape
    cells = _cells(rows, columns, experts, seed)
    blocks = _blocks(len(cells), out, width, seed)
    without, with_core = (fit(blocks, cells, rank, generator(seed)) for fit in (tiled, tiled_with_core))
    whole, private = _energy(blocks), sum(_tail(block, rank) for block in blocks)
    assert private - 1e-5 * whole <= _error(with_core, blocks)
    assert _error(with_core, blocks) <= _error(without, blocks) + 1e-5 * whole
    assert _error(without, blocks) <= whole * (1 + 1e-5)
    again = tiled_with_core(blocks, cells, rank, generator(seed))
    assert torch.equal(_dense(again), _dense(with_core))


@FITS
@pytest.mark.parametrize("dim", [1, 2])
def test_one_column_shares_up_and_one_row_shares_down(fit: Fit, dim: int) -> None:
    """Blocks beside one another have one up factor, blocks below one another one down factor."""
    blocks = _blocks(4)
    cells = torch.zeros(4, 2, dtype=torch.int64)
    cells[:, 2 - dim] = torch.arange(4)
    tiles = fit(blocks, cells, 3, generator(), iterations=20)
    assert (len(tiles.up), len(tiles.down)) == ((1, 4) if dim == 2 else (4, 1))
    assert _error(tiles, blocks) == pytest.approx(_tail(torch.cat(list(blocks), dim - 1), 3), rel=1e-4)


@FITS
def test_one_expert_has_its_own_svd(fit: Fit) -> None:
    blocks = _blocks(1)
    tiles = fit(blocks, torch.zeros(1, 2, dtype=torch.int64), 3, generator(), iterations=20)
    assert _error(tiles, blocks) == pytest.approx(_tail(blocks[0], 3), rel=1e-4)


@FITS
@settings(max_examples=15)
@given(power=st.integers(-20, 20), experts=st.integers(5, 6), seed=st.integers(0, 99))
def test_tiles_scale_with_the_blocks(fit: Fit, power: int, experts: int, seed: int) -> None:
    blocks, cells = _blocks(experts, seed=seed), _cells(2, 3, experts, seed)
    one, other = (fit(scale * blocks, cells, 3, generator(seed)) for scale in (1.0, 2.0**power))
    assert_close("blocks", 2.0**power * _dense(one), _dense(other), 1e-4)


@FITS
@pytest.mark.parametrize("diagonal", [False, True])
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_the_scale_of_inputs_does_not_matter(fit: Fit, diagonal: bool, scale: float, seed: int) -> None:
    weights, cells = _blocks(6, seed=seed), _cells(2, 3, seed=seed)
    root = _root(14, seed)
    factor = root.diagonal() if diagonal else root
    found: list[Tensor] = []
    for used in (factor, factor * scale):
        blocks = weights * used if diagonal else weights @ used
        tiles = fit(blocks, cells, 4, generator(seed))
        back = unwhitened(tiles, used)
        assert_close("round trip", _dense(tiles), _dense(whitened(back, used)), 1e-4)
        found.append(_dense(back))
    assert_close("weights", found[0], found[1], 1e-3)


def test_rows_may_have_factors_of_their_own() -> None:
    tiles = tiled_with_core(_blocks(6), _cells(2, 3), 4, generator())
    roots = torch.stack([_root(14, seed) for seed in range(2)])
    back = unwhitened(tiles, roots)
    for expert, (row, _) in enumerate(tiles.cells.tolist()):
        assert_close("block", tiles.dense(expert), back.dense(expert) @ roots[row], 1e-4)


@FITS
def test_whitening_minimises_the_loss_of_the_gram(fit: Fit) -> None:
    weights, cells, root = _blocks(6), _cells(2, 3), _root(14)
    plain, white = fit(weights, cells, 4, generator()), fit(weights @ root, cells, 4, generator())
    losses = [((weights - _dense(tiles)) @ root).square().sum() for tiles in (plain, unwhitened(white, root))]
    assert losses[1] < 0.9 * losses[0]
    assert losses[1].item() == pytest.approx(_error(white, weights @ root), rel=1e-3)


@FITS
@settings(max_examples=20)
@given(experts=st.integers(4, 9), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_sweeps_never_raise_the_error(fit: Fit, experts: int, rank: int, seed: int) -> None:
    blocks, cells = _blocks(experts, seed=seed), _cells(3, 3, experts, seed)
    weights, whole = torch.rand(experts, generator=generator(seed)), _energy(blocks)
    tiles = (fit(blocks, cells, rank, generator(seed), weights, sweeps=sweeps) for sweeps in (0, 1, 3))
    start, one, three = (_error(each, blocks, weights) for each in tiles)
    assert max(one, three) <= start + 1e-5 * whole
    # Least squares leave out directions that two components span in their last digits alone.
    assert three <= one + 1e-3 * whole


def test_empty_cells_are_not_fitted() -> None:
    """Blocks of a matrix of low rank are exact, whatever its other cells hold."""
    rng = generator()
    up, down = torch.randn(3, 10, 2, generator=rng), torch.randn(3, 2, 14, generator=rng)
    cells = _cells(3, 3, 7)
    blocks = up[cells[:, 1]] @ down[cells[:, 0]]
    errors = [_error(tiled(blocks, cells, 2, rng, sweeps=sweeps), blocks) for sweeps in (0, 200)]
    assert errors[1] < 1e-3 * errors[0]


@FITS
def test_weights_say_whose_error_counts(fit: Fit) -> None:
    blocks, cells = _blocks(9), _cells(3, 3)
    weights = torch.ones(9)
    weights[4] = 100.0
    plain, weighted = fit(blocks, cells, 4, generator()), fit(blocks, cells, 4, generator(), weights)
    assert _error(weighted, blocks, weights) < _error(plain, blocks, weights)
    assert residuals(weighted, blocks)[4] < 0.8 * residuals(plain, blocks)[4]
    assert_close("scale", _dense(weighted), _dense(fit(blocks, cells, 4, generator(), 8 * weights)), 1e-5)


@FITS
@settings(max_examples=15)
@given(dropped=st.sets(st.integers(0, 7)), seed=st.integers(0, 99))
def test_experts_without_weight_are_finite_and_ignored(fit: Fit, dropped: set[int], seed: int) -> None:
    blocks, cells, weights = _blocks(8, seed=seed), _cells(3, 3, 8, seed), torch.ones(8)
    weights[list(dropped)] = 0
    other = blocks.clone()
    other[list(dropped)] *= -5
    tiles, others = (fit(given, cells, 3, generator(seed), weights) for given in (blocks, other))
    assert torch.isfinite(_dense(tiles)).all()
    kept = weights > 0
    assert_close("kept", _dense(tiles)[kept], _dense(others)[kept], 1e-5)
    saved = stored(tiles, blocks, torch.ones(14), weights)
    assert torch.isfinite(_dense(saved.tiles())).all()


@FITS
def test_duplicates_are_equal(fit: Fit) -> None:
    block = _blocks(1)
    blocks, cells = block.expand(6, -1, -1), _cells(2, 3)
    tiles = fit(blocks, cells, 3, generator(), iterations=20)
    dense = _dense(tiles)
    assert_close("duplicates", dense[:1].expand(6, -1, -1), dense, 1e-4)
    assert _error(tiles, blocks) == pytest.approx(6 * _tail(block[0], 3), rel=1e-4)


@FITS
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_zeros_stay_zeros(fit: Fit, rank: int) -> None:
    blocks, cells = torch.zeros(5, 6, 8), _cells(2, 3, 5)
    tiles = fit(blocks, cells, rank, generator())
    for found in (tiles, unwhitened(tiles, _root(8)), stored(tiles, blocks, _root(8)).tiles()):
        assert torch.equal(_dense(found), blocks)
    blocks[0] = 1.0
    tiles = fit(blocks, cells, rank, generator())
    assert_close("the other", blocks, _dense(tiles), 1e-5)


def test_magnitudes_are_where_they_can_be_rounded() -> None:
    blocks, cells, root = _blocks(6), _cells(2, 3), _root(14)
    tiles = tiled(blocks, cells, 4, generator())
    up, down = (side.square().sum((0, 1 if side is tiles.up else 2)) for side in (tiles.up, tiles.down))
    assert_close("even", up, down, 1e-4)
    assert (up.diff() <= 0).all()
    tiles = tiled_with_core(blocks, cells, 4, generator())
    assert_close("up", torch.eye(4).expand(3, 4, 4), tiles.up.mT @ tiles.up, 1e-5)
    assert_close("down", torch.eye(4).expand(2, 4, 4), tiles.down @ tiles.down.mT, 1e-5)
    assert_close("unit", torch.ones(2, 4), unwhitened(tiles, root).down.norm(dim=2), 1e-5)


@FITS
@pytest.mark.parametrize("core_bits", [8, 16])
@given(experts=st.integers(5, 6), rank=st.integers(1, 6), weighted=st.booleans(), seed=st.integers(0, 99))
def test_rounding_costs_little(fit: Fit, core_bits: int, experts: int, rank: int, weighted: bool, seed: int) -> None:
    root, cells = _root(14, seed), _cells(2, 3, experts, seed)
    blocks = _blocks(experts, seed=seed) @ root
    weights = torch.rand(experts, generator=generator(seed)) if weighted else None
    tiles = fit(blocks, cells, rank, generator(seed), weights)
    saved = stored(unwhitened(tiles, root), blocks, root, weights, core_bits)
    assert saved.down.values.dtype == saved.up.values.dtype == torch.int8
    share = 1.0 if weights is None else weights
    whole = (blocks.square().sum((1, 2)) * share).sum().item()
    found = _error(whitened(saved.tiles(), root), blocks, weights)
    assert found <= 1.02 * _error(tiles, blocks, weights) + 1e-3 * whole


@FITS
def test_sides_are_fitted_to_the_rounding_of_the_first(fit: Fit) -> None:
    """Of exact factors, the error is that of the last rounding alone."""
    rng = generator()
    cells, root = _cells(3, 3), _root(64)
    blocks = (
        torch.randn(3, 40, 4, generator=rng)[cells[:, 1]] @ torch.randn(3, 4, 64, generator=rng)[cells[:, 0]] @ root
    )
    tiles = unwhitened(fit(blocks, cells, 4, rng), root)
    saved = stored(tiles, blocks, root)
    rounded = [saved.tiles().down, tiles.up]
    plain = Tiles(rounded[0], rounded[1], cells, tiles.core)
    assert _error(whitened(saved.tiles(), root), blocks) < _error(whitened(plain, root), blocks)


@FITS
@pytest.mark.parametrize("core_bits", [8, 16])
def test_bits_are_those_of_the_bytes(fit: Fit, core_bits: int) -> None:
    experts, rows, columns, rank, out, width = 5, 2, 3, 4, 10, 14
    blocks = _blocks(experts)
    saved = stored(
        fit(blocks, _cells(rows, columns, experts), rank, generator()), blocks, torch.ones(width), None, core_bits
    )
    numbers = rank * (rows * width + columns * out) * 8
    scales = rank * (rows + columns) * 16
    core = 0
    if saved.core is not None:
        core = experts * rank * rank * core_bits + (experts * rank * 16 if core_bits == 8 else 0)
    cells = experts * 2 * 32
    assert extra_bits(saved) == pytest.approx((numbers + scales + core + cells) / (experts * out * width), rel=1e-12)
    assert saved.down.values.shape == (rows * rank, width)
    assert saved.up.values.shape == (columns, out, rank)
