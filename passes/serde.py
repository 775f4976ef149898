"""An ExportedProgram as JSON, by torch's own (private) serialiser; tried on torch 2.13.0.

Kept apart from `compat.py`: importing the serialiser takes as long as importing torch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from urllib.parse import unquote

from torch._export.serde import schema, serialize
from torch._export.serde.union import _Union as TaggedUnion
from torch.export import ExportedProgram

from lopro_fx.passes import compat


def program_to_json(program: ExportedProgram) -> dict[str, Any]:
    """The program without tensors, in torch's own JSON schema (what `torch.export.save` stores)."""
    program = _with_stacks(program, _quoted)
    serializer = serialize.ExportedProgramSerializer()
    # Each of these would pickle what it names; they are separate arguments since torch 2.10.
    known = inspect.signature(serializer.serialize).parameters
    skipped = ("serialize_state_dict", "serialize_constants", "serialize_example_inputs")
    serialized = serializer.serialize(program, **{name: False for name in skipped if name in known})
    return json.loads(serialize._to_json_bytes(serialized.exported_program))


def program_from_json(
    value: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    constants: Mapping[str, Any],
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> ExportedProgram:
    """Inverse of `program_to_json`. It evaluates expressions and resolves names: check untrusted values first."""
    serialized = _from_json(schema.ExportedProgram, value)
    reader = serialize.ExportedProgramDeserializer()
    program = reader.deserialize(serialized, dict(state_dict), dict(constants), example_inputs)
    for node in compat.all_nodes(program.graph_module):
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = _renamed(node.meta["nn_module_stack"], unquote)
    return program


def _with_stacks(program: ExportedProgram, rename: Callable[[str], str]) -> ExportedProgram:
    """Rename modules in `nn_module_stack`; return `program` itself where that changes nothing.

    torch joins module names by commas and semicolons, and counts brackets to split them again. Quotes, backslashes and
    line ends are replaced too: names in a file should hold none.
    """
    stacks = [node.meta.get("nn_module_stack", {}) for node in compat.all_nodes(program.graph_module)]
    if all(_renamed(stack, rename) == stack for stack in stacks):
        return program
    graph_module = compat.copied(program.graph_module)
    for node in compat.all_nodes(graph_module):
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = _renamed(node.meta["nn_module_stack"], rename)
    signature, state, constants = program.graph_signature, program.state_dict, program.constants
    return compat.rebuild(program, graph_module, signature, state, constants)


def _renamed(stack: Mapping[str, tuple[str, Any]], rename: Callable[[str], str]) -> dict[str, tuple[str, Any]]:
    return {rename(key): (rename(path), kind) for key, (path, kind) in stack.items()}


def _quoted(name: str) -> str:
    return re.sub(r'[%,;()\[\]"\\\n\r]', lambda found: f"%{ord(found[0]):02X}", name)


def _from_json(kind: Any, value: Any) -> Any:
    """`serialize._dict_to_dataclass` in a fifth of its time: annotations are resolved once a class, not an object."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _from_json(next(part for part in parts if part is not type(None)), value)
    if origin is list:
        return [_from_json(parts[0], item) for item in value]
    if origin is dict:
        return {key: _from_json(parts[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, TaggedUnion):
        ((tag, item),) = value.items()
        return kind.create(**{tag: _from_json(_fields(kind)[tag], item)})
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**{name: _from_json(hint, value[name]) for name, hint in _fields(kind).items() if name in value})
    return float(value) if kind is float else value


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, globalns=dict(vars(schema)))
