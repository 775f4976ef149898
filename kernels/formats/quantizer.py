"""Interface between solvers and a format that they round to.

A solver knows the Gram and the order of columns; the format's quantizer knows the values that a weight may take.
Columns come in blocks: the solver adds what the blocks before leave behind, and the rounder rounds one block with the
feedback inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from lopro_fx.kernels.formats.packed import Packed


class Rounded:
    """Matrix (m, n) rounded to a format, before it is packed."""

    def dense(self) -> Tensor:
        """Dequantise to fp32 (m, n)."""
        raise NotImplementedError

    def times(self, units: Tensor) -> Rounded:
        """Multiply the rows by `units` (m, 1), powers of two."""
        raise NotImplementedError

    def split(self, rows: Sequence[int]) -> Sequence[Rounded]:
        """Split into the layers' parts, of these numbers of rows."""
        raise NotImplementedError

    def packed(self) -> Packed:
        """Pack the matrix."""
        raise NotImplementedError


class Rounder:
    """Rounding of one matrix, block by block in rounding order.

    `cuts` are the first columns of the blocks in rounding order, and the number of columns at the end.
    """

    cuts: Sequence[int]

    def round(self, part: slice, columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor) -> Tensor:
        """Round the columns `part`, a block between two cuts.

        Args:
            part: their places in rounding order.
            columns: fp32 (width, m), transposed weights.
            target: fp32 (width, m), the same with the feedback of all blocks before; it may be overwritten.
            upper: fp32 (width, width) unit upper triangular: feedback inside the block.
            pivots: fp32 (width,), weights of the squared rounding errors.

        Returns:
            fp32 (width, m): `columns` less their rounded values.
        """
        raise NotImplementedError

    def rounded(self) -> Rounded:
        """The matrix in storage order, when all blocks are rounded."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Settings of a rounding to one format; a subclass's fields are the settings that methods pass on.

    `allowed` holds the values of each setting that users choose.
    """

    allowed: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @property
    def most_bits(self) -> float:
        """Upper bound of the bits per weight, all tensors counted."""
        raise NotImplementedError

    def order(self, gram: Tensor, static: bool = False) -> Tensor:
        """Rounding order that needs no permutation at run time, int64 (n,); `static` as in `rounder`."""
        raise NotImplementedError

    def rounder(
        self,
        weight: Tensor,
        rows: Sequence[int],
        order: Tensor | None,
        pivots: Tensor,
        importance: Tensor | None,
        static: bool,
    ) -> Rounder:
        """Begin to round `weight` fp32 (m, n), the layers of `rows` rows each under one another.

        Args:
            weight: rows in units of their own.
            rows: of each layer; they sum to m.
            order: int64 (n,), columns in rounding order; None is storage order.
            pivots: fp32 (n,) in rounding order.
            importance: fp32 (m,), weights of the rows' squared errors; None for equal ones.
            static: whether parameters of the values (such as grids) are fitted to the whole matrix at first, so that
                `order` may be any.
        """
        raise NotImplementedError

    def nearest(self, weight: Tensor, rows: Sequence[int]) -> Rounded:
        """Round `weight` to nearest; arguments as in `rounder`."""
        raise NotImplementedError

    def join(self, parts: Sequence[Rounded]) -> Rounded:
        """Put rounded parts of one layer under one another."""
        raise NotImplementedError

    def refine(self, weight: Tensor, gram: Tensor, rounded: Rounded, sweeps: int) -> Rounded:  # noqa: ARG002
        """Lower tr(E H Eᵀ), E = weight - rounded, in `sweeps` passes over the columns, with `gram` the damped H."""
        return rounded


def blocks(rounder: Rounder) -> list[slice]:
    """The rounder's blocks of columns, in rounding order."""
    return [slice(start, end) for start, end in pairwise(rounder.cuts)]
