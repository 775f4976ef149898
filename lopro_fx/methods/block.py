"""A block of the model as a method sees it that learns from the error of the block's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lopro_fx.methods.base import Solved, Unit


class Block(Protocol):
    """Linears whose outputs meet, such as those of a decoder layer, and the calibration batches that they read."""

    @property
    def name(self) -> str:
        """Module path."""
        ...

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        ...

    @property
    def units(self) -> Sequence[tuple[Unit, Solved]]:
        """Units in graph order, and their solutions so far."""
        ...

    def error(self, weights: Mapping[str, Callable[[], Tensor]], batches: Sequence[int]) -> Tensor:
        """Mean squared error of the block's output to that of the unquantised model, a number, differentiable.

        Args:
            weights: by a Linear's name, a function that returns its dense weight, in the packed weight's coordinates.
                Linears that are left out keep their solutions. Activations are rounded as the solutions say, with the
                gradient of the identity.
            batches: places of the batches to run.

        Returns:
            fp32 (): squared error over the outputs' variance; tokens and features weigh as in the Grams.
        """
        ...
