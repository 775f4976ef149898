"""Calibration statistics of the tensor that a group of Linears reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lopro_fx.calibration.padding import kept
from lopro_fx.errors import CalibrationError
from lopro_fx.methods.observers import Observer, Statistics


def data_free(in_features: int, observers: Iterable[Observer], device: torch.device | str = "cpu") -> Statistics:
    """Return the stand-in for an input's statistics without data."""
    return Statistics({observer.name: observer.data_free(in_features, device) for observer in observers}, 0)


def measure(
    inputs: Sequence[Tensor],
    name: str,
    node: str,
    observers: Sequence[Observer],
    token_clip: float = 0,
    importance: Sequence[Tensor] | None = None,
    visible: Sequence[Tensor | None] | None = None,
    clean: Sequence[Tensor] | None = None,
    exponent: int | None = None,
) -> Statistics:
    """Show every token to the observers; each input is a batch (..., n) of any float dtype.

    `clean` holds the same batches of the unquantised model, for observers that are paired; None where `inputs` do.

    `importance`, fp32 (tokens,) for each batch, weighs tokens. Then each token whose weighted squared norm exceeds
    `token_clip` times the median gets a lower weight, which brings it to that (0: none does). One attention-sink token
    may be 10⁵ times larger than the rest: unclipped, it is the whole Gram, and damping relative to it drowns every
    other token.

    `exponent` of the activations' unit is chosen for `inputs` by default.

    `visible`, bool (tokens of the batch,) or None for each batch, selects the tokens that count, see `Padding`;
    `importance` has weights for those alone.

    Raises:
        CalibrationError: a value is NaN or infinite; names the node, the layer that reads it and the batch.
    """
    n = inputs[0].shape[-1]
    exponent = exponent_of(inputs) if exponent is None else exponent
    seen = visible or [None] * len(inputs)

    def tokens_of(batch: Tensor, text: Tensor | None) -> Tensor:
        rows = kept(batch.reshape(-1, n), text).to(torch.float32)
        return rows if exponent == 0 else rows * 2.0**-exponent

    norms = [tokens_of(batch, text).square().sum(1) for batch, text in zip(inputs, seen, strict=True)]
    weights = importance or [torch.ones_like(norm) for norm in norms]
    every = torch.cat(norms) * torch.cat(list(weights))
    # Zero tokens, such as padding, would make the median zero where they are the majority.
    limit = token_clip * (every[every > 0].median() if every.any() else 0)
    tokens = 0
    directions = _Directions(n)
    unquantised = inputs if clean is None else clean
    for index, (batch, before, text, norm, weight) in enumerate(
        zip(inputs, unquantised, seen, norms, weights, strict=True)
    ):
        if not torch.isfinite(norm).all():
            row = int((~torch.isfinite(norm)).nonzero()[0])
            raise CalibrationError(
                f"node '{node}', read by '{name}', is not finite in calibration batch {index}, row {row}; look for an "
                "overflow before it (try --dtype float32) or a damaged weight"
            )
        rows = tokens_of(batch, text)
        directions.add(rows, norm)
        tokens += rows.shape[0]
        if token_clip:
            weight = weight * (limit / (norm * weight).clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)
        weight = weight if token_clip or importance else None
        for observer in observers:
            if observer.paired:
                observer.update_pair(rows, tokens_of(before, text), weight)
            else:
                observer.update(rows, weight)
    return Statistics({observer.name: observer.result() for observer in observers}, tokens, directions.count)


def exponent_of(inputs: Sequence[Tensor]) -> int:
    """Exponent of the activations' unit: 0 where the largest one's square is well inside fp32's range."""
    largest = max((batch.abs().amax().item() for batch in inputs if batch.numel()), default=0.0)
    if not 0 < largest < math.inf or 2.0**-40 < largest < 2.0**40:
        return 0
    return min(max(math.frexp(largest)[1], -120), 120)


class _Directions:
    """Count of distinct token directions, by the cells of a few random projections.

    Rounding in the model moves equal tokens over the edge of a cell now and then; a repeated token still counts as few.
    """

    _PROJECTIONS, _CELL = 16, 0.1

    def __init__(self, width: int) -> None:
        rng = torch.Generator().manual_seed(width)
        self._projection = torch.randn(width, self._PROJECTIONS, generator=rng, dtype=torch.float32, device="cpu")
        self._hash = torch.randint(2**62, (self._PROJECTIONS,), generator=rng, dtype=torch.int64, device="cpu")
        self._seen: list[Tensor] = []

    def add(self, rows: Tensor, norm: Tensor) -> None:
        """Add rows (t, n), whose squared lengths are `norm` (t,)."""
        some = norm > 0
        direction = rows[some] @ self._projection.to(rows.device) / norm[some].sqrt().unsqueeze(1)
        # Sums of products wrap around, which makes them a hash of the cell.
        cell = (direction / self._CELL).round().to(torch.int64)
        self._seen.append((cell * self._hash.to(rows.device)).sum(1))

    @property
    def count(self) -> int:
        return torch.cat(self._seen).unique().numel()
