"""Every private torch call of the project, with the versions that it was tried on.

Tried on torch 2.13.0. When a name moves, this is the only file to change.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._export.serde import schema, serialize
from torch._export.serde.union import _Union as TaggedUnion
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import GraphModule, Node


def rebuild(
    program: ExportedProgram,
    graph_module: GraphModule,
    signature: ExportGraphSignature,
    state_dict: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> ExportedProgram:
    """A new, validated program around an edited graph (`ExportedProgram._update`, used by torch's own passes)."""
    return program._update(graph_module, signature, state_dict=dict(state_dict), constants=dict(constants))


def fake_mode(program: ExportedProgram) -> FakeTensorMode:
    """The mode that the program's placeholder values live in; new nodes must use the same one."""
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if "val" in node.meta]
    return detect_fake_mode(values) or FakeTensorMode(allow_non_fake_inputs=True)


def fake_input(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Fake twin of a constant, every dimension static."""
    return mode.from_tensor(tensor, static_shapes=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no data."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def is_mutable(target: Any) -> bool:
    """Whether an operator writes one of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def written_operands(node: Node) -> list[Node]:
    """Operands that a call writes in place."""
    return [value for argument, value in _bound(node) if argument.alias_info and argument.alias_info.is_write]


def viewed_operand(node: Node) -> Node | None:
    """The operand whose storage a call returns, or None if the result is its own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    shared = {name for result in node.target._schema.returns if result.alias_info
              for name in result.alias_info.before_set}  # fmt: skip
    for argument, value in _bound(node):
        if argument.alias_info and shared & set(argument.alias_info.before_set):
            return value
    return None


def _bound(node: Node) -> list[tuple[Any, Node]]:
    """(schema argument, node) for every operand that is a single node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    values = [*zip(arguments, node.args, strict=False), *((a, node.kwargs[a.name]) for a in arguments
                                                          if a.name in node.kwargs)]  # fmt: skip
    return [(argument, value) for argument, value in values if isinstance(value, Node)]


def program_to_json(program: ExportedProgram) -> dict[str, Any]:
    """The program without tensors, in torch's own JSON schema (what `torch.export.save` stores)."""
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
    return reader.deserialize(serialized, dict(state_dict), dict(constants), example_inputs)


def _from_json(kind: Any, value: Any) -> Any:
    """`serialize._dict_to_dataclass`, which resolves the same annotations for every object, in a fifth of its time."""
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


def aot_compile(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], options: Mapping[str, Any]
) -> list[Any]:
    """AOTInductor's files for a package; options that this torch doesn't have are left out."""
    from torch import _inductor
    from torch._inductor import config

    known = config.get_config_copy()
    module = program.module(check_guards=False)
    files = _inductor.aot_compile(module, args, kwargs, options={k: v for k, v in options.items() if k in known})
    assert isinstance(files, list)
    return files


def write_package(path: str, files: list[Any]) -> None:
    """A `.pt2` archive of AOTInductor's files."""
    from torch._inductor.package import package_aoti

    package_aoti(path, files)
