"""Cells of experts in a grid whose rows share input-side factors and whose columns share output-side ones (TileQ).

Experts that read the same directions of the input belong into a row, those that write the same directions of the output
into a column. Directions are compared as subspaces: a singular vector has no sign of its own. Grids with empty cells
are filled up with experts of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLE = 8
# Part of the whole, below which a gain is a rounding error.
_LEAST_GAIN = 1e-6
_ROUNDS = 3


def grid_of(experts: int, in_features: int, out_features: int) -> tuple[int, int]:
    """Rows and columns that hold all experts with the fewest numbers in factors, rows * in + columns * out.

    Of equal costs, the grid with the fewest empty cells is taken, and then the one nearest to a square.
    """

    def cost(grid: tuple[int, int]) -> tuple[int, int, int]:
        rows, columns = grid
        return rows * in_features + columns * out_features, rows * columns, abs(rows - columns)

    return min(((rows, -(-experts // rows)) for rows in range(1, experts + 1)), key=cost)


def features(blocks: Tensor, rank: int, generator: torch.Generator, iterations: int = 2) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of each of the blocks (E, out, in) times their singular values, by subspace iteration.

    All blocks start from the same random numbers, so that their order doesn't matter.

    Returns:
        Vectors on the input side (E, in, s) and on the output side (E, out, s), s = min(rank, in, out). Those past the
        rank of a block are zero.
    """
    out, width = blocks.shape[1:]
    count = min(rank, out, width)
    start = torch.randn(
        width, min(rank + _OVERSAMPLE, out, width), generator=generator, dtype=blocks.dtype, device="cpu"
    )
    basis = blocks @ start.to(blocks.device)
    for _ in range(iterations):
        basis = blocks @ (blocks.mT @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    u, values, vh = torch.linalg.svd(basis.mT @ blocks, full_matrices=False)
    alive = values > 10 * torch.finfo(values.dtype).eps * values[:, :1]
    values = torch.where(alive, values, 0.0)[:, None, :count]
    return vh.mT[..., :count] * values, (basis @ u)[..., :count] * values


def affinity(vectors: Tensor) -> Tensor:
    """Overlap of the spans of orthogonal vectors (E, n, s), fp64 (E, E): ||U_iᵀ U_j||² / s of the unit vectors U.

    It is 1 for equal spans of dimension s and 0 for orthogonal ones.
    """
    length = vectors.norm(dim=1, keepdim=True)
    squares = _gram(vectors / torch.where(length > 0, length, 1.0)).to(torch.float64).square()
    experts, count = len(vectors), vectors.shape[2]
    return squares.view(experts, count, experts, count).sum((1, 3)) / count


def place(
    row_affinity: Tensor,
    column_affinity: Tensor,
    rows: int,
    columns: int,
    generator: torch.Generator,
    restarts: int = 4,
) -> Tensor:
    """Cells int64 (E, 2) that maximise the affinity within rows and within columns of the grid.

    From each of a few random orders the best swap of two cells is made until none helps: first for rows alone or for
    columns alone, then for both. The result doesn't depend on the order of the experts, but for ties.

    Args:
        row_affinity: of the experts' inputs (E, E), see `affinity`.
        column_affinity: of their outputs (E, E).
        rows, columns: of the grid, with at least E cells.
        generator: of the random orders.
        restarts: number of them.

    Raises:
        ValueError: the grid has fewer cells.
    """
    size, cells = len(row_affinity), rows * columns
    if size > cells:
        raise ValueError(f"{size} experts don't fit into {rows} x {columns} cells")
    sides = [side.to("cpu", torch.float64) for side in (row_affinity, column_affinity)]
    # Sums of sorted numbers are the same in any order of the experts.
    key = sides[0].sort(1).values.square().sum(1) + sides[1].sort(1).values.sum(1)
    canonical = key.argsort(stable=True)
    sides = [_padded(_centred(side[canonical][:, canonical]), cells) for side in sides]
    best, found = -torch.inf, torch.arange(cells, dtype=torch.int64, device="cpu")
    for restart in range(restarts):
        alone = [side * (index == restart % 2) for index, side in enumerate(sides)]
        order = _climbed(torch.randperm(cells, generator=generator, dtype=torch.int64, device="cpu"), alone, columns)[0]
        order, value = _climbed(order, sides, columns)
        if value > best + _LEAST_GAIN * abs(value):
            best, found = value, order
    return _cells(
        torch.cat([canonical, torch.arange(size, cells, dtype=torch.int64, device="cpu")])[found], size, columns
    )


def improved(
    cells: Tensor, rows: int, columns: int, inputs: Tensor, outputs: Tensor, rank: int, trials: int = 300
) -> Tensor:
    """Swap cells (E, 2) while the best factors of the rows and columns then capture more.

    The best rank-r factor of a row by itself captures the r largest eigenvalues of the sum of its experts' Grams
    B_eᵀ B_e, that of a column those of B_e B_eᵀ. What all rows and columns capture in this way predicts what tiles with
    cores capture together. With the factors as they are, a swap gains at least what the two experts gain by them: swaps
    are tried in that order.

    Args:
        cells: int64 (E, 2).
        rows, columns: of the grid.
        inputs, outputs: (E, in, s) and (E, out, s), what `features` returns.
        rank: of the factors.
        trials: swaps that are tried, each at the cost of four eigenvalue problems of the size of a row or a column
            times s.
    """
    size, count, slots = len(cells), rows * columns, cells.cpu()
    order = torch.full((count,), -1, dtype=torch.int64, device="cpu")
    order[slots[:, 0] * columns + slots[:, 1]] = torch.arange(size, dtype=torch.int64, device="cpu")
    order[order < 0] = torch.arange(size, count, dtype=torch.int64, device="cpu")
    sides = [
        _Side(vectors, groups, order, rank)
        for vectors, groups in zip((inputs, outputs), _groups(count, columns), strict=True)
    ]
    for _ in range(_ROUNDS):
        before = order
        for pair in _promising(order, sides)[: trials // _ROUNDS].tolist():
            order = _tried(order, pair, sides)
        if order is before:
            break
    return _cells(order, size, columns).to(cells.device)


class _Side:
    """What the best factors of the rows, or of the columns, capture.

    Args:
        vectors: of one side of the experts (E, n, s).
        groups: int64 (cells,) row, or column, of each cell.
        order: int64 (cells,) expert in each cell, some of zeros.
        rank: of a factor.
    """

    def __init__(self, vectors: Tensor, groups: Tensor, order: Tensor, rank: int) -> None:
        self.groups, self.rank, self.vectors = groups, rank, vectors.shape[2]
        self.gram = _padded(_gram(vectors).cpu(), len(order) * self.vectors)
        self.members = torch.stack([(groups == group).nonzero().squeeze(1) for group in groups.unique()])
        self.captured = self._leading(order[self.members])

    def proposal(self, order: Tensor, pair: list[int]) -> Tensor:
        """Energy that each group captures (g,) in another order, in which only this pair of cells differs."""
        touched, captured = self.groups[pair].unique(), self.captured
        if len(touched) > 1:
            captured = captured.clone()
            captured[touched] = self._leading(order[self.members[touched]])
        return captured

    def by_cell(self, order: Tensor) -> Tensor:
        """Energy of the expert in each cell that the factor of each cell's group captures, (cells, cells)."""
        index = self._index(order[self.members])
        squares, vectors = torch.linalg.eigh(self._grams(index))
        squares, vectors = squares[:, -self.rank :], vectors[..., -self.rank :]
        alive = squares > 1e-6 * squares[:, -1:]
        vectors = vectors * torch.where(alive, squares, torch.inf).rsqrt().unsqueeze(1)
        energy = (self.gram[:, index].movedim(1, 0) @ vectors).square().sum(2)
        return energy.unflatten(1, (-1, self.vectors)).sum(2).T[order][:, self.groups]

    def _leading(self, experts: Tensor) -> Tensor:
        """Sum of the largest eigenvalues of each row of experts (g, members), (g,)."""
        return torch.linalg.eigvalsh(self._grams(self._index(experts)))[:, -self.rank :].sum(1)

    def _index(self, experts: Tensor) -> Tensor:
        """Where the vectors of each row of experts (g, members) lie in the Gram, (g, members * s)."""
        return (
            experts.unsqueeze(2) * self.vectors + torch.arange(self.vectors, dtype=experts.dtype, device=experts.device)
        ).flatten(1)

    def _grams(self, index: Tensor) -> Tensor:
        return self.gram[index.unsqueeze(2), index.unsqueeze(1)]


def _promising(order: Tensor, sides: list[_Side]) -> Tensor:
    """Pairs of cells (pairs, 2), by falling least gain of their swap."""
    first, second = torch.triu_indices(len(order), len(order), 1)
    captured = torch.stack([side.by_cell(order) for side in sides]).sum(0)
    own = captured.diagonal()
    gain = captured[first, second] + captured[second, first] - own[first] - own[second]
    return torch.stack([first, second], 1)[gain.argsort(descending=True, stable=True)]


def _tried(order: Tensor, pair: list[int], sides: list[_Side]) -> Tensor:
    """Return the order with the pair of cells swapped, and tell the sides, if more is captured then."""
    swapped = order.clone()
    swapped[pair] = order[pair[::-1]]
    proposals = [side.proposal(swapped, pair) for side in sides]
    before = sum(side.captured.sum().item() for side in sides)
    if sum(proposal.sum().item() for proposal in proposals) <= before * (1 + _LEAST_GAIN):
        return order
    for side, proposal in zip(sides, proposals, strict=True):
        side.captured = proposal
    return swapped


def _climbed(order: Tensor, affinities: list[Tensor], columns: int) -> tuple[Tensor, float]:
    """Make the best swap of two cells while it raises the affinity within rows and columns; return both."""
    same = [groups.unsqueeze(1) == groups for groups in _groups(len(order), columns)]
    while True:
        sides = [side[order][:, order] for side in affinities]
        value = sum((side * mask).sum().item() for side, mask in zip(sides, same, strict=True))
        gain = torch.stack([_gains(side, mask) for side, mask in zip(sides, same, strict=True)]).sum(0)
        pair = list(divmod(int(gain.argmax()), len(order)))
        if gain[pair[0], pair[1]] <= _LEAST_GAIN * abs(value):
            return order, value
        order = order.clone()
        order[pair] = order[pair[::-1]]


def _gains(affinity: Tensor, same: Tensor) -> Tensor:
    """What the swap of each two cells adds to the affinity (cells, cells) within groups of cells."""
    others = affinity @ same.to(affinity.dtype) - affinity
    own = others.diagonal()
    return (others + others.T - own - own.unsqueeze(1)).masked_fill(same, 0.0)


def _groups(cells: int, columns: int) -> list[Tensor]:
    """Row and column of each cell, int64 (cells,) both."""
    index = torch.arange(cells, dtype=torch.int64, device="cpu")
    return [index // columns, index % columns]


def _cells(order: Tensor, experts: int, columns: int) -> Tensor:
    """Cells int64 (E, 2) of the first `experts` experts of an order (cells,)."""
    return torch.stack(_groups(len(order), columns), 1)[order.argsort()[:experts]]


def _gram(vectors: Tensor) -> Tensor:
    """Products of all vectors of all experts (E, n, s): (E * s, E * s)."""
    flat = vectors.mT.flatten(0, 1)
    return flat @ flat.T


def _centred(affinity: Tensor) -> Tensor:
    """Affinity (E, E) less the mean of two experts, so that an empty cell is as good as an average one."""
    experts = len(affinity)
    mean = (affinity.sum() - affinity.trace()) / max(experts * (experts - 1), 1)
    return affinity - mean


def _padded(matrix: Tensor, size: int) -> Tensor:
    """The matrix with rows and columns of zeros up to `size`."""
    more = size - len(matrix)
    return torch.nn.functional.pad(matrix, (0, more, 0, more))
