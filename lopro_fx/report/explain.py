"""`explain`: every matrix product or convolution with a parameter in a program, taken or skipped, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from lopro_fx.errors import ConfigError
from lopro_fx.methods.base import Method
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.record import require_program
from lopro_fx.passes.sites import Selection, find_sites
from lopro_fx.report.table import render


@dataclass(frozen=True)
class Line:
    """One weight: `taken`, with the `group` of Linears that read the same input, or skipped, with the `reason`."""

    name: str
    shape: tuple[int, ...]
    taken: bool
    group: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Lines in graph order; `str()` draws the table."""

    lines: tuple[Line, ...]

    @property
    def taken(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.taken)

    @property
    def skipped(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.taken)

    def __str__(self) -> str:
        weights = sum(torch.Size(line.shape).numel() for line in self.taken)
        title = f"{len(self.taken)} Linears taken ({weights:,} weights), {len(self.skipped)} skipped"
        rows = [
            (line.name, "x".join(map(str, line.shape)), "taken" if line.taken else "skipped", line.reason or line.group)
            for line in self.lines
        ]
        return render(title, ("layer", "shape", "", "group, or reason"), rows)


def explain(program: ExportedProgram, config: Method | None = None) -> Explanation:
    """List what `quantize(program, config=config)` would take and skip; nothing is run.

    A program that is quantised already has no Linear to take; see `report` for what was done to it.
    """
    require_program(program)
    config = LoPRo() if config is None else config
    if not isinstance(config, Method):
        raise ConfigError(f"config={config!r}: give a method, such as RTN(...), GPTQ(...), FLRQ(...) or LoPRo(...)")
    selection: Selection = find_sites(as_linears(program), config.include, config.exclude, heads=config.head_bits > 0)
    lines = [
        Line(site.name, site.shape, True, group.name, "")
        for group in (*selection.groups, *selection.heads)
        for site in group.sites
    ]
    lines += [Line(item.name, item.shape, False, "", item.reason) for item in selection.skipped]
    return Explanation(tuple(lines))
