"""Plan the settings of every Linear under one budget, before anything is solved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.budget import Budget, Choice, Plan, best_uniform, divide, overrides_of, total_of
from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.calibration.importance import Importance, importance_of
from lopro_fx.calibration.sensitivity import (
    OPTIONS,
    Sensitivity,
    divergence_together,
    options_of,
    packed_bytes,
    parts_of,
    sensitivities,
    text_of,
)
from lopro_fx.devices import available, full_precision, home_of
from lopro_fx.errors import ConfigError
from lopro_fx.methods.base import Method
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.rtn import head_method
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.record import require_program
from lopro_fx.passes.sites import Selection
from lopro_fx.progress import Progress, bar
from lopro_fx.selection import require_finite, select, warn_of_patterns


@torch.inference_mode(False)
def plan(
    program: ExportedProgram,
    calibration: Iterable[Any],
    config: Method | None = None,
    *,
    budget: Budget,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Choose bits, group size and format of every Linear, so that the predicted divergence is least under `budget`.

    `print(plan(...))` shows the choices; `quantize(program, calibration, plan(...).method)` follows them.

    Args:
        program, calibration, config, progress, device: as `quantize` takes them. Each Linear takes a run of
            the layers after it on the last batch, with its weights rounded by the others.
        budget: of all quantised Linears, output projections included.

    Raises:
        ConfigError: the method is not one that rounds to a format with options, or the budget is too small.
    """
    require_program(program)
    method = plannable(LoPRo() if config is None else config, budget, calibration)
    place = home_of(program) if device is None else available(device)
    program = as_linears(program)
    selection = select(program, method)
    warn_of_patterns(selection, method)
    require_finite(program, selection)
    require_possible(selection, method, budget)
    batches = flatten_batches(program, calibration, place)
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        shown = progress or stack.enter_context(bar("plan"))
        importance = importance_of(program, selection, batches, method, shown, place)
        return planned(program, selection, batches, method, budget, importance, shown, place)


def plannable(config: Method, budget: Budget, calibration: object) -> Rounding:
    """Require what a plan needs, and return the method.

    Raises:
        ConfigError: the method has no options, or overrides, or layers of unknown size; `budget` is no `Budget`; there
            is no calibration.
    """
    if not isinstance(budget, Budget):
        raise ConfigError(f"budget={budget!r}: give a Budget, such as Budget(bits_per_weight=3)")
    if not isinstance(config, Rounding) or config.format not in OPTIONS:
        raise ConfigError(
            f"a budget needs a method that rounds to one of the formats {', '.join(OPTIONS)}, not {config!r}"
        )
    if config.overrides:
        raise ConfigError("a budget chooses the settings of every Linear: give a method without overrides")
    if reason := config.unknown_size:
        raise ConfigError(f"a budget needs layers of known size, and {config.name} {reason}")
    if calibration is None:
        raise ConfigError("a budget is divided by what calibration measures; pass batches of real text")
    return config


def require_possible(selection: Selection, method: Rounding, budget: Budget) -> None:
    """Refuse a size that the smallest options exceed.

    Raises:
        ConfigError: says what is possible.
    """
    head, head_weights = _heads(selection, method)
    weights = head_weights + sum(site.weights for g in selection.groups for site in g.sites)
    limit = budget.bytes_for(weights)
    parts = (part for group in selection.groups for part in parts_of(group, method))
    smallest = (options_of(Sensitivity(part), method) for part in parts)
    least = head + sum(min(option.bytes for option in options) for options in smallest)
    if limit is not None and limit < least:
        rank = getattr(method, "rank", 0)
        factors = f" with rank={rank}, which costs more than it saves" if rank else ""
        raise ConfigError(
            f"the budget is {limit:,} bytes ({8 * limit / weights:.3f} bits per weight), and the least possible here "
            f"is {least:,} ({8 * least / weights:.3f}){factors}"
        )


def _heads(selection: Selection, method: Rounding) -> tuple[int, int]:
    """Bytes and weights of the output projections; the sites of a head share one weight."""
    heads = [site for head in selection.heads for site in head.sites[:1]]
    size = sum(packed_bytes(head_method(method), (site.out_features, site.in_features)) for site in heads)
    return size, sum(site.weights for site in heads)


def planned(
    program: ExportedProgram,
    selection: Selection,
    batches: Sequence[Sequence[Any]],
    method: Rounding,
    budget: Budget,
    importance: Mapping[str, Importance] | None,
    progress: Progress,
    device: torch.device,
) -> Plan:
    """Make the plan of `plan` on `batches`, flattened inputs on `device`."""
    groups = selection.groups
    head, head_weights = _heads(selection, method)
    weights = sum(site.weights for group in groups for site in group.sites)
    limit = budget.bytes_for(weights + head_weights)
    limit = None if limit is None else limit - head
    text = text_of(program, batches)
    total, found = sum(len(parts_of(group, method)) for group in groups), []
    for sensitivity in sensitivities(program, groups, batches, text, method, importance, device):
        found.append(sensitivity)
        progress(len(found), total, "sensitivity")
    options = [options_of(sensitivity, method) for sensitivity in found]
    chosen = divide(options, limit, budget.max_kl or 0.0)
    uniform, checked = best_uniform(options, sum(own.bytes for own in chosen) if limit is None else limit), None
    if uniform and budget.max_kl is None and chosen != uniform:
        both = [divergence_together(program, found, each, batches, text, method, device) for each in (chosen, uniform)]
        chosen, checked = uniform if both[1] < both[0] else chosen, (both[0], both[1])
    choices = tuple(
        Choice(
            tuple(site.name for site in part.sites),
            sum(site.weights for site in part.sites),
            option,
        )
        for part, option in zip(found, chosen, strict=True)
    )
    settings = replace(method, overrides=overrides_of(choices))
    return Plan(settings, choices, head, head_weights, total_of(uniform) if uniform else None, checked)
