"""Divergence that the rounding of each Linear will cause, measured before anything is solved.

The weights of one Linear are rounded, to few bits and fast, and the rest of the graph runs on. While errors are small,
the KL divergence of the predictions grows with their mean square, and a Gaussian source gives that of other settings.
The gradient of the loss misleads here: it made q and k of SmolLM2 up to 14 times too sensitive, where a few tokens have
most of the gradient. So do random errors, drawn without the weights of tokens and rows: they made v 3 times too
sensitive beside the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from lopro_fx.budget import Option
from lopro_fx.calibration.importance import Importance
from lopro_fx.calibration.padding import Padding
from lopro_fx.calibration.replay import Replay
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.calibration.simulate import Simulated, simulated
from lopro_fx.errors import CalibrationError
from lopro_fx.kernels.formats.quantizer import Quantizer
from lopro_fx.kernels.routed.reference import routed_linear
from lopro_fx.layer import Input, Layer, stored_bytes
from lopro_fx.methods.base import Context, seed_of
from lopro_fx.methods.rounding import Rounding
from lopro_fx.passes.sites import Group, Site, weight_of

# What weights are rounded to, by the format of the method: errors as large as they are where most of a budget is
# decided.
_PROBES: Mapping[str, Mapping[str, Any]] = {
    "affine": {"bits": 3, "group_size": 64},
    "trellis": {"bits": 2, "window": 12},
}
# Batches that a division is checked on, and the number up to which none is set apart for it.
_CHECKED, _FEW = 2, 8
# Tokens that are compared at a time.
_ROWS = 64
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
        rounded: what it was measured with: the input, and a layer for each Linear.
    """

    sites: tuple[Site, ...]
    divergence: float = 0.0
    shared_bytes: int = 0
    rounded: tuple[Input, tuple[Layer, ...]] | None = None


@dataclass(frozen=True)
class Text:
    """Use of calibration batches, by index: weights are rounded by `rounding`, predictions on `compared` give the
    sensitivities, those on `checked` the divergence of all Linears together."""

    rounding: list[int]
    compared: int
    checked: list[int]


def text_of(program: ExportedProgram, batches: Sequence[Sequence[Any]]) -> Text:
    """Keep the last batches that hold tokens from the rounding; of few batches, the same serve more than once.

    Raises:
        CalibrationError: no batch holds a token.
    """
    some = [index for index, batch in enumerate(batches) if _holds_tokens(program, batch)]
    if not some:
        raise CalibrationError("a budget is divided by predictions on calibration text, and no batch holds a token")
    checked = some[-_CHECKED - 1 : -1] if len(some) > _FEW else some[-1:]
    kept = {some[-1], *checked}
    return Text([place for place in range(len(batches)) if place not in kept] or some, some[-1], checked)


def parts_of(group: Group, method: Rounding) -> list[tuple[Site, ...]]:
    """Split the Linears of one input into those that have to get one setting."""
    return [tuple(group.sites)] if method.joint else [(site,) for site in group.sites]


def sensitivities(
    program: ExportedProgram,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    text: Text,
    method: Rounding,
    importance: Mapping[str, Importance] | None,
    device: torch.device,
) -> Iterator[Sensitivity]:
    """Walk the unquantised graph once and yield the sensitivities of each group of Linears, see `parts_of`.

    Args:
        program: its first floating-point output is taken as logits over its last dimension.
        groups, device: as `Replay` takes them.
        batches: flattened user inputs on `device`.
        text: their use.
        method: rounds, to `_PROBES`.
        importance: of tokens and output features, by group, for all batches.

    Raises:
        CalibrationError: the program has no floating-point output, or writes buffers.
    """
    if not groups:
        return
    index, probed, seen = text.compared, batches[text.compared], [batches[place] for place in text.rounding]
    if importance is not None:
        importance = {name: replace(own, tokens=[own.tokens[place] for place in text.rounding])
                      for name, own in importance.items()}  # fmt: skip
    visible = Padding(program, probed)
    wanted = _logits(LockstepRunner(program, [probed], device), visible).log_softmax(-1)
    if wanted.isnan().any():
        raise CalibrationError(
            f"the predictions on calibration batch {index} are not finite; look for an overflow (try float32) or a "
            "damaged weight"
        )
    walk = Replay(program, groups, seen, replace(method, sequential=False, asymmetry=0.0), importance, device)
    rough = _rough(method)
    probe = LockstepRunner(program, [probed], device)
    first = {group.sites[0].nodes[0]: group for group in groups}
    for (unit, statistics), (node, _) in zip(walk.units(), probe.stops(set(first)), strict=True):
        group = first[node]
        generator = torch.Generator().manual_seed(seed_of(unit.name, method.seed))
        solve = rough.solve_experts if unit.experts else rough.solve
        solved = solve(unit, statistics, Context(device, generator))
        transform = solved.input.transform
        shared = stored_bytes(tensor for tensor in (transform.perm, transform.signs) if tensor is not None)
        layers = {layer.name: layer for layer in solved.layers}
        for sites in parts_of(group, method):
            rounded, found = (solved.input, tuple(layers[site.name] for site in sites)), probe.fork()
            for site, layer in zip(sites, rounded[1], strict=True):
                for node in site.nodes:
                    found.replaced[node] = simulated(solved.input, layer, node.meta["val"].dtype)
            divergence = _divergence(wanted, _logits(found, visible))
            if not divergence < math.inf:
                raise CalibrationError(
                    f"'{sites[0].name}': with its weights rounded, the predictions are not finite; exclude it, "
                    "or try float32"
                )
            yield Sensitivity(sites, max(divergence, 0.0) / gaussian_error(rough.quantizer), shared, rounded)
            shared = 0


def divergence_together(
    program: ExportedProgram,
    found: Sequence[Sensitivity],
    chosen: Sequence[Option],
    batches: Sequence[Sequence[Any]],
    text: Text,
    method: Rounding,
    device: torch.device,
) -> float:
    """KL in nats a token with all Linears rounded at once: the errors that were measured, in the size of the options.

    Args:
        program, batches, text, method, device: as in `sensitivities`.
        found, chosen: of each part the sensitivity and its option.
    """
    total, tokens, least = 0.0, 0, gaussian_error(_rough(method).quantizer)
    for batch in (batches[place] for place in text.checked):
        visible, runner = Padding(program, batch), LockstepRunner(program, [batch], device)
        wanted = _logits(LockstepRunner(program, [batch], device), visible).log_softmax(-1)
        for part, option in zip(found, chosen, strict=True):
            assert part.rounded is not None
            own = method.changed(option.settings)
            assert isinstance(own, Rounding)
            size = (gaussian_error(own.quantizer) / least) ** 0.5
            for site, layer in zip(part.sites, part.rounded[1], strict=True):
                weight = weight_of(program, site)
                for node in site.nodes:
                    runner.replaced[node] = _in_part(part.rounded[0], layer, weight, size)
        total += _divergence(wanted, _logits(runner, visible)) * len(wanted)
        tokens += len(wanted)
    return total / tokens


def _in_part(shared: Input, layer: Layer, weight: Tensor, size: float) -> Simulated:
    """The Linear with the weight plus `size` times the error of its rounding."""

    def run(x: Tensor, *rest: Any) -> Tensor:
        own = weight.to(x.device, x.dtype)
        exact = routed_linear(x, rest[0], own, rest[1]) if layer.experts else linear(x, own, *rest)
        return exact + size * (simulated(shared, layer, x.dtype)(x, *rest) - exact)

    return run


def _rough(method: Rounding) -> Rounding:
    """The method as sensitivities are measured with it."""
    rough = replace(method, sequential=False, asymmetry=0.0).changed(_PROBES[method.format])
    assert isinstance(rough, Rounding)
    return rough


def _divergence(wanted: Tensor, logits: Tensor) -> float:
    """KL divergence of logits from log-probabilities, the mean over tokens; what `wanted` rules out adds nothing."""
    total = torch.zeros((), dtype=torch.float32, device=wanted.device)
    # Some tokens at a time, so that what comes between stays in the processor's cache.
    for expected, found in zip(wanted.split(_ROWS), logits.split(_ROWS), strict=True):
        terms = expected.exp() * (expected - found.log_softmax(-1))
        total += terms.masked_fill_(expected == -math.inf, 0).sum()
    return total.item() / len(wanted)


def _holds_tokens(program: ExportedProgram, batch: Sequence[Any]) -> bool:
    """Whether a batch has rows, and a mask that shows some of them."""
    rows = all(value.numel() for value in batch if isinstance(value, Tensor))
    return rows and not Padding(program, batch).hides_all


def _logits(runner: LockstepRunner, padding: Padding) -> Tensor:
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
    return (logits if visible is None else logits[visible]).to(torch.float32)


def options_of(sensitivity: Sensitivity, method: Rounding) -> list[Option]:
    """Every option of `OPTIONS` that the method takes, with its exact bytes and the divergence predicted for it."""
    found = []
    for settings in OPTIONS.get(method.format, ()):
        own = method.changed(settings)
        assert isinstance(own, Rounding)
        size, sites = sensitivity.shared_bytes, sensitivity.sites
        for site in sites:
            size += packed_bytes(own, site.shape)
        branch = own.branch_bytes([site.out_features for site in sites], sites[0].in_features)
        size += branch * max(sites[0].experts, 1)
        loss = sensitivity.divergence * gaussian_error(own.quantizer)
        found.append(Option(settings, size, loss))
    return found


def packed_bytes(method: Rounding, shape: tuple[int, ...]) -> int:
    """Bytes of a weight (m, n), or of experts (e, m, n), that the method rounds."""
    return stored_bytes(method.empty(shape).tensors.values())


@cache
def gaussian_error(quantizer: Quantizer) -> float:
    """Mean squared error of rounding a Gaussian source of variance 1 to nearest."""
    source = torch.randn(_SOURCE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    error = source - quantizer.nearest(source, (_SOURCE[0],)).dense()
    return error.square().mean().item()
