"""Calibration statistics of experts: of each one's own tokens, blended with those of the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lopro_fx.calibration.statistics import exponent_of, measure
from lopro_fx.methods.observers import Observer, Statistics

# Tokens of the layer that count beside an expert's own, as a part of the inputs.
_PRIOR = 0.25


def measure_experts(
    inputs: Sequence[Tensor],
    ids: Sequence[Tensor],
    slots: int,
    experts: int,
    name: str,
    node: str,
    observers: Callable[[], Sequence[Observer]],
    token_clip: float = 0,
    importance: Sequence[Tensor] | None = None,
    visible: Sequence[Tensor | None] | None = None,
    clean: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Statistics:
    """Measure the tokens of each expert, see `measure`; the result's own values are of all pairs of token and expert.

    Args:
        inputs: a batch each, (tokens, n).
        ids: int64 (tokens * slots,) for each batch, see `lopro::routed_linear`.
        slots, experts: as there.
        importance, visible: by pair instead of token.
        clean: inputs and ids of the unquantised model; a pair whose expert differs there has no drift.
        observers: makes new ones, for each expert.
        name, node, token_clip: as in `measure`.

    Raises:
        CalibrationError: as `measure`.
    """
    exponent, found = exponent_of(inputs), []
    none = [None] * len(inputs)
    before, before_ids = clean or (none, none)
    parts = [_Pairs.of(x, own, weights, shown, old, old_ids, slots) for x, own, weights, shown, old, old_ids in zip(
        inputs, ids, importance or none, visible or none, before, before_ids, strict=True,
    )]  # fmt: skip
    for expert in range(experts):
        own = [part.of_expert(expert) for part in parts]
        found.append(measure(
            [x for x, _, _ in own], f"{name}[{expert}]", node, observers(), token_clip,
            None if importance is None else [weight for _, weight, _ in own], None,
            None if clean is None else [old for _, _, old in own], exponent,
        ))  # fmt: skip
    layer = _together(found, slots)
    return replace(layer, experts=tuple(_blended(own, layer, inputs[0].shape[1]) for own in found))


def with_rows(seen: Statistics, rows: Tensor | None) -> Statistics:
    """The same with the weights of output features, for each expert too."""
    return replace(seen, rows=rows, experts=tuple(replace(own, rows=rows) for own in seen.experts))


class _Pairs:
    """Pairs of token and expert of one batch that count: rows of x, ids, weights, and rows of the unquantised x."""

    def __init__(self, x: Tensor, rows: Tensor, ids: Tensor, weights: Tensor | None, clean: Tensor | None) -> None:
        self._x, self._rows, self._ids, self._weights, self._clean = x, rows, ids, weights, clean

    @classmethod
    def of(
        cls, x: Tensor, ids: Tensor, weights: Tensor | None, visible: Tensor | None, clean: Tensor | None,
        clean_ids: Tensor | None, slots: int,
    ) -> _Pairs:  # fmt: skip
        pairs = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        if visible is not None:
            pairs = pairs[visible.to(ids.device)]
        if clean is not None and clean_ids is not None and slots == 1:
            # Another expert's product says nothing of the drift.
            clean = torch.where((clean_ids == ids).unsqueeze(1), clean, x)
        return cls(x, pairs // slots, ids[pairs], weights, clean)

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one expert's tokens, their weights, and the unquantised model's rows; the last two may stand in."""
        own = (self._ids == expert).nonzero().squeeze(1)
        rows = self._rows[own]
        x = self._x[rows]
        return x, rows if self._weights is None else self._weights[own], x if self._clean is None else self._clean[rows]


def _together(found: Sequence[Statistics], slots: int) -> Statistics:
    """Statistics of all pairs; a token counts once among the distinct ones, however many experts it has."""
    tokens = sum(own.tokens for own in found)
    values = _mixed([own.values for own in found], [own.tokens / max(tokens, 1) for own in found])
    return Statistics(values, tokens, sum(own.distinct for own in found) // slots)


def _blended(own: Statistics, layer: Statistics, in_features: int) -> Statistics:
    """Add tokens of the layer to an expert's own.

    The mean of two estimates, from t and T tokens, with the weights a and b varies as one from 1 / (a² / t + b² / T)
    tokens does.
    """
    prior = _PRIOR * in_features if layer.tokens else 0.0
    part = own.tokens / max(own.tokens + prior, 1)
    variance = part**2 / max(own.distinct, 1) + (1 - part) ** 2 / max(layer.distinct, 1)
    values = _mixed([own.values, layer.values], [part, 1 - part])
    distinct = int(1 / variance) if layer.distinct else 0
    return Statistics(values, own.tokens + int(prior), distinct, routed=own.tokens)


def _mixed(values: Sequence[Mapping[str, Any]], parts: Sequence[float]) -> dict[str, Any]:
    """Means of results that are tensors; of others, the one of the largest part."""
    most = max(range(len(parts)), key=lambda index: parts[index])
    mixed = {}
    for key in values[0]:
        each = [(value[key], part) for value, part in zip(values, parts, strict=True) if part > 0] or [
            (values[most][key], 1)
        ]
        if all(isinstance(value, Tensor) for value, _ in each):
            mixed[key] = sum((value * part for value, part in each[1:]), each[0][0] * each[0][1])
        else:
            mixed[key] = values[most][key]
    return mixed
