"""R1-FLR: components leave a weight while they narrow its range by more bits than they cost (FLRQ, algorithm 1).

A quantiser of d bits has a step of its range over 2^d. A range that is half as wide is worth a bit a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stopping:
    """Rules of the rank. Bits are per weight.

    Args:
        price: bits of one component.
        budget: most bits of all components, the paper's x d.
        window: components over which the range must fall by the part `drop`; 0 asks for none.
        drop: see `window`.
    """

    price: float
    budget: float
    window: int = 0
    drop: float = 0.0

    def rank(self, ranges: Sequence[float]) -> int | None:
        """Return the rank to keep, or None if one more component may pay.

        `ranges` holds the range of the remainder after 0, 1, ... components (FLRQ equation 9: stop where k > q,
        k > 1 + x, or the slope is too small).
        """
        rank, window = len(ranges) - 1, self.window
        if not rank:
            return None if ranges[0] > 0 and self.price <= self.budget else 0
        gain = math.log2(ranges[0] / ranges[rank]) if ranges[rank] > 0 else math.inf
        if self.price * rank > gain:
            return rank - 1
        if window and rank >= window and ranges[rank - window] - ranges[rank] < self.drop * ranges[rank - window]:
            return rank - window // 2
        return rank if self.price * (rank + 1) > self.budget else None


def flexible_rank(
    matrix: Tensor,
    components: Iterable[tuple[Tensor, Tensor]],
    spread: Callable[[Tensor], float],
    stopping: Stopping,
) -> tuple[Tensor, Tensor]:
    """Take components u (m,), v (n,) off the matrix (m, n) until a rule stops.

    `spread` measures the remainder's range.

    Returns:
        left (m, r) and right (r, n) of the components that are kept; r may be 0.
    """
    remainder, taken = matrix.clone(), []
    ranges, source = [spread(matrix)], iter(components)
    while (rank := stopping.rank(ranges)) is None:
        pair = next(source, None)
        if pair is None:
            rank = len(taken)
            break
        taken.append(pair)
        remainder.addr_(*pair, alpha=-1)
        ranges.append(spread(remainder))
    if not rank:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
    left, right = zip(*taken[:rank], strict=True)
    return torch.stack(left, 1), torch.stack(right)
