"""The five stages on one page: find, calibrate, solve, rewrite; what the result is delivered as lives in `deploy/`."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx import __about__
from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.calibration.importance import measure_importance
from lopro_fx.calibration.schedule import run_calibrated, run_data_free
from lopro_fx.calibration.statistics import Statistics
from lopro_fx.config import GPTQ, RTN, LoPRo, Method
from lopro_fx.devices import available, full_precision, home_of
from lopro_fx.errors import ConfigError, GraphError
from lopro_fx.methods.rtn import solve_data_free
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.solve import solve
from lopro_fx.packing import pack_solution
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.packed import PackedGroup, PackedSite, dense_weight
from lopro_fx.passes.record import Record, is_quantised, require_program
from lopro_fx.passes.rewrite import RewritePass
from lopro_fx.passes.sites import Group, Selection, find_sites, weight_of
from lopro_fx.progress import Progress, bar
from lopro_fx.resume import Journal
from lopro_fx.state import QuantState


def quantize(
    program: ExportedProgram,
    calibration: Iterable[Any] | None = None,
    config: Method | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> ExportedProgram:
    """Quantise every Linear of an exported program: `apply(program, calibrate(program, ...))`.

    Args:
        program: from `torch.export.export`, not decomposed. It is not changed.
        calibration: batches, each a tensor, a tuple of positional inputs, a dict of keyword inputs or an (args, kwargs)
            pair; None quantises without data and warns.
        config: `LoPRo` (default), `GPTQ` or `RTN`.
        resume: folder that keeps each finished group, so that a run that was stopped continues there.
        progress: called as (done, total, label); by default a bar on a terminal.
        device: where to measure and solve; by default where the program's tensors lie. They stay where they are: each
            weight is brought over for the layer that reads it, and what replaces it is put where it was.

    Returns:
        A new ExportedProgram whose Linears are `lopro::rotate`, `lopro::project` and `lopro::packed_linear` nodes, and
        with `head_bits` a tied embedding `lopro::packed_embedding`.

    Raises:
        ConfigError: torch can't compute on `device`.
        GraphError: no Linear to quantise, or a weight holds NaN or infinity in fp32.
        CalibrationError: a batch doesn't fit the program, or an activation is not finite.
        CheckpointError: `resume` holds another run, or can't be written.
    """
    state = calibrate(program, calibration, config, resume=resume, progress=progress, device=device)
    return apply(program, state)


# Tensors of inference mode can't take part in a gradient, neither here nor where the state is used.
@torch.inference_mode(False)
def calibrate(
    program: ExportedProgram,
    calibration: Iterable[Any] | None = None,
    config: Method | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> QuantState:
    """Find the quantised form of every Linear; arguments and errors as in `quantize`."""
    require_program(program)
    config = LoPRo() if config is None else config
    if not isinstance(config, Method):
        raise ConfigError(f"config={config!r}: give RTN(...), GPTQ(...) or LoPRo(...)")
    place = home_of(program) if device is None else available(device)
    program = as_linears(program)
    selection = select(program, config)
    _warn_of_patterns(selection, config)
    _require_finite(program, selection)
    batches = None if calibration is None else flatten_batches(program, calibration, place)
    if batches is None and isinstance(config, (GPTQ, LoPRo)):
        warnings.warn(
            f"{type(config).__name__} without calibration is data-free: every input direction counts the same, which "
            "costs accuracy; pass batches of real text",
            stacklevel=3,
        )
    started = time.monotonic()
    journal = Journal(resume, program, config, batches) if resume else None
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        run = _Run(selection, config, journal, progress or stack.enter_context(bar("quantise")), home_of(program))
        if batches is None or not selection.groups:
            run_data_free(program, selection.groups, run.solve, place)
        else:
            importance = None
            if config.importance == "gradient":
                importance = measure_importance(program, selection.groups, batches, config.seed, run.weighing, place)
            run_calibrated(program, selection.groups, batches, run.solve, config, importance, place)
        for head in selection.heads:
            run.round_head(head, weight_of(program, head.sites[0]).to(place))
    if batches is not None and selection.groups and not run.tokens and not isinstance(config, RTN):
        warnings.warn("the calibration holds no token: the result is data-free, as without it", stacklevel=3)
    run.warn_of_few_tokens()
    info = {
        "lopro_fx": __about__.__version__,
        "torch": torch.__version__,
        "calibration_tokens": run.tokens,
        "seconds": time.monotonic() - started,
    }
    left = [(item.name, item.reason) for item in selection.left]
    return QuantState(config.to_dict(), run.groups, run.sites, left, info)


def apply(program: ExportedProgram, state: QuantState) -> ExportedProgram:
    """Rewrite `program` with a calibrated state; it may be any program of the same model, e.g. the one for decoding.

    Raises:
        GraphError: the program lacks a calibrated Linear, or its shape differs.
    """
    require_program(program)
    record = Record(
        config=state.config,
        left=state.left,
        info=state.info,
        # What the tensors tell stands in the record too: a state that was made by hand has no rows.
        sites={name: {**site.facts, **site.row} for name, site in state.sites.items()},
        groups={name: list(group.members) for name, group in state.groups.items()},
    )
    return RewritePass(state.groups, state.sites, record)(as_linears(program))


def select(program: ExportedProgram, config: Method) -> Selection:
    """Linears to take and to leave, of a program after `as_linears`.

    Raises:
        GraphError: none is taken.
    """
    selection = find_sites(program, config.include, config.exclude, heads=config.head_bits > 0)
    if not selection.sites:
        if is_quantised(program):
            raise GraphError("this program is quantised already: take the one before lopro_fx.quantize")
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in selection.left[:3]) or "it has no aten.linear"
        raise GraphError(f"nothing to quantise in this program ({reasons})")
    return selection


def _warn_of_patterns(selection: Selection, config: Method) -> None:
    """Say which patterns are no Linear's name: a mistyped one takes nothing, or leaves nothing out."""
    names = [*(site.name for site in selection.sites), *(item.name for item in selection.left)]
    for what in ("include", "exclude"):
        for pattern in getattr(config, what):
            if not any(pattern == name or fnmatchcase(name, pattern) for name in names):
                warnings.warn(f"{what}='{pattern}' matches no Linear of this program", stacklevel=4)


def _require_finite(program: ExportedProgram, selection: Selection) -> None:
    most = torch.finfo(torch.float32).max
    for site in selection.sites:
        # False for NaN too.
        if not weight_of(program, site).abs().amax() <= most:
            raise GraphError(
                f"the weight of '{site.name}' holds NaN, infinity or more than fp32 can hold; exclude it or repair the "
                "model"
            )


def seed_of(name: str, seed: int) -> int:
    """Seed of the group of that name in a run with `seed`: the same in every process and version."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


class _Run:
    """Solves groups as the schedule reaches them, records what they become, and reports how far it is."""

    def __init__(
        self, selection: Selection, config: Method, journal: Journal | None, progress: Progress, home: torch.device
    ) -> None:
        self.groups: dict[str, PackedGroup] = {}
        self.sites: dict[str, PackedSite] = {}
        self.tokens = 0
        # Distinct tokens and inputs of the groups with fewer tokens than inputs, by name.
        self.few: dict[str, tuple[int, int]] = {}
        self._config, self._journal, self._progress, self._home = config, journal, progress, home
        self._total = sum(site.out_features * site.in_features for site in selection.sites)
        self._done = 0
        progress(0, self._total, "")

    def weighing(self, done: int, batches: int, label: str) -> None:
        """Report how far the importance of tokens is, a part of the work with a total of its own."""
        self._progress(done, batches, label)

    def solve(self, group: Group, stats: Statistics, weights: list[Tensor]) -> list[Tensor]:
        config = self._config

        def solved() -> tuple[GroupSolution, str, int]:
            # One generator a group: a result doesn't depend on what was solved before it, be it read or excluded.
            generator = torch.Generator().manual_seed(seed_of(group.name, config.seed))
            return solve(weights, stats, config, generator), config.method, config.bits

        packed, sites = self._finished(group) or self._solve(group, solved, stats)
        self.tokens = max(self.tokens, stats.tokens)
        if stats.tokens > 0 and stats.distinct < group.in_features and not isinstance(config, RTN):
            self.few[group.name] = stats.distinct, group.in_features
        self._record(packed, sites)
        # Dense weights come from the packed tensors, so what follows sees exactly what will be stored.
        place = weights[0].device
        return [dense_weight(packed.to(place), site.to(place)) for site in sites]

    def round_head(self, head: Group, weight: Tensor) -> None:
        """Round an output projection to nearest; the embeddings that share its weight will read it too."""
        config = self._config

        def rounded() -> tuple[GroupSolution, str, int]:
            solution = solve_data_free(weight, config.head_bits, config.group_size, config.clip_steps)
            return solution, RTN.method, config.head_bits

        packed, sites = self._finished(head) or self._solve(head, rounded)
        self._record(packed, [replace(site, embedding=True) for site in sites])

    def warn_of_few_tokens(self) -> None:
        """Say once which groups were calibrated on fewer distinct tokens than they have inputs."""
        if not self.few:
            return
        name, (distinct, width) = min(self.few.items(), key=lambda item: item[1][0] / item[1][1])
        warnings.warn(
            f"calibration holds few tokens for the width of {len(self.few)} of {len(self.groups)} groups of layers: "
            f"'{name}' has {width} inputs and saw {distinct} distinct tokens; what was not seen is rounded as without "
            f"data. Calibrate on real text of {4 * width} tokens or more",
            stacklevel=4,
        )

    def _record(self, packed: PackedGroup, sites: list[PackedSite]) -> None:
        self.groups[packed.name] = packed
        self.sites.update((site.name, site) for site in sites)
        self._done += sum(site.out_features * site.in_features for site in sites)
        self._progress(self._done, self._total, packed.name)

    def _finished(self, group: Group) -> tuple[PackedGroup, list[PackedSite]] | None:
        return self._journal.read(group.name) if self._journal else None

    def _solve(
        self,
        group: Group,
        method: Callable[[], tuple[GroupSolution, str, int]],
        stats: Statistics | None = None,
    ) -> tuple[PackedGroup, list[PackedSite]]:
        """Run `method`, which returns a solution, what to call it and the width of its codes, and keep the result."""
        started = time.monotonic()
        solution, name, bits = method()
        packed, sites = pack_solution(group, solution, name, bits)
        packed, sites = packed.to(self._home), [site.to(self._home) for site in sites]
        damp = getattr(self._config, "damp", None)
        raised = ""
        for site in sites:
            notes: list[str] = []
            site.row["seconds"] = (time.monotonic() - started) / len(sites)
            if stats is not None and stats.tokens:
                site.row["distinct_tokens"] = stats.distinct
                if stats.distinct < group.in_features:
                    notes.append(f"{stats.distinct} distinct tokens for {group.in_features} inputs")
            if damp is not None and solution.damp > damp:
                notes.append(f"damping raised from {damp:g} to {solution.damp:g} of the mean diagonal")
                raised = notes[-1]
            if notes:
                site.row["warning"] = "; ".join(notes)
        if raised:
            warnings.warn(f"'{group.name}': {raised} (its Gram is close to singular)", stacklevel=2)
        if self._journal:
            self._journal.write(packed, sites)
        return packed, sites
