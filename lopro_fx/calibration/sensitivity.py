"""Loss that the rounding of each input's Linears will cause, predicted before anything is solved.

An error e_t at an output raises the loss by ½ (gᵀ e_t)², with g the gradient there (the empirical Fisher matrix). If
errors of features are independent, a layer adds ½ mean|g|² / out_features times E|e|². Rounding with feedback makes
E|e|² = tr(E H Eᵀ) the sum of the pivots of H times the mean squares of the rows' rounding errors. A row's is its own
mean square times a constant of the format: its error on a Gaussian source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.budget import Option
from lopro_fx.calibration.importance import Importance
from lopro_fx.calibration.replay import Replay
from lopro_fx.kernels.formats.quantizer import Quantizer
from lopro_fx.kernels.formats.registry import FORMATS
from lopro_fx.layer import stored_bytes
from lopro_fx.methods.base import seed_of
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.rounding import Rounding
from lopro_fx.passes.sites import Group

# Shape of the Gaussian source: a strip and a column group of the formats there are.
_SOURCE = 512, 128
# Settings to choose from, by the format of the method.
OPTIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "affine": (
        *({"bits": bits, "group_size": size} for bits in (2, 3, 4) for size in (32, 64, 128)),
        {"bits": 8, "group_size": 128},
    ),
    "trellis": (
        *({"bits": bits} for bits in (1.5, 2, 2.5, 3, 4)),
        {"format": "affine", "bits": 8, "group_size": 128},
    ),
}


@dataclass(frozen=True)
class Sensitivity:
    """`loss`: rise of the loss in nats a token per relative mean square of the rounding errors, for each layer of an
    input; `shared_bytes`: what the input stores beside its layers' packed weights and factors."""

    loss: tuple[float, ...]
    shared_bytes: int


def sensitivities(
    program: ExportedProgram,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    method: Rounding,
    importance: Mapping[str, Importance],
    device: torch.device,
) -> Iterator[tuple[Group, Sensitivity]]:
    """Walk the unquantised graph once and yield the sensitivity of each group of Linears.

    Args:
        program, groups, batches, device: as `Replay` takes them.
        method: its transform and feedback decide the pivots.
        importance: of every group, measured on these batches.
    """
    walk = Replay(program, groups, batches, replace(method, sequential=False), importance, device)
    by_name = {group.name: group for group in groups}
    for unit, seen in walk.units():
        generator = torch.Generator().manual_seed(seed_of(unit.name, method.seed))
        energy, transform = method.response(unit.weights, seen, generator)
        rows = [weight.shape[0] for weight in unit.weights]
        squares = importance[unit.name].squares
        loss = tuple(
            0.5 * square / count * part.sum().item()
            for square, count, part in zip(squares, rows, energy.split(rows), strict=True)
        )
        shared = stored_bytes(tensor for tensor in (transform.perm, transform.signs) if tensor is not None)
        yield by_name[unit.name], Sensitivity(loss, shared)


def options_of(group: Group, sensitivity: Sensitivity, method: Rounding) -> list[Option]:
    """Every option of `OPTIONS` that the method takes, with its exact bytes and its predicted loss."""
    found = []
    for settings in OPTIONS.get(method.format, ()):
        own = method.changed(settings)
        assert isinstance(own, Rounding)
        size = sensitivity.shared_bytes
        for site in group.sites:
            size += packed_bytes(own, (site.out_features, site.in_features))
        if isinstance(own, LoPRo) and own.rank:
            rows = [site.out_features for site in group.sites]
            size += own.rank * ((sum(rows) + group.in_features) * own.factor_bits // 8 + 2 * (len(rows) + 1))
        loss = sum(sensitivity.loss) * gaussian_error(own.quantizer)
        found.append(Option(settings, size, loss))
    return found


def packed_bytes(method: Rounding, shape: tuple[int, int]) -> int:
    """Bytes of a weight (m, n) that the method rounds."""
    quantizer = method.quantizer
    spec = {name: getattr(quantizer, name, value) for name, value in FORMATS[method.format].spec.items()}
    return stored_bytes(FORMATS[method.format].empty(shape, spec).tensors.values())


@cache
def gaussian_error(quantizer: Quantizer) -> float:
    """Mean squared error of rounding a Gaussian source of variance 1 to nearest."""
    source = torch.randn(_SOURCE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    error = source - quantizer.nearest(source, (_SOURCE[0],)).dense()
    return error.square().mean().item()
