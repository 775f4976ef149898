"""R1-FLR: components leave a matrix while they make it smaller by more bits than they cost (FLRQ, algorithm 1).

A quantiser's step is proportional to the range of what it rounds. A range, or a root of the loss, that is half as large
is worth a bit a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stopping:
    """Rules of the rank (FLRQ equation 9). Bits are per weight.

    Args:
        price: bits of one component.
        budget: most bits of all components, the paper's x d.
        least_gain: bits that components must gain for each that they cost.
        window: components that must gain `slope` bits together; where they don't, half of them are taken back. 0 asks
            for none.
        slope: bits; None takes `least_gain` of what the window costs.
    """

    price: float
    budget: float
    least_gain: float = 1.0
    window: int = 0
    slope: float | None = None

    def rank(self, sizes: Sequence[float]) -> int | None:
        """Return the rank to keep, or None if one more component may pay.

        `sizes` are those of the remainder after 0, 1, ... components.
        """
        rank, window, needed = len(sizes) - 1, self.window, self.least_gain * self.price
        if not rank:
            return None if sizes[0] > 0 and self.price <= self.budget else 0
        if needed * rank > _bits(sizes[0], sizes[rank]):
            return rank - 1
        slope = needed * window if self.slope is None else self.slope
        if window and rank >= window and _bits(sizes[rank - window], sizes[rank]) < slope:
            return rank - window // 2
        return rank if self.price * (rank + 1) > self.budget else None


def flexible_rank(
    size: float, components: Iterable[tuple[Tensor, Tensor, float]], stopping: Stopping
) -> tuple[list[Tensor], list[Tensor]]:
    """Take components u (m,), v (n,) off a matrix of this size until a rule stops; each brings the size that it leaves.

    Returns:
        The components that are kept, u and v; there may be none.
    """
    sizes, left, right, source = [size], [], [], iter(components)
    while (rank := stopping.rank(sizes)) is None:
        found = next(source, None)
        if found is None:
            rank = len(left)
            break
        left.append(found[0])
        right.append(found[1])
        sizes.append(found[2])
    return left[:rank], right[:rank]


def sized(
    matrix: Tensor, components: Iterable[tuple[Tensor, Tensor]], size: Callable[[Tensor], float]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Add to each component the size of the remainder of `matrix` (m, n) after it."""
    remainder = matrix.clone()
    for u, v in components:
        yield u, v, size(remainder.addr_(u, v, alpha=-1))


def sized_by_loss(
    matrix: Tensor, hessian: Tensor, loss: float, components: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Add to each component the root of the remainder's loss tr(R H Rᵀ), which is `loss` for the matrix (m, n) itself.

    Each takes a product with a vector, where a product R H would take n times as much.
    """
    remainder = matrix.clone()
    for u, v in components:
        moved = hessian @ v
        loss += (u @ (u * (v @ moved) - 2 * (remainder @ moved))).item()
        remainder.addr_(u, v, alpha=-1)
        yield u, v, math.sqrt(max(loss, 0.0))


def range_rms(matrix: Tensor, group_size: int | None) -> float:
    """Root mean square, over rows and column groups, of the range that a quantiser's grid covers: from the least weight
    or 0 to the largest or 0. -1 takes whole rows; None returns the root mean square of the weights."""
    if group_size is None:
        return matrix.square().mean().sqrt().item()
    parts = matrix.split(matrix.shape[1] if group_size == -1 else group_size, 1)
    ranges = torch.stack([part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0) for part in parts])
    return ranges.square().mean().sqrt().item()


def _bits(before: float, after: float) -> float:
    return math.log2(before / after) if after > 0 else math.inf
