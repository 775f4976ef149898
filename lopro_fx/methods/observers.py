"""Statistics that a method asks calibration to collect on a unit's input tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.layer import Activation, Transform

# Columns of the Gram that are computed at once, from the diagonal on.
_BLOCK = 256


class Observer:
    """Statistic of one input, updated with every token, batch by batch.

    `name` is the key of its result in `Statistics.values`. An observer that is `paired` also takes the same tokens of
    the unquantised model, which calibration then runs too.
    """

    name: str
    paired: ClassVar[bool] = False

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        """Take tokens x fp32 (tokens, n) with weights fp32 (tokens,), None for equal ones."""
        raise NotImplementedError

    def update_pair(self, x: Tensor, clean: Tensor, weights: Tensor | None) -> None:
        """In place of `update`, if `paired`: take tokens, and those of the unquantised model, of one shape."""
        raise NotImplementedError

    def result(self) -> Any:
        """Return the statistic."""
        raise NotImplementedError

    def data_free(self, in_features: int, device: torch.device | str) -> Any:
        """Return the stand-in for `result` without data."""
        raise NotImplementedError


class Gram(Observer):
    """E[x xᵀ], fp32 (n, n), each token with its weight; the identity without data."""

    name = "gram"

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        if self._total is None:
            self._total = x.new_zeros(x.shape[1], x.shape[1])
        self._tokens += x.shape[0]
        rows = x if weights is None else x * weights.sqrt().unsqueeze(1)
        _add_upper(self._total, rows)

    def result(self) -> Tensor:
        assert self._total is not None
        return _mirrored(self._total / max(self._tokens, 1))

    def data_free(self, in_features: int, device: torch.device | str) -> Tensor:
        return torch.eye(in_features, dtype=torch.float32, device=device)


class Magnitude(Observer):
    """E|x|, fp32 (n,), all tokens alike; ones without data."""

    name = "magnitude"

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        if self._total is None:
            self._total = x.new_zeros(x.shape[1])
        self._tokens += x.shape[0]
        self._total += x.abs().sum(0)

    def result(self) -> Tensor:
        assert self._total is not None
        return self._total / max(self._tokens, 1)

    def data_free(self, in_features: int, device: torch.device | str) -> Tensor:
        return torch.ones(in_features, dtype=torch.float32, device=device)


class Drift(Observer):
    """E[(x0 - x) xᵀ], fp32 (n, n), each token with its weight, with x0 of the unquantised model; zero without data."""

    name = "drift"
    paired = True

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def update_pair(self, x: Tensor, clean: Tensor, weights: Tensor | None) -> None:
        if self._total is None:
            self._total = x.new_zeros(x.shape[1], x.shape[1])
        self._tokens += x.shape[0]
        drift = clean - x
        self._total.addmm_((drift if weights is None else drift * weights.unsqueeze(1)).T, x)

    def result(self) -> Tensor:
        assert self._total is not None
        return self._total / max(self._tokens, 1)

    def data_free(self, in_features: int, device: torch.device | str) -> Tensor:
        return torch.zeros(in_features, in_features, dtype=torch.float32, device=device)


class RoundedInput(Observer):
    """E[y yᵀ] and E[x yᵀ], fp32 (2, n, n), each token with its weight, with x transformed and y its rounded value; two
    identities without data."""

    name = "rounded"

    def __init__(self, transform: Transform, activation: Activation) -> None:
        self._transform, self._activation = transform, activation
        self._total: Tensor | None = None
        self._tokens = 0

    def update(self, x: Tensor, weights: Tensor | None) -> None:
        if self._total is None:
            self._total = x.new_zeros(2, x.shape[1], x.shape[1])
        self._tokens += x.shape[0]
        moved = self._transform.forward(x)
        rounded = self._activation.forward(moved)
        if weights is not None:
            root = weights.sqrt().unsqueeze(1)
            moved, rounded = moved * root, rounded * root
        _add_upper(self._total[0], rounded)
        self._total[1].addmm_(moved.T, rounded)

    def result(self) -> Tensor:
        assert self._total is not None
        rounded, cross = self._total / max(self._tokens, 1)
        return torch.stack([_mirrored(rounded), cross])

    def data_free(self, in_features: int, device: torch.device | str) -> Tensor:
        return torch.eye(in_features, dtype=torch.float32, device=device).repeat(2, 1, 1)


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to the upper triangle of `total`, block by block."""
    for first in range(0, rows.shape[1], _BLOCK):
        block = rows[:, first : first + _BLOCK]
        total[first : first + _BLOCK, first:].addmm_(block.T, rows[:, first:])


def _mirrored(total: Tensor) -> Tensor:
    upper = total.triu()
    return upper + upper.triu(1).T


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics of one input.

    Args:
        values: results of the method's observers by name. Activations far from 1 are scaled by a power of two, without
            which their squares would overflow or vanish in fp32.
        tokens: tokens counted; 0 is data-free.
        distinct: tokens in different directions, an upper bound of those that are independent.
        rows: fp32 (m,), weight of the error of each output feature of all layers; None for equal weights.
        experts: of each expert alone, where the layers are experts.
        routed: of one expert, tokens that were routed to it; `tokens` counts some of the layer's besides.
    """

    values: Mapping[str, Any]
    tokens: int
    distinct: int = 0
    rows: Tensor | None = None
    experts: tuple[Statistics, ...] = ()
    routed: int = 0

    @property
    def gram(self) -> Tensor:
        """Result of `Gram`."""
        return self._of(Gram)

    @property
    def magnitude(self) -> Tensor:
        """Result of `Magnitude`."""
        return self._of(Magnitude)

    @property
    def drift(self) -> Tensor:
        """Result of `Drift`."""
        return self._of(Drift)

    @property
    def rounded(self) -> Tensor:
        """Result of `RoundedInput`."""
        return self._of(RoundedInput)

    def row_scale(self, share: Tensor) -> Tensor:
        """Scale (m, 1) of an error's rows that weighs their squares by `rows`; `share` (m, 1) takes them to one
        unit."""
        return share if self.rows is None else share * self.rows.sqrt().unsqueeze(1)

    def _of(self, observer: type[Observer]) -> Any:
        if observer.name not in self.values:
            raise ConfigError(f"the method's observers() lack {observer.__name__}(), which it reads")
        return self.values[observer.name]
