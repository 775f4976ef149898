"""Cells of experts: grids by brute force, placements on planted structure, and in any order of the experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.methods.placement import affinity, features, grid_of, improved, place
from lopro_fx.methods.tiles import residuals, tiled, tiled_with_core
from tests.helpers import assert_close, generator

# Input and output width, and rank of the planted factors.
_IN, _OUT, _RANK = 48, 40, 4


def _planted(
    experts: int = 16, rows: int = 4, columns: int = 4, seed: int = 0, noise: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Blocks up[n] @ core[e] @ down[m] of length 1 and noise of length `noise`, and the shuffled cells."""
    rng = generator(seed)
    downs = torch.linalg.qr(torch.randn(rows, _IN, _RANK, generator=rng)).Q.mT
    ups = torch.linalg.qr(torch.randn(columns, _OUT, _RANK, generator=rng)).Q
    cells = _natural(rows * columns, columns)[torch.randperm(rows * columns, generator=rng)[:experts]]
    core, other = (torch.randn(experts, *shape, generator=rng) for shape in ((_RANK, _RANK), (_OUT, _IN)))
    core, other = (values / values.norm(dim=(1, 2), keepdim=True) for values in (core, other))
    return ups[cells[:, 1]] @ core @ downs[cells[:, 0]] + noise * other, cells


def _natural(experts: int, columns: int) -> Tensor:
    index = torch.arange(experts)
    return torch.stack([index // columns, index % columns], 1)


def _placed(blocks: Tensor, rows: int, columns: int, seed: int = 0, rank: int = _RANK // 2) -> Tensor:
    inputs, outputs = features(blocks, rank, generator(seed))
    return place(affinity(inputs), affinity(outputs), rows, columns, generator(seed))


def _error(blocks: Tensor, cells: Tensor, core: bool) -> float:
    tiles = (tiled_with_core if core else tiled)(blocks, cells, _RANK, generator())
    return residuals(tiles, blocks).sum().item()


def _captured(blocks: Tensor, cells: Tensor, rank: int) -> float:
    """What the best factors of all rows and of all columns capture, from whole Grams."""
    total = 0.0
    for side, grams in enumerate((blocks.mT @ blocks, blocks @ blocks.mT)):
        for group in cells[:, side].unique():
            total += torch.linalg.eigvalsh(grams[cells[:, side] == group].sum(0).double())[-rank:].sum().item()
    return total


def _check_cells(cells: Tensor, experts: int, rows: int, columns: int) -> None:
    assert cells.shape == (experts, 2)
    assert cells.dtype == torch.int64
    assert ((cells >= 0) & (cells < torch.tensor([rows, columns]))).all()
    assert len(cells.unique(dim=0)) == experts


@given(st.integers(1, 150), st.integers(1, 4096), st.integers(1, 4096))
def test_grids_are_the_cheapest(experts: int, width: int, out: int) -> None:
    rows, columns = grid_of(experts, width, out)
    every = [(m, n) for m in range(1, experts + 1) for n in range(1, experts + 1) if m * n >= experts]
    least = min(m * width + n * out for m, n in every)
    assert rows * columns >= experts
    assert rows * width + columns * out == least
    assert rows * columns == min(m * n for m, n in every if m * width + n * out == least)


def test_grids_of_known_models() -> None:
    def bits(rows: int, columns: int, experts: int, width: int, out: int) -> float:
        return 32 * 8 * (rows * width + columns * out) / (experts * width * out)

    # Figures of the paper: a grid of 8 x 8, and factors for each expert.
    assert bits(8, 8, 60, 2048, 1408) == pytest.approx(0.041, abs=5e-4)
    assert bits(60, 60, 60, 2048, 1408) == pytest.approx(0.307, abs=5e-4)
    assert grid_of(60, 2048, 1408) == (6, 10)
    assert grid_of(128, 2048, 768) == (8, 16)
    assert grid_of(8, 4096, 14336) == (4, 2)
    assert grid_of(64, 2048, 2048) == (8, 8)
    assert grid_of(1, 5, 9) == (1, 1)


@given(st.integers(1, 5), st.integers(1, 24), st.integers(1, 24), st.integers(1, 6), st.integers(0, 99))
def test_features_are_the_leading_singular_vectors(experts: int, out: int, width: int, rank: int, seed: int) -> None:
    rng, most = generator(seed), min(out, width)
    u, v = (torch.linalg.qr(torch.randn(experts, n, most, generator=rng)).Q for n in (out, width))
    values = 0.5 ** torch.arange(most)
    count = min(rank, most)
    inputs, outputs = features(u * values @ v.mT, rank, generator(seed))
    for name, found, exact in (("inputs", inputs, v), ("outputs", outputs, u)):
        wanted = (exact * values)[..., :count]
        assert found.shape == wanted.shape
        assert_close(name, wanted @ wanted.mT, found @ found.mT, 1e-2)


@given(st.integers(1, 8), st.integers(0, 99))
def test_features_of_an_expert_do_not_depend_on_the_others(experts: int, seed: int) -> None:
    rng = generator(seed)
    blocks, order = torch.randn(experts, 20, 30, generator=rng), torch.randperm(experts, generator=rng)
    sides = (features(given, 3, generator(seed)) for given in (blocks, blocks[order]))
    for found, permuted in zip(*sides, strict=True):
        assert_close("features", found[order] @ found[order].mT, permuted @ permuted.mT, 1e-4)


def test_blocks_of_low_rank_have_as_many_features() -> None:
    blocks = torch.randn(3, 9, 1, generator=generator()) @ torch.randn(3, 1, 12, generator=generator(1))
    blocks[0] = 0
    inputs, outputs = features(blocks, 4, generator())
    for vectors in (inputs, outputs):
        assert (vectors.norm(dim=1) > 0).sum(1).tolist() == [0, 1, 1]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_affinity_is_of_subspaces(experts: int, count: int, seed: int) -> None:
    rng = generator(seed)
    vectors = torch.linalg.qr(torch.randn(experts, 12, count, generator=rng)).Q
    turned = vectors @ torch.linalg.qr(torch.randn(experts, count, count, generator=rng)).Q
    found = affinity(vectors * (1 + torch.rand(experts, 1, count, generator=rng)))
    assert found.dtype == torch.float64
    assert_close("affinity", found, affinity(turned), 1e-5)
    assert_close("diagonal", torch.ones(experts), found.diagonal(), 1e-5)
    assert_close("symmetry", found, found.T, 1e-6)
    assert (found > -1e-12).all()
    assert (found < 1 + 1e-5).all()


def test_orthogonal_spans_have_no_affinity() -> None:
    basis = torch.linalg.qr(torch.randn(12, 6, generator=generator())).Q
    assert affinity(torch.stack([basis[:, :3], basis[:, 3:]]))[0, 1] < 1e-12
    assert not affinity(torch.zeros(2, 5, 3)).any()


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_experts_have_cells_of_their_own(experts: int, rows: int, more: int, seed: int) -> None:
    columns = -(-experts // rows) + more
    blocks = torch.randn(experts, 6, 8, generator=generator(seed))
    cells = _placed(blocks, rows, columns, seed)
    _check_cells(cells, experts, rows, columns)
    assert torch.equal(cells, _placed(blocks, rows, columns, seed))
    swapped = improved(cells, rows, columns, *features(blocks, 2, generator(seed)), 2, trials=30)
    _check_cells(swapped, experts, rows, columns)


@given(st.integers(1, 14), st.integers(0, 99))
def test_the_order_of_experts_does_not_matter(experts: int, seed: int) -> None:
    rng = generator(seed)
    rows, columns = (torch.rand(experts, experts, generator=rng) for _ in range(2))
    rows, columns = rows + rows.T, columns + columns.T
    cells, order = place(rows, columns, 4, 4, generator(seed)), torch.randperm(experts, generator=rng)
    permuted = place(rows[order][:, order], columns[order][:, order], 4, 4, generator(seed))
    assert torch.equal(cells[order], permuted)


def test_grids_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="5 experts don't fit into 2 x 2 cells"):
        place(torch.eye(5), torch.eye(5), 2, 2, generator())


@pytest.mark.parametrize(("experts", "rows", "columns"), [(16, 4, 4), (14, 4, 4), (15, 3, 5), (36, 6, 6)])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_planted_cells_are_found(experts: int, rows: int, columns: int, noise: float) -> None:
    for seed in range(2):
        blocks, cells = _planted(experts, rows, columns, seed, noise)
        found = _placed(blocks, rows, columns)
        swapped = improved(found, rows, columns, *features(blocks, _RANK, generator()), _RANK)
        for core in (False, True):
            best, natural = (_error(blocks, c, core) for c in (cells, _natural(experts, columns)))
            assert best < 0.95 * natural
            assert _error(blocks, found, core) <= 1.01 * best
            assert _error(blocks, swapped, core) <= 1.01 * best


@pytest.mark.parametrize("seed", range(3))
def test_planted_cells_are_found_in_any_order(seed: int) -> None:
    blocks, _ = _planted(seed=seed)
    order = torch.randperm(len(blocks), generator=generator(seed))
    assert torch.equal(_placed(blocks, 4, 4)[order], _placed(blocks[order], 4, 4))


@pytest.mark.parametrize("seed", range(3))
def test_swaps_alone_come_near_planted_cells(seed: int) -> None:
    blocks, cells = _planted(seed=seed)
    natural = _natural(16, 4)
    swapped = improved(natural, 4, 4, *features(blocks, _RANK, generator()), _RANK)
    best, before, after = (_error(blocks, c, True) for c in (cells, natural, swapped))
    assert after - best < 0.1 * (before - best)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_swaps_never_capture_less(experts: int, rank: int, seed: int) -> None:
    blocks = torch.randn(experts, 6, 8, generator=generator(seed))
    cells = _natural(9, 3)[torch.randperm(9, generator=generator(seed))[:experts]]
    swapped = improved(cells, 3, 3, *features(blocks, 6, generator(seed)), rank, trials=60)
    assert _captured(blocks, swapped, rank) >= _captured(blocks, cells, rank) * (1 - 1e-5)
    assert torch.equal(swapped, improved(cells, 3, 3, *features(blocks, 6, generator(seed)), rank, trials=60))


def test_experts_that_say_nothing_are_placed() -> None:
    same = torch.randn(1, 6, 8, generator=generator()).expand(7, 6, 8)
    for blocks in (torch.zeros(7, 6, 8), same, torch.cat([torch.zeros(3, 6, 8), same[:4]])):
        cells = _placed(blocks, 3, 3)
        _check_cells(cells, 7, 3, 3)
        _check_cells(improved(cells, 3, 3, *features(blocks, 2, generator()), 2), 7, 3, 3)
