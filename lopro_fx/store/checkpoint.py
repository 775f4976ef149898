"""Save and load a program, or a calibrated state, as a folder of safetensors and JSON. Nothing is pickled.

    lopro_fx.json        format, version, what wrote it, size and SHA-256 of the other files
    tensors.safetensors  weights, packed buffers, constants ("constant:" before the name) and example inputs; each once
    program.json         the graph without tensors, in torch's own schema
    record.json          how tensors are tied, the example inputs' structure, and what was done to the program

A state has the first two and `record.json`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.errors import CheckpointError, GraphError, first_line
from lopro_fx.passes import compat
from lopro_fx.passes.calls import is_ours
from lopro_fx.passes.experts import ROUTED
from lopro_fx.passes.fit import require_fit
from lopro_fx.passes.mutation import clean_constants
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import is_quantised, marks_of, record_of, restore
from lopro_fx.passes.weights import parameter_fqns
from lopro_fx.state import QuantState
from lopro_fx.store import inputs, records, tensors
from lopro_fx.store.files import replacing, write_tensors
from lopro_fx.store.manifest import read_manifest, require_ours, write_manifest, written
from lopro_fx.store.reading import interpreting, read_json
from lopro_fx.store.vetting import foreign_operators, vet, vet_code

TENSORS, PROGRAM, RECORD = "tensors.safetensors", "program.json", "record.json"
_PROGRAM_FILES = (TENSORS, PROGRAM, RECORD)
_STATE_FILES = (TENSORS, RECORD)
_CONSTANT = "constant:"


def save(program: ExportedProgram, folder: str | Path) -> None:
    """Write a program, quantised or not, so that `load` gives it back with its record, dynamic shapes and ties.

    A non-persistent buffer that the graph writes (a KV cache) is stored as zeros. The program itself is not changed.
    Equal programs are stored as equal bytes: the seconds that a run took are left out.

    Args:
        program: what to save.
        folder: a new or empty folder, or one that lopro_fx wrote. Its files are then replaced, others in it stay.

    Raises:
        CheckpointError: the folder holds something else or can't be written (nothing is left half-written), or the
            program holds what the format can't: objects other than tensors, operators that are not registered ones.
    """
    from lopro_fx.passes import serde  # takes seconds to import

    folder = Path(folder)
    require_ours(folder)
    graph = serde.program_to_json(program)
    vet_code(graph, "the program")
    if foreign := sorted(foreign_operators(graph)):
        warnings.warn(f"the program calls {', '.join(foreign)}: it will load with trust={foreign!r} only", stacklevel=2)
    values = _values(program)
    examples = None if program.example_inputs is None else inputs.encode(program.example_inputs, values)
    unique, layout = tensors.split(values)
    record = {
        "layout": layout,
        "state_dict": list(program.state_dict),
        "constants": list(program.constants),
        "example_inputs": examples,
        "program": records.timeless(record_of(program, "save")) if is_quantised(program) else None,
        "nodes": marks_of(program),
    }
    with replacing(folder, written) as temporary:
        temporary.mkdir()
        write_tensors(temporary / TENSORS, unique, {"format": "pt"})
        _write(temporary / PROGRAM, graph)
        _write(temporary / RECORD, record)
        write_manifest(temporary, "program", _PROGRAM_FILES)


def load(folder: str | Path, *, trust: Collection[str] = ()) -> ExportedProgram:
    """Load the program that `save` wrote. Files are checked against their SHA-256, and nothing in them is executed.

    A program may call ATen's functions and lopro_fx's operators, which compute and touch nothing else.

    Args:
        folder: what `save` wrote.
        trust: operators that it may call besides, such as "mylib.op.default"; the error names them.

    Raises:
        CheckpointError: the folder is missing, foreign, damaged, of another format version, or holds a program that
            this torch can't read.
    """
    from lopro_fx.passes import serde  # takes seconds to import

    folder = Path(folder)
    manifest = read_manifest(folder, "program", _PROGRAM_FILES)
    graph, record = read_json(folder / PROGRAM, dict), read_json(folder / RECORD, dict)
    with interpreting(folder / PROGRAM):
        vet(graph, str(folder / PROGRAM), trust)
    with interpreting(folder / RECORD):
        try:
            values = tensors.join(tensors.read(folder / TENSORS), record["layout"])
            state = {name: values[name] for name in record["state_dict"]}
            prefix = _prefix(state)
            constants = {name: values[prefix + name] for name in record["constants"]}
            examples = record["example_inputs"] and inputs.decode(record["example_inputs"], values)
        except KeyError as error:
            raise CheckpointError(f"{folder / TENSORS} lacks the tensor {error}; save the program again") from error
        except RuntimeError as error:
            raise CheckpointError(f"{folder / TENSORS}: a tensor can't be placed: {first_line(error)}") from error
    try:
        program = serde.program_from_json(graph, state, constants, examples)
    except Exception as error:  # torch's reader raises anything on a schema that it doesn't know
        raise CheckpointError(
            f"{folder / PROGRAM}, written by torch {manifest['torch']}, can't be read by torch {torch.__version__} "
            f"({first_line(error)})"
        ) from error
    with interpreting(folder / RECORD):
        for row in (record["program"] or {}).get("sites", {}).values():
            torch.Size(row.get("shape", ()))
        restore(program, record["program"], record["nodes"])
        fqns = parameter_fqns(program)
        for node in program.graph.nodes:
            _require_traced(node, fqns, values)
        for node in compat.all_nodes(program.graph_module):
            if is_ours(node):
                _require_fit(node, fqns if node.graph is program.graph else None, values)
    return program


def _require_fit(node: Node, fqns: Mapping[str, str] | None, values: Mapping[str, Tensor]) -> None:
    """Require operands of one of our operators that fit each other, and indices that are some.

    `fqns`: names of stored tensors by their placeholders; None in a subgraph, whose placeholders are what it is given.
    """
    try:
        require_fit(node)
    except GraphError as error:
        raise CheckpointError(f"{error}; save the program again") from error
    call = operands(node)
    for name, operand in call.weights.items() if node.target is not ROUTED else ():
        # What is computed has the shape that the file says.
        if operand.op != "placeholder" or (fqns is not None and operand.name not in fqns):
            raise CheckpointError(f"'{node.name}' calls {node.target} with {name} that is computed, not stored")
    if fqns is None:
        return
    if (perm := call.weights.get("perm")) is not None:
        records.require_permutation(values[fqns[perm.name]], fqns[perm.name])
    if (cells := call.weights.get("cells")) is not None:
        columns, _, rank = call.up.meta["val"].shape
        lows = call.latent.meta["val"].shape[-1] if call.named.get("down") is None else call.down.meta["val"].shape[0]
        records.require_cells(values[fqns[cells.name]], lows // rank, columns, fqns[cells.name])


def _require_traced(node: Node, fqns: Mapping[str, str], values: Mapping[str, Tensor]) -> None:
    """Require that a weight has the dtype and shape that the program was traced with."""
    traced, value = node.meta.get("val"), values.get(fqns.get(node.name, ""))
    if node.op != "placeholder" or value is None or not isinstance(traced, Tensor):
        return
    if (value.dtype, tuple(value.shape)) != (traced.dtype, tuple(traced.shape)):
        raise CheckpointError(
            f"'{fqns[node.name]}' is {value.dtype} {tuple(value.shape)}, but the program reads {traced.dtype} "
            f"{tuple(traced.shape)}; save the program again"
        )


def save_state(state: QuantState, folder: str | Path) -> None:
    """Write a calibrated state; `apply` puts it into any program of the same model.

    Raises:
        CheckpointError: as `save`.
    """
    folder = Path(folder)
    require_ours(folder)
    inputs, layers = state.inputs.values(), state.layers.values()
    unique, layout = tensors.split(records.tensors_of(inputs, layers))
    record = {
        "layout": layout,
        "config": state.config,
        "skipped": state.skipped,
        "info": records.timeless(state.info),
        **records.timeless(records.describe(inputs, layers)),
    }
    with replacing(folder, written) as temporary:
        temporary.mkdir()
        write_tensors(temporary / TENSORS, unique, {"format": "pt"})
        _write(temporary / RECORD, record)
        write_manifest(temporary, "state", _STATE_FILES)


def load_state(folder: str | Path) -> QuantState:
    """Load the state that `save_state` wrote.

    Raises:
        CheckpointError: as `load`.
        ConfigError: a format isn't registered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "state", _STATE_FILES)
    record = read_json(folder / RECORD, dict)
    with interpreting(folder / RECORD):
        try:
            values = tensors.join(tensors.read(folder / TENSORS), record["layout"])
            if manifest["version"] == 2:
                record = {**records.from_version_2(record, values), "skipped": record["left"]}
            inputs, layers = records.restore(record, records.among(values))
        except KeyError as error:
            raise CheckpointError(f"{folder / TENSORS} lacks the tensor {error}; save the state again") from error
        skipped = [(name, reason) for name, reason in record["skipped"]]
        return QuantState(record["config"], inputs, layers, skipped, record["info"])


def _values(program: ExportedProgram) -> dict[str, Tensor]:
    """Collect every tensor of the program under its stored name, caches as zeros."""
    values: dict[str, Any] = dict(program.state_dict)
    prefix = _prefix(values)
    for name, value in clean_constants(program).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"constant '{name}' is a {type(value).__name__}; only tensors can be saved")
        values[prefix + name] = value
    for name, value in values.items():
        if compat.is_fake(value):
            raise CheckpointError(f"'{name}' holds no data (fake or meta tensor); export the model with real weights")
    return values


def _prefix(state: Iterable[str]) -> str:
    """Return a prefix for constants' names that no parameter's or buffer's name has."""
    prefix = _CONSTANT
    while any(name.startswith(prefix) for name in state):
        prefix = f":{prefix}"
    return prefix


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")
