"""The vector codebooks of LoPRo_v (arXiv 2601.19675, after GPTVQ, 2402.15319), rounded to but not packed: to measure.

Blocks of 256 columns and some rows have a codebook of their own: at 2 bits 256 vectors of 4 columns for 256 rows, at 3
bits 64 vectors of 2 columns for 128 rows, by 10 iterations of k-means on the weights with the feedback that they have
when the block begins. Codebook entries take 8 bits. Rows are in units of their own, powers of two, which the paper has
not: a byte a row that is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.formats.quantizer import Quantizer, Rounded, Rounder

_COLUMNS, _ITERATIONS = 256, 10
# By bits: columns of a vector, vectors of a codebook, rows that share it.
_SHAPES = {2: (4, 256, 256), 3: (2, 64, 128)}


@dataclass(frozen=True)
class DenseRounded(Rounded):
    values: Tensor

    def dense(self) -> Tensor:
        return self.values

    def times(self, units: Tensor) -> Rounded:
        return replace(self, values=self.values * units)


@dataclass(frozen=True, kw_only=True)
class VectorQuantizer(Quantizer):
    bits: int = 2

    def order(self, gram: Tensor, static: bool = False) -> Tensor:  # noqa: ARG002
        return torch.arange(len(gram), device=gram.device)

    def rounder(self, weight: Tensor, *_: Any) -> Rounder:
        return VectorRounder(weight, self.bits)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Codes and codebooks of a weight, by its true numbers of rows and columns."""
        _, vectors, rows = _SHAPES[self.bits]
        width = _SHAPES[self.bits][0]
        books = -(-shape[0] // rows) * -(-shape[1] // _COLUMNS)
        return self.bits + 8 * books * vectors * width / (shape[0] * shape[1])


class VectorRounder(Rounder):
    def __init__(self, weight: Tensor, bits: int) -> None:
        self._values = torch.empty_like(weight)
        self._width, self._vectors, self._rows = _SHAPES[bits]
        self.cuts = [*range(0, weight.shape[1], _COLUMNS), weight.shape[1]]

    def round(self, part: slice, columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor) -> Tensor:  # noqa: ARG002
        error, width = torch.empty_like(columns), self._width
        books = [_codebook(rows.T.reshape(-1, width), self._vectors) for rows in target.split(self._rows, 1)]
        for first in range(0, len(columns), width):
            own = slice(first, first + width)
            found = [book[torch.cdist(rows.T, book).argmin(1)].T
                     for book, rows in zip(books, target[own].split(self._rows, 1), strict=True)]  # fmt: skip
            error[own] = columns[own] - torch.cat(found, 1)
            target[own.stop :] += upper[own, own.stop :].T @ error[own]
        self._values[:, part] = (columns - error).T
        return error

    def rounded(self) -> DenseRounded:
        return DenseRounded(self._values)


def _codebook(points: Tensor, count: int) -> Tensor:
    """k-means from the points at even distances along Mahalanobis' order, then 8 bits an entry."""
    centred = points - points.mean(0)
    covariance = centred.T @ centred / len(points)
    distance = (torch.linalg.solve(covariance, centred.T).T * centred).sum(1)
    book = points[distance.argsort()[torch.linspace(0, len(points) - 1, count).round().long()]]
    for _ in range(_ITERATIONS):
        nearest = torch.cdist(points, book).argmin(1)
        sums = torch.zeros_like(book).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=count).unsqueeze(1)
        book = torch.where(counts > 0, sums / counts.clamp_min(1), book)
    scale = book.abs().amax() / 127
    return (book / scale).round() * scale
