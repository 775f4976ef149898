"""Factors that the experts of a layer share, in tiles of a grid (TileQ, 2605.09281).

Expert e in cell (m, n) is approximated by up[n] @ down[m], or up[n] @ core[e] @ down[m]. All of its row read the down
factor, and all of its column the up factor. Blocks B_e (out, in) are weights W_e L with L Lᵀ the Gram of the inputs,
so that the squared error of a block is the loss tr(E L Lᵀ Eᵀ) of its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lopro_fx.layer import Factor
from lopro_fx.methods.lowrank import round_factor
from lopro_fx.methods.units import stored_factor_scale

_OVERSAMPLE = 8
# Part of what the factors capture; a sweep that adds less is the last.
_LEAST_GAIN = 1e-4
# Part of the largest eigenvalue, below which products of fp32 numbers say nothing of a direction.
_RANK_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Tiles:
    """Shared factors of E experts.

    Args:
        down: fp32 (rows, rank, in), a factor for each row of the grid.
        up: fp32 (columns, out, rank), a factor for each column.
        cells: int64 (E, 2), row and column of each expert; no two are equal.
        core: fp32 (E, rank, rank), or None for the identity.
    """

    down: Tensor
    up: Tensor
    cells: Tensor
    core: Tensor | None = None

    def dense(self, expert: int) -> Tensor:
        """Multiply the factors of an expert to (out, in)."""
        row, column = self.cells[expert].tolist()
        up = self.up[column] if self.core is None else self.up[column] @ self.core[expert]
        return up @ self.down[row]

    @property
    def downs(self) -> Tensor:
        """Down factor of each expert (E, rank, in)."""
        return self.down[self.cells[:, 0]]

    @property
    def ups(self) -> Tensor:
        """Up factor of each expert (E, out, rank)."""
        return self.up[self.cells[:, 1]]


@dataclass(frozen=True)
class StoredTiles:
    """Tiles as the operators of experts take them.

    Args:
        down: int8 (rows * rank, in), with a scale for each row.
        up: int8 (columns, out, rank), with scales (columns, rank).
        cells: int32 (E, 2).
        core: fp16 (E, rank, rank), or int8 with scales (E, rank); None for the identity.
    """

    down: Factor
    up: Factor
    cells: Tensor
    core: Factor | None

    def tiles(self) -> Tiles:
        """Return the fp32 values that are stored."""
        down = self.down.dense().unflatten(0, (-1, self.up.rank))
        core = None if self.core is None else self.core.dense()
        return Tiles(down, self.up.dense(), self.cells.long(), core)


def residuals(tiles: Tiles, blocks: Tensor) -> Tensor:
    """Squared error of each of the blocks (E, out, in), fp64 (E,)."""
    errors = [(block - tiles.dense(expert)).square().sum() for expert, block in enumerate(blocks)]
    return torch.stack(errors).to(torch.float64)


def tiled(
    blocks: Tensor,
    cells: Tensor,
    rank: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    iterations: int = 4,
    sweeps: int = 20,
) -> Tiles:
    """Tiles without cores that minimise the weighted squared error of the blocks.

    With every cell taken and equal weights, they are the truncated SVD of the matrix of all blocks. Otherwise they are
    fitted by alternating least squares, from the SVD of the weighted blocks with zeros in empty cells.

    Args:
        blocks: fp32 (E, out, in).
        cells: int64 (E, 2).
        rank: of a factor; components past the rank of the matrix are zero.
        weights: (E,) of the experts' errors, at least 0; None for equal ones. They are relative to the largest.
        iterations: of subspace iteration for the SVD.
        sweeps: of alternating least squares, at most.

    Returns:
        Tiles whose up and down components are of equal length over the whole grid, ordered by falling length.
    """
    share = _share(weights, blocks)
    start = _truncated(blocks, cells, share, rank, generator, iterations)
    if len(cells) == len(start.down) * len(start.up) and (share == share[0]).all():
        return start
    tiles = found = start
    captured = 0.0
    for _ in range(sweeps):
        tiles = replace(tiles, down=_fit_down(blocks, tiles.ups, cells, share))
        up, gained = _fit_up(blocks, tiles.downs, cells, share)
        tiles = replace(tiles, up=up)
        if gained <= captured * (1 + _LEAST_GAIN):
            break
        found, captured = tiles, gained
    up, down = _balanced(found.up, found.down, rank)
    return _better(start, Tiles(down, up, cells), blocks, share)


def tiled_with_core(
    blocks: Tensor,
    cells: Tensor,
    rank: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    iterations: int = 4,
    sweeps: int = 6,
) -> Tiles:
    """Tiles with cores that minimise the weighted squared error of the blocks, by higher-order orthogonal iteration.

    It starts from the best factors of each row and each column by itself, or from the spans of those of `tiled`, whose
    product a core can stand for: whichever captures more. No sweep captures less, so the error is at most that of
    `tiled`. Arguments are those of `tiled`; `sweeps` are of the orthogonal iteration.

    Returns:
        Tiles whose down factors have orthonormal rows, and up factors orthonormal columns.
    """
    share = _share(weights, blocks)
    root = share.sqrt()
    shared = tiled(blocks, cells, rank, generator, weights, iterations)
    down = _leading_of_rows(blocks, cells, share, rank, generator)
    up = _leading_of_rows(blocks.mT, cells.flip(1), share, rank, generator).mT
    starts = [(_spanned(shared.down), _spanned(shared.up.mT).mT), (down, up)]
    tiles = max((_cored(blocks, cells, *start) for start in starts), key=lambda start: _captured(start, root))
    captured = 0.0
    for _ in range(sweeps):
        reduced = _grid((blocks @ tiles.downs.mT).mT * root, cells).transpose(0, 1)
        tiles = replace(tiles, up=_leading(reduced.flatten(1, 2), rank).mT)
        reduced = tiles.ups.mT @ blocks
        tiles = replace(tiles, down=_leading(_grid(reduced * root, cells).flatten(1, 2), rank))
        tiles = replace(tiles, core=reduced @ tiles.downs.mT)
        gained = _captured(tiles, root)
        if gained <= captured * (1 + _LEAST_GAIN):
            break
        captured = gained
    return tiles


def whitened(tiles: Tiles, factor: Tensor) -> Tiles:
    """Multiply the down factors by L on the input side: tiles of the weights become tiles of the blocks.

    `factor` is a lower triangular L (in, in), one a row of the grid (rows, in, in), or the diagonal (in,) of one.
    """
    return replace(tiles, down=tiles.down * factor if factor.ndim == 1 else tiles.down @ factor)


def unwhitened(tiles: Tiles, factor: Tensor) -> Tiles:
    """Divide the down factors by L, the inverse of `whitened`. With cores, down components are of length 1 again."""
    if factor.ndim == 1:
        down = tiles.down / factor
    else:
        down = torch.linalg.solve_triangular(factor, tiles.down, upper=False, left=False)
    if tiles.core is None:
        return replace(tiles, down=down)
    length = down.norm(dim=2, keepdim=True)
    core = tiles.core * length.mT[tiles.cells[:, 0]]
    return replace(tiles, down=down / torch.where(length > 0, length, 1.0), core=core)


def stored(
    tiles: Tiles, blocks: Tensor, factor: Tensor, weights: Tensor | None = None, core_bits: int = 16
) -> StoredTiles:
    """Round tiles of the weights: down, then up, then the cores, each fitted to the blocks after those before.

    Args:
        tiles: of the weights, not of the blocks.
        blocks: fp32 (E, out, in).
        factor: the L of the blocks, see `whitened`.
        weights: (E,), as in `tiled`.
        core_bits: 16 for fp16, or 8 for int8.
    """
    share, cells = _share(weights, blocks), tiles.cells
    down = _rounded(tiles.down.mT, 8)
    moved = whitened(replace(tiles, down=down.dense().mT), factor)
    right = moved.downs if moved.core is None else moved.core @ moved.downs
    up = _rounded(_fit_up(blocks, right, cells, share)[0], 8)
    core = None
    if moved.core is not None:
        core = _rounded(_fit_core(blocks, replace(moved, up=up.dense())), core_bits)
    scale = None if down.scale is None else down.scale.flatten()
    return StoredTiles(Factor(down.values.mT.flatten(0, 1), scale, 0), up, cells.to(torch.int32), core)


def extra_bits(tiles: StoredTiles) -> float:
    """Bits a weight of all tensors that the tiles store."""
    factors = [tiles.down, tiles.up] if tiles.core is None else [tiles.down, tiles.up, tiles.core]
    tensors = [tiles.cells, *(part for factor in factors for part in (factor.values, factor.scale) if part is not None)]
    weights = len(tiles.cells) * tiles.down.values.shape[1] * tiles.up.values.shape[1]
    return 8 * sum(tensor.nbytes for tensor in tensors) / weights


def _share(weights: Tensor | None, blocks: Tensor) -> Tensor:
    """Weights (E, 1, 1) of the errors, the largest of them 1; zeros where all are 0."""
    if weights is None:
        return blocks.new_ones(len(blocks), 1, 1)
    weights = weights.to(blocks)
    return (weights / weights.max().clamp_min(torch.finfo(blocks.dtype).tiny)).view(-1, 1, 1)


def _grid(values: Tensor, cells: Tensor) -> Tensor:
    """Put values (E, ...) into a grid (rows, columns, ...), with zeros in empty cells."""
    rows, columns = (cells.amax(0) + 1).tolist()
    grid = values.new_zeros(rows, columns, *values.shape[1:])
    grid[cells[:, 0], cells[:, 1]] = values
    return grid


def _truncated(
    blocks: Tensor, cells: Tensor, share: Tensor, rank: int, generator: torch.Generator, iterations: int
) -> Tiles:
    """Truncated SVD of the matrix of all blocks times their share, by subspace iteration (Halko et al. 0909.4061)."""
    rows, columns = (cells.amax(0) + 1).tolist()
    out, width = blocks.shape[1:]
    count = min(rank + _OVERSAMPLE, rows * width, columns * out)
    down = torch.randn(rows, count, width, generator=generator, dtype=blocks.dtype, device="cpu").to(blocks.device)
    up = blocks.new_empty(columns, out, count)
    for _ in range(iterations + 1):
        product = _grid((blocks @ down[cells[:, 0]].mT) * share, cells).sum(0)
        up = torch.linalg.qr(product.flatten(0, 1)).Q.view_as(up)
        down = _grid((up[cells[:, 1]].mT @ blocks) * share, cells).sum(1)
    up, down = _balanced(up, down, rank)
    return Tiles(down, up, cells)


def _balanced(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best `rank` components of the products up[n] @ down[m], both factors times the roots of the singular values."""
    left, left_root = torch.linalg.qr(up.flatten(0, 1))
    right, right_root = torch.linalg.qr(down.mT.flatten(0, 1))
    u, values, vh = torch.linalg.svd(left_root @ right_root.T, full_matrices=False)
    root = torch.where(values > torch.finfo(values.dtype).eps * values[:1], values, 0.0).sqrt()
    left, right = (_padded(side * root, rank) for side in (left @ u, right @ vh.T))
    return left.unflatten(0, up.shape[:2]), right.unflatten(0, (down.shape[0], down.shape[2])).mT


def _padded(factor: Tensor, rank: int) -> Tensor:
    """The first `rank` columns of a factor (..., n, k), with zeros past the last."""
    return torch.nn.functional.pad(factor[..., :rank], (0, max(rank - factor.shape[-1], 0)))


def _fit_up(blocks: Tensor, right: Tensor, cells: Tensor, share: Tensor) -> tuple[Tensor, float]:
    """Up factors (columns, out, rank) for what each expert multiplies them by, `right` (E, rank, in).

    Returns:
        The factors, and the weighted energy of the blocks that they capture.
    """
    product = _grid((blocks @ right.mT) * share, cells).sum(0)
    up = product @ _inverse(_grid(_gram(right.mT) * share, cells).sum(0))
    return up, (product * up).sum().item()


def _fit_down(blocks: Tensor, left: Tensor, cells: Tensor, share: Tensor) -> Tensor:
    """Down factors (rows, rank, in) for what multiplies them in each expert, `left` (E, out, rank)."""
    product = _grid((left.mT @ blocks) * share, cells).sum(1)
    return _inverse(_grid(_gram(left) * share, cells).sum(1)) @ product


def _fit_core(blocks: Tensor, tiles: Tiles) -> Tensor:
    """Cores (E, rank, rank) of given up and down factors."""
    product = tiles.ups.mT @ blocks @ tiles.downs.mT
    left, right = _inverse(_gram(tiles.up)), _inverse(_gram(tiles.down.mT))
    return left[tiles.cells[:, 1]] @ product @ right[tiles.cells[:, 0]]


def _gram(factor: Tensor) -> Tensor:
    """Products of the components of factors (..., n, rank), fp64 (..., rank, rank)."""
    wide = factor.to(torch.float64)
    return wide.mT @ wide


def _inverse(gram: Tensor) -> Tensor:
    """Inverse fp32 of Gram matrices fp64 (..., rank, rank), zero in directions that they hold nothing of."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > _RANK_TOLERANCE**2 * diagonal.amax(-1, keepdim=True)
    unit = torch.where(alive, diagonal, torch.inf).rsqrt()
    unit = unit.unsqueeze(-1) * unit.unsqueeze(-2)
    return (unit * torch.linalg.pinv(gram * unit, rtol=_RANK_TOLERANCE, hermitian=True)).to(torch.float32)


def _leading_of_rows(
    blocks: Tensor, cells: Tensor, share: Tensor, rank: int, generator: torch.Generator, iterations: int = 2
) -> Tensor:
    """Best down factor of each row of the grid by itself (rows, rank, in), orthonormal; zeros where rank > in.

    They are eigenvectors of the sum of the Grams B_eᵀ B_e of the row, by subspace iteration.
    """
    own, width = cells[:, 0], blocks.shape[2]
    drawn = torch.randn(width, min(rank + _OVERSAMPLE, width), generator=generator, dtype=blocks.dtype, device="cpu")
    basis = drawn.to(blocks.device).expand(int(own.max()) + 1, -1, -1)
    for _ in range(iterations + 1):
        basis = torch.linalg.qr(_grid((blocks.mT @ (blocks @ basis[own])) * share, cells).sum(1)).Q
    moved = blocks @ basis[own]
    vectors = torch.linalg.eigh(_grid((moved.mT @ moved) * share, cells).sum(1)).eigenvectors.flip(-1)
    return _padded(basis @ vectors, rank).mT


def _cored(blocks: Tensor, cells: Tensor, down: Tensor, up: Tensor) -> Tiles:
    """Tiles of orthonormal factors, with the best cores for them."""
    return Tiles(down, up, cells, up[cells[:, 1]].mT @ blocks @ down[cells[:, 0]].mT)


def _captured(tiles: Tiles, root: Tensor) -> float:
    """Weighted energy of the blocks that orthonormal factors with the best cores capture; `root` of the weights."""
    return 0.0 if tiles.core is None else (tiles.core * root).square().sum().item()


def _spanned(rows: Tensor) -> Tensor:
    """Orthonormal rows (g, rank, n) whose span holds the given ones; zeros where rank > n."""
    return _padded(torch.linalg.qr(rows.mT).Q, rows.shape[1]).mT


def _leading(stacks: Tensor, rank: int) -> Tensor:
    """Leading right singular vectors (g, rank, n) of the stacks (g, k, n), orthonormal; zeros where rank > n."""
    if stacks.shape[1] >= stacks.shape[2]:
        vectors = torch.linalg.eigh(stacks.mT @ stacks).eigenvectors.flip(-1)
    else:
        left = torch.linalg.eigh(stacks @ stacks.mT).eigenvectors.flip(-1)
        vectors = torch.linalg.qr(stacks.mT @ left[..., :rank]).Q
    return _padded(vectors, rank).mT


def _better(first: Tiles, second: Tiles, blocks: Tensor, share: Tensor) -> Tiles:
    """The tiles of the smaller weighted error; of two equal ones the first."""
    errors = [(residuals(tiles, blocks) * share.view(-1)).sum() for tiles in (first, second)]
    return first if errors[0] <= errors[1] else second


def _rounded(factor: Tensor, bits: int) -> Factor:
    """Round factors (g, n, rank), each component for itself, with scales (g, rank) as they are stored."""
    rounded = round_factor(factor.mT.flatten(0, 1), bits, 0)
    values = rounded.values.view(factor.mT.shape).mT.contiguous()
    scale = None if rounded.scale is None else stored_factor_scale(rounded.scale).view(len(factor), -1)
    return Factor(values, scale, -1)
