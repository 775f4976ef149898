"""Divergence that the rounding of each Linear will cause, measured before anything is solved.

The weights of one Linear get a random error, shaped as the method's feedback shapes that of rounding, and the rest of
the graph runs on. While errors are small, the KL divergence of the predictions grows with their mean square, and a
Gaussian source gives that of a rounding. The gradient of the loss misleads here: it made q and k of SmolLM2 up to 14
times too sensitive, where a few tokens have most of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from lopro_fx.budget import Option
from lopro_fx.calibration.padding import Padding
from lopro_fx.calibration.replay import Replay
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.errors import CalibrationError
from lopro_fx.kernels.formats.quantizer import Quantizer
from lopro_fx.kernels.formats.registry import FORMATS
from lopro_fx.layer import stored_bytes
from lopro_fx.methods.base import Unit, seed_of
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.rounding import Rounding
from lopro_fx.passes.sites import Group, Site

# Mean square of the errors over that of the weights: about that of 2 bits, where most of a budget is decided.
_PROBE = 0.05
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
    """Sensitivity of Linears that read one tensor and get one setting.

    Args:
        sites: the Linears.
        divergence: KL in nats a token, over the relative mean square of the rounding errors.
        shared_bytes: what their input stores beside packed weights and factors; with the input's first Linears.
    """

    sites: tuple[Site, ...]
    divergence: float = 0.0
    shared_bytes: int = 0


def parts_of(group: Group, method: Rounding) -> list[tuple[Site, ...]]:
    """Split the Linears of one input into those that have to get one setting."""
    return [tuple(group.sites)] if method.joint else [(site,) for site in group.sites]


def sensitivities(
    program: ExportedProgram,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    method: Rounding,
    device: torch.device,
) -> Iterator[Sensitivity]:
    """Walk the unquantised graph once and yield the sensitivities of each group of Linears, see `parts_of`.

    Args:
        program: its first floating-point output is taken as logits over its last dimension.
        groups, device: as `Replay` takes them.
        batches: flattened user inputs on `device`; the last one's predictions are compared, the others' activations
            shape the errors, as far as there are others.
        method: its transform and feedback shape the errors.

    Raises:
        CalibrationError: the program has no floating-point output, or writes buffers.
    """
    if not groups:
        return
    some = [index for index, batch in enumerate(batches) if _holds_tokens(program, batch)]
    if not some:
        raise CalibrationError("a budget is divided by predictions on calibration text, and no batch holds a token")
    index = some[-1]
    probed, seen = batches[index], [batch for place, batch in enumerate(batches) if place != index] or batches
    visible = Padding(program, probed)
    wanted = _log_probabilities(LockstepRunner(program, [probed], device), visible)
    if wanted.isnan().any():
        raise CalibrationError(
            f"the predictions on calibration batch {index} are not finite; look for an overflow (try float32) or a "
            "damaged weight"
        )
    walk = Replay(program, groups, seen, replace(method, sequential=False, asymmetry=0.0), None, device)
    probe = LockstepRunner(program, [probed], device)
    first = {group.sites[0].nodes[0]: group for group in groups}
    for (unit, statistics), (node, _) in zip(walk.units(), probe.stops(set(first)), strict=True):
        group = first[node]
        generator = torch.Generator().manual_seed(seed_of(unit.name, method.seed))
        error, transform = method.probe(unit.weights, statistics, generator)
        shared = stored_bytes(tensor for tensor in (transform.perm, transform.signs) if tensor is not None)
        disturbed = _disturbed(group, unit, error * _PROBE**0.5)
        for sites in parts_of(group, method):
            found = probe.fork()
            found.replaced.update((node, disturbed[node]) for site in sites for node in site.nodes)
            divergence = _divergence(wanted, _log_probabilities(found, visible))
            if not divergence < math.inf:
                raise CalibrationError(
                    f"'{sites[0].name}': with small errors in its weights, the predictions are not finite; exclude it, "
                    "or try float32"
                )
            yield Sensitivity(sites, max(divergence, 0.0) / _PROBE, shared)
            shared = 0


def _disturbed(group: Group, unit: Unit, error: Tensor) -> dict[Node, Callable[[Tensor, Tensor | None], Tensor]]:
    """What runs in place of the group's Linears, with the errors (sum of m_i, n) added to their weights."""
    parts = error.split([weight.shape[0] for weight in unit.weights])
    return {
        node: _linear((weight + part).to(node.meta["val"].dtype))
        for site, weight, part in zip(group.sites, unit.weights, parts, strict=True)
        for node in site.nodes
    }


def _linear(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda x, bias: linear(x, weight, bias)


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """KL divergence, the mean over tokens; what `wanted` rules out adds nothing."""
    terms = wanted.exp() * (wanted - found)
    return terms.masked_fill(wanted == -math.inf, 0).sum(-1).mean().item()


def _holds_tokens(program: ExportedProgram, batch: Sequence[Any]) -> bool:
    """Whether a batch has rows, and a mask that shows some of them."""
    rows = all(value.numel() for value in batch if isinstance(value, Tensor))
    return rows and not Padding(program, batch).hides_all


def _log_probabilities(runner: LockstepRunner, padding: Padding) -> Tensor:
    """Run to the end: fp32 (tokens, vocabulary) of the tokens that are text."""
    with torch.no_grad():
        (outputs,) = runner.outputs()
    floating = [
        value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not floating:
        raise CalibrationError("a budget needs a program that returns logits: it has no floating-point output")
    if floating[0].dim() == 0 or floating[0].shape[-1] < 2:
        raise CalibrationError(
            "a budget needs a program that returns logits: its first floating-point output has the shape "
            f"{tuple(floating[0].shape)}"
        )
    visible = padding.visible(floating[0].shape[:-1])
    logits = floating[0].reshape(-1, floating[0].shape[-1])
    return (logits if visible is None else logits[visible]).to(torch.float32).log_softmax(-1)


def options_of(sensitivity: Sensitivity, method: Rounding) -> list[Option]:
    """Every option of `OPTIONS` that the method takes, with its exact bytes and the divergence predicted for it."""
    found = []
    for settings in OPTIONS.get(method.format, ()):
        own = method.changed(settings)
        assert isinstance(own, Rounding)
        size, sites = sensitivity.shared_bytes, sensitivity.sites
        for site in sites:
            size += packed_bytes(own, (site.out_features, site.in_features))
        if isinstance(own, LoPRo) and own.rank:
            rows = [site.out_features for site in sites]
            scales = 2 * (len(rows) + 1) if own.factor_bits == 8 else 0
            size += own.rank * ((sum(rows) + sites[0].in_features) * own.factor_bits // 8 + scales)
        loss = sensitivity.divergence * gaussian_error(own.quantizer)
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
