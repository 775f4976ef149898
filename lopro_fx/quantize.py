"""Find, calibrate, solve and rewrite, on one page; `store/`, `packages/` and `generation/` deliver the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx import __about__
from lopro_fx.budget import Budget
from lopro_fx.calibration.batches import flatten_batches
from lopro_fx.calibration.importance import Importance, importance_of
from lopro_fx.calibration.replay import Replay, Stage
from lopro_fx.devices import available, full_precision, home_of
from lopro_fx.errors import CalibrationError, ConfigError, LoProError, first_line
from lopro_fx.kernels.formats.registry import format_of
from lopro_fx.layer import Activation, Input, Layer, stored_bytes
from lopro_fx.methods.base import Context, Method, Solved, Unit, seed_of
from lopro_fx.methods.experts import solve_experts
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.rounding import Rounding, pack_solution
from lopro_fx.methods.rtn import RTN, head_method, solve_data_free
from lopro_fx.methods.verify import verified
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.record import Record, require_program
from lopro_fx.passes.rewrite import RewritePass
from lopro_fx.passes.sites import Group, Selection, weight_of
from lopro_fx.plan import plannable, planned, require_possible
from lopro_fx.progress import Progress, bar
from lopro_fx.selection import require_finite, select, warn_of_lost, warn_of_patterns
from lopro_fx.state import QuantState
from lopro_fx.store.journal import Journal


def quantize(
    program: ExportedProgram,
    calibration: Iterable[Any] | None = None,
    config: Method | None = None,
    *,
    budget: Budget | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> ExportedProgram:
    """Quantise every Linear of an exported program: `apply(program, calibrate(program, ...))`.

    Args:
        program: from `torch.export.export`, not decomposed. It is not changed.
        calibration: batches, each a tensor, a tuple of positional inputs, a dict of keyword inputs or an (args, kwargs)
            pair; None quantises without data and warns.
        config: `LoPRo` (default), `FLRQ`, `GPTQ`, `RTN`, or another method.
        budget: size of all packed tensors, or divergence from the unquantised model; bits, group size and format of
            every Linear are then chosen for it, see `plan`.
        resume: folder that keeps each finished unit, so that a stopped run continues there.
        progress: called as (done, total, label); by default a bar on a terminal.
        device: where to measure and solve; by default the device of the program's tensors. They stay there: each weight
            is copied for the layer that reads it, and the packed tensors are put on the program's device.

    Returns:
        A new ExportedProgram whose Linears are `lopro::rotate`, `lopro::project` and `lopro::packed_linear` nodes, or
        the linear operator of another format. With `head_bits`, a tied embedding is `lopro::packed_embedding`.

    Raises:
        ConfigError: torch can't compute on `device`, or `budget` can't be met.
        GraphError: no Linear to quantise, or a weight holds NaN or infinity in fp32.
        CalibrationError: a batch doesn't fit the program, or an activation is not finite.
        CheckpointError: `resume` holds another run, or can't be written.
    """
    state = calibrate(program, calibration, config, budget=budget, resume=resume, progress=progress, device=device)
    return apply(program, state)


# Tensors of inference mode can't take part in a gradient, neither here nor where the state is used.
@torch.inference_mode(False)
def calibrate(
    program: ExportedProgram,
    calibration: Iterable[Any] | None = None,
    config: Method | None = None,
    *,
    budget: Budget | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> QuantState:
    """Find the quantised form of every Linear; arguments and errors as in `quantize`."""
    require_program(program)
    config = LoPRo() if config is None else config
    if not isinstance(config, Method):
        raise ConfigError(f"config={config!r}: give a method, such as RTN(...), GPTQ(...), FLRQ(...) or LoPRo(...)")
    place, home = home_of(program) if device is None else available(device), home_of(program)
    program = as_linears(program)
    method = None if budget is None else plannable(config, budget, calibration)
    selection = select(program, config)
    if budget is not None and method is not None:
        require_possible(selection, method, budget)
    warn_of_patterns(selection, config)
    warn_of_lost(selection)
    settings = _settings(selection, config)
    require_finite(program, selection)
    batches = None if calibration is None else flatten_batches(program, calibration, place)
    if batches is None and config.needs_data and config.observers():
        warnings.warn(
            f"{type(config).__name__} without calibration is data-free: every input direction counts the same, which "
            "costs accuracy; pass batches of real text",
            stacklevel=3,
        )
    started = time.monotonic()
    journal = Journal(resume, program, config, batches, budget) if resume else None
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        result = _Result(selection, progress or stack.enter_context(bar("quantise")))
        importance, figures = importance_of(program, selection, batches, config, result.progress, place), None
        if budget is not None and method is not None and batches is not None:
            config, figures = _planned(
                program, selection, batches, method, budget, importance, journal, result.progress, place
            )
            settings = _settings(selection, config)
        replay = Replay(program, selection.groups, batches, config, importance, place)
        if config.learns and batches is not None and selection.groups:
            _solve_blocks(replay, _Run(config, settings, journal, place, home), result)
        else:
            _solve_units(replay, _Run(config, settings, journal, place, home), result)
        for head in selection.heads:
            solved = journal and journal.read(head.name)
            if solved is None:
                solved = _at_home(_round_head(head, weight_of(program, head.sites[0]).to(place), config), home)
                if journal:
                    journal.write(solved)
            result.add(solved)
    if batches is not None and selection.groups and not result.tokens and config.needs_data:
        warnings.warn("the calibration holds no token: the result is data-free, as without it", stacklevel=3)
    if config.needs_data:
        result.warn_of_few_tokens()
    info = {
        "lopro_fx": __about__.__version__,
        "torch": torch.__version__,
        "calibration_tokens": result.tokens,
        "seconds": time.monotonic() - started,
    }
    if figures is not None:
        info["plan"] = figures
    skipped = [(item.name, item.reason) for item in selection.skipped]
    return QuantState(config.to_dict(), result.inputs, result.layers, skipped, info)


def apply(program: ExportedProgram, state: QuantState) -> ExportedProgram:
    """Rewrite `program` with a calibrated state; it may be any program of the same model, e.g. the one for decoding.

    Raises:
        GraphError: the program lacks a calibrated Linear, or its shape differs.
    """
    require_program(program)
    record = Record(
        config=state.config,
        left=state.skipped,
        info=state.info,
        # The record repeats the facts of the tensors: a state that was made by hand has no metrics.
        sites={name: {**layer.metrics, **layer.facts} for name, layer in state.layers.items()},
        groups={name: list(shared.readers) for name, shared in state.inputs.items()},
    )
    return RewritePass(state.inputs, state.layers, record)(as_linears(program))


@dataclass(frozen=True)
class _Run:
    """Method of the run and of each unit, what is finished, where units are solved, and where their tensors belong."""

    config: Method
    settings: Mapping[str, Method]
    journal: Journal | None
    place: torch.device
    home: torch.device

    def solve(self, unit: Unit, seen: Statistics) -> Solved:
        return _solve(unit, seen, self.settings[unit.name], self.place)


def _solve_units(replay: Replay, run: _Run, result: _Result) -> None:
    for unit, seen in replay.units():
        solved = run.journal and run.journal.read(unit.name)
        if solved is None:
            solved = _at_home(run.solve(unit, seen), run.home)
            if run.journal:
                run.journal.write(solved)
        result.add(solved, seen)
        replay.install(solved)


def _solve_blocks(replay: Replay, run: _Run, result: _Result) -> None:
    """Solve the units of each block, and let the method learn from the block's output; a block is finished as one."""
    for stage in replay.stages():
        known = [run.journal.read(group.name) for group in stage.block.groups] if run.journal else []
        finished = [solved for solved in known if solved is not None]
        if len(finished) < len(stage.block.groups):
            finished = []
        every = []
        for unit, seen in stage.units:
            solved = finished[len(every)] if finished else run.solve(unit, seen)
            stage.solved.append((unit, solved))
            every.append(seen)
            replay.install(solved)
        if not finished and stage.block.outputs:
            stage.solved[:] = _learnt(stage, run.config, result, run.place)
        for (_, solved), seen in zip(stage.solved, every, strict=True):
            solved = _at_home(solved, run.home)
            if run.journal and not finished:
                run.journal.write(solved)
            result.add(solved, seen)


def _learnt(stage: Stage, config: Method, result: _Result, place: torch.device) -> list[tuple[Unit, Solved]]:
    """What the method makes of a block's solutions; the time it takes is its layers' in equal parts."""
    name, started = stage.block.name, time.monotonic()
    generator = torch.Generator().manual_seed(seed_of(name, config.seed))
    # Errors of the caller's own progress function, which are none of the method.
    foreign: list[Exception] = []

    def label(text: str) -> None:
        try:
            result.label(text)
        except Exception as error:
            foreign.append(error)
            raise

    try:
        found = config.learn(stage.learnable(), Context(place, generator), label)
    except (LoProError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if error in foreign:
            raise
        known = f"method '{config.name}' failed on block '{name}'"
        raise CalibrationError(f"{known}: {type(error).__name__}: {first_line(error)}") from error
    layers = sum(len(solved.layers) for solved in found)
    seconds, learnt = (time.monotonic() - started) / layers, []
    for (unit, before), solved in zip(stage.solved, found, strict=True):
        solved = verified(config.name, unit, solved)
        timed = [
            replace(layer, metrics={**layer.metrics, "seconds": old.metrics["seconds"] + seconds})
            for layer, old in zip(solved.layers, before.layers, strict=True)
        ]
        learnt.append((unit, replace(solved, layers=tuple(timed))))
    return learnt


def _settings(selection: Selection, config: Method) -> dict[str, Method]:
    """The method of each unit, with its overrides."""
    return {group.name: config.for_unit([site.name for site in group.sites]) for group in selection.groups}


def _planned(
    program: ExportedProgram,
    selection: Selection,
    batches: Sequence[Sequence[Any]],
    method: Rounding,
    budget: Budget,
    importance: Mapping[str, Importance] | None,
    journal: Journal | None,
    progress: Progress,
    place: torch.device,
) -> tuple[Method, dict[str, Any]]:
    """Return the method with a plan's overrides, and the plan's figures; a run that continues follows the plan that it
    began with."""
    found = journal.read_plan() if journal else None
    if found is None:
        try:
            plan = planned(program, selection, batches, method, budget, importance, progress, place)
            found = dict(plan.method.overrides), plan.figures
        except LoProError:
            if journal:
                journal.discard()
            raise
        if journal:
            journal.write_plan(*found)
    return replace(method, overrides=found[0]), found[1]


def _solve(unit: Unit, seen: Statistics, config: Method, place: torch.device) -> Solved:
    """Solve a unit, and complete its layers' metrics for the report."""
    # One generator a unit: with a shared one, the result would depend on units resumed or excluded before it.
    generator = torch.Generator().manual_seed(seed_of(unit.name, config.seed))
    started = time.monotonic()
    try:
        context = Context(place, generator)
        found = solve_experts(config, unit, seen, context) if unit.experts else config.solve(unit, seen, context)
    except (LoProError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        known = f"method '{config.name}' failed on unit '{unit.name}'"
        raise CalibrationError(f"{known}: {type(error).__name__}: {first_line(error)}") from error
    solved = _rounding(verified(config.name, unit, found), config)
    notes, known = [], {}
    if seen.tokens:
        known["distinct_tokens"] = seen.distinct
        if seen.experts:
            known["expert_tokens"] = routed = [own.routed for own in seen.experts]
            few = sum(tokens < unit.in_features for tokens in routed)
            if few:
                notes.append(f"{few} of {len(routed)} experts have fewer tokens than {unit.in_features} inputs")
        if seen.distinct < unit.in_features:
            notes.append(f"{seen.distinct} distinct tokens for {unit.in_features} inputs")
    damp, used = getattr(config, "damp", None), max(layer.metrics.get("damp", 0.0) for layer in solved.layers)
    if damp is not None and used > damp:
        notes.append(f"damping raised from {damp:g} to {used:g} of the mean diagonal")
        warnings.warn(f"'{unit.name}': {notes[-1]} (its Gram is close to singular)", stacklevel=3)
    if notes:
        known["warning"] = "; ".join(notes)
    return _reported(solved, config.name, started, known)


def _rounding(solved: Solved, config: Method) -> Solved:
    """Set the configuration's activation rounding, unless the method has chosen one."""
    shared = solved.input
    if not config.act_bits or shared.activation is not None:
        return solved
    rotated = shared.transform.block > 1
    fitting = min(format_of(layer.weight).activation_group(layer.weight, rotated) for layer in solved.layers)
    activation = Activation(config.act_bits, config.act_group or fitting)
    return replace(solved, input=replace(shared, activation=activation))


def _round_head(head: Group, weight: Tensor, config: Method) -> Solved:
    """Round an output projection to nearest; the embeddings that share its weight will read it too."""
    started = time.monotonic()
    rtn = head_method(config)
    unit = Unit(head.name, tuple(site.name for site in head.sites), [weight])
    solved = pack_solution(unit, solve_data_free(weight, rtn.quantizer))
    layers = tuple(replace(layer, embedding=True) for layer in solved.layers)
    return _reported(replace(solved, layers=layers), RTN.name, started, {})


def _reported(solved: Solved, method: str, started: float, known: Mapping[str, Any]) -> Solved:
    """Add the method, time and facts of the tensors to the layers' `metrics`."""
    rows = sum(layer.out_features for layer in solved.layers)
    shared, layers = stored_bytes(solved.input.tensors.values()), []
    for layer in solved.layers:
        size = stored_bytes(layer.tensors.values()) + shared * layer.out_features / rows
        metrics = {
            **layer.metrics,
            "method": method,
            **layer.facts,
            "bits_per_weight": 8 * size / layer.weights,
            "seconds": (time.monotonic() - started) / len(solved.layers),
            **known,
        }
        layers.append(replace(layer, metrics=metrics))
    return replace(solved, layers=tuple(layers))


def _at_home(solved: Solved, home: torch.device) -> Solved:
    """Move the result's tensors to the program's device."""

    def bring(tensor: Tensor) -> Tensor:
        return tensor.to(home)

    return Solved(solved.input.map(bring), tuple(layer.map(bring) for layer in solved.layers))


class _Result:
    """Inputs and layers so far, their progress, and the units with too few calibration tokens."""

    def __init__(self, selection: Selection, progress: Progress) -> None:
        self.inputs: dict[str, Input] = {}
        self.layers: dict[str, Layer] = {}
        self.tokens = 0
        self.progress = progress
        # Distinct tokens and inputs of the units with fewer tokens than inputs, by name.
        self._few: dict[str, tuple[int, int]] = {}
        self._total = sum(site.weights for site in selection.sites)
        self._done = 0
        progress(0, self._total, "")

    def label(self, text: str) -> None:
        """Say what is being done now."""
        self.progress(self._done, self._total, text)

    def add(self, solved: Solved, seen: Statistics | None = None) -> None:
        self.inputs[solved.input.name] = solved.input
        self.layers.update((layer.name, layer) for layer in solved.layers)
        if seen is not None:
            self.tokens = max(self.tokens, seen.tokens)
            if seen.tokens and seen.distinct < solved.input.in_features:
                self._few[solved.input.name] = seen.distinct, solved.input.in_features
        self._done += sum(layer.weights for layer in solved.layers)
        self.progress(self._done, self._total, solved.input.name)

    def warn_of_few_tokens(self) -> None:
        """Say once which units were calibrated on fewer distinct tokens than they have inputs."""
        if not self._few:
            return
        name, (distinct, width) = min(self._few.items(), key=lambda item: item[1][0] / item[1][1])
        warnings.warn(
            f"calibration holds few tokens for the width of {len(self._few)} of {len(self.inputs)} groups of layers: "
            f"'{name}' has {width} inputs and saw {distinct} distinct tokens; what was not seen is rounded as without "
            f"data. Calibrate on real text of {4 * width} tokens or more",
            stacklevel=4,
        )
