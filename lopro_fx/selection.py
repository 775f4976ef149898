"""Selection of the Linears to quantise, and the checks on them that come before any work."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase

import torch
from torch.export import ExportedProgram

from lopro_fx.errors import GraphError
from lopro_fx.methods.base import Method
from lopro_fx.passes.record import is_quantised
from lopro_fx.passes.sites import Selection, find_sites, weight_of


def select(program: ExportedProgram, config: Method) -> Selection:
    """Select the Linears to quantise in a program after `as_linears`.

    Raises:
        GraphError: none is taken.
    """
    selection = find_sites(program, config.include, config.exclude, heads=config.head_bits > 0)
    if not selection.sites:
        if is_quantised(program):
            raise GraphError("this program is quantised already: take the one before lopro_fx.quantize")
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in selection.skipped[:3]) or "it has no aten.linear"
        raise GraphError(f"nothing to quantise in this program ({reasons})")
    return selection


def warn_of_lost(selection: Selection) -> None:
    """Warn of parameters that look like experts and were not recognised: they may be most of the model."""
    lost = [item for item in selection.skipped if item.lost]
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        warnings.warn(f"'{lost[0].name}'{more} is not quantised: {lost[0].reason}", stacklevel=4)


def warn_of_patterns(selection: Selection, config: Method) -> None:
    """Warn of patterns that match no Linear: a mistyped one takes nothing, or excludes nothing."""
    solved = [site.name for group in selection.groups for site in group.sites]
    names = [*(site.name for site in selection.sites), *(item.name for item in selection.skipped)]
    for what, known in (("include", names), ("exclude", names), ("overrides", solved)):
        for pattern in getattr(config, what):
            if not any(pattern == name or fnmatchcase(name, pattern) for name in known):
                kind = "solved Linear" if any(fnmatchcase(name, pattern) for name in names) else "Linear"
                warnings.warn(f"{what}='{pattern}' matches no {kind} of this program", stacklevel=4)


def require_finite(program: ExportedProgram, selection: Selection) -> None:
    most = torch.finfo(torch.float32).max
    for site in selection.sites:
        # False for NaN too.
        if not weight_of(program, site).abs().amax() <= most:
            raise GraphError(
                f"the weight of '{site.name}' holds NaN, infinity or more than fp32 can hold; exclude it or repair the "
                "model"
            )
