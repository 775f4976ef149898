"""Registry of formats, and of the operators that each of them brings.

Schemas follow from a format's tensors and spec:

    <prefix>_linear     x, tensors, bias, latent, up, up_scale, spec
    <prefix>_site       x, perm, signs, block, skip, down, down_scale, tensors, bias, up, up_scale, spec,
                        norm, eps, gate, activation, residual
    <prefix>_experts    x, ids, slots, tensors, latent, up, up_scale, cells, core, spec
    <prefix>_experts_site
                        x, ids, slots, perm, signs, block, skip, down, down_scale, tensors, up, up_scale, cells, core,
                        spec, gate, activation
    <prefix>_embedding  ids, tensors, spec, in_features, dtype

They are composite, but what no kernel of experts takes becomes one opaque node, `<prefix>_experts_loop` with the
operands of `_experts`: which rows an expert has is known only at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels import registry
from lopro_fx.kernels.activation.reference import GROUPS
from lopro_fx.kernels.errors import ConfigError
from lopro_fx.kernels.formats import definition
from lopro_fx.kernels.formats.base import Format, Kernel, Packed

FORMATS: dict[str, Format] = {}
# Format and kind of each operator.
OPERATORS: dict[torch._ops.OpOverload, tuple[Format, str]] = {}
KINDS = ("linear", "site", "experts", "experts_site", "embedding")
_Definition = Callable[[Format, Mapping[str, Any]], Tensor]
_TYPES: dict[type, str] = {int: "int", float: "float", str: "str"}
# Names of operands that every format's operators have.
_TAKEN = frozenset(
    ("x", "perm", "signs", "block", "skip", "down", "down_scale", "bias", "latent", "up", "up_scale", "norm", "eps",
     "gate", "activation", "residual", "ids", "in_features", "dtype", "act_bits", "act_group",
     "slots", "cells", "core")
)  # fmt: skip
_AROUND = {"gate": None, "activation": ""}
_AROUND_SITE = {**_AROUND, "norm": None, "eps": 0.0, "residual": None}
_DEFAULTS = {"site": _AROUND_SITE, "experts_site": _AROUND}
_LOOP = "experts_loop"


def register_format(format: Format) -> None:
    """Add a format and define its operators.

    A program that holds them loads only where the format is registered; code compiled from it runs anywhere.

    Raises:
        ConfigError: the name is no identifier, or the format, an operator or an operand of that name exists; or a value
            of the spec is no int, float or str.
    """
    if not isinstance(format, Format):
        raise ConfigError(f"register_format({format!r}): give an object of a subclass of Format")
    if not format.name.isidentifier():
        raise ConfigError(f"format {format.name!r}: its name must be an identifier, as it is part of operators' names")
    if format.name in FORMATS:
        raise ConfigError(f"format '{format.name}' is registered already")
    empty = format.empty((5, 32), format.spec)
    first = next(iter(empty.tensors.values()), None) if isinstance(empty, Packed) else None
    if first is None or empty.format != format.name or first.dim() == 0 or first.shape[0] != 5 or not first.is_meta:
        raise ConfigError(
            f"format '{format.name}': empty((5, 32), spec) must give a Packed of this format with tensors on the meta "
            "device, of which the first has 5 rows"
        )
    own = [*format.tensor_names, *format.spec]
    for name in own:
        if name in _TAKEN or own.count(name) > 1:
            raise ConfigError(f"format '{format.name}': its tensor or number '{name}' has the name of another operand")
    names = [f"{format.prefix}_{kind}" for kind in (*KINDS, _LOOP)]
    if any(hasattr(torch.ops.lopro, name) for name in names):
        raise ConfigError(f"format '{format.name}': operators named {', '.join(names)} exist already")
    for key, value in format.spec.items():
        if type(value) not in _TYPES:
            raise ConfigError(
                f"format '{format.name}': its number '{key}' is a {type(value).__name__}, not int, float or str"
            )
    for kind in KINDS:
        _define(format, kind)
    _define_loop(format)
    FORMATS[format.name] = format
    for kind in (*KINDS, *format.operators):
        operator = operator_of(format.name, kind)
        assert operator is not None
        OPERATORS[operator] = format, kind


def format_of(packed: Packed) -> Format:
    """The format of a packed weight.

    Raises:
        ConfigError: it isn't registered.
    """
    return known_format(packed.format)


def rounding_operands(operator: torch._ops.OpOverload, own: int, group: int) -> dict[str, int] | None:
    """Operand by which an operator for CPUs rounds groups of `group` columns, where it rounds `own` of itself.

    None if it can't: it takes no `act_group`, or not this one.
    """
    takes = any(argument.name == "act_group" for argument in operator._schema.arguments)
    if group == own:
        return {"act_group": 0} if takes else {}
    return {"act_group": group} if takes and group in GROUPS else None


def known_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: it isn't registered.
    """
    if name not in FORMATS:
        raise ConfigError(
            f"format '{name}' is not known (known: {', '.join(FORMATS)}): import what registers it, by register_format"
        )
    return FORMATS[name]


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Dequantise a packed weight to `dtype`, of its shape."""
    if packed.experts:
        return torch.stack([dequantize(packed.expert(index), dtype) for index in range(packed.experts)])
    return format_of(packed).dequantize(packed, dtype)


def empty(format: str, shape: tuple[int, ...], spec: Mapping[str, Any]) -> Packed:
    """Tensors of a packed weight, or of experts, on the meta device; see `Format.empty`.

    Raises:
        ConfigError: the format isn't registered.
    """
    single = known_format(format).empty(shape[-2:], spec)
    if len(shape) == 2:
        return single
    return replace(single, shape=tuple(shape), tensors={
        name: tensor.new_empty(shape[0], *tensor.shape) for name, tensor in single.tensors.items()
    })  # fmt: skip


@functools.cache
def operator_of(format: str, kind: str) -> Any:
    """The operator of a format by its kind, one of `KINDS` or of the format's own; None if it has none."""
    owner = known_format(format)
    name = f"{owner.prefix}_{kind}" if kind in KINDS else owner.operators.get(kind)
    return None if name is None else getattr(torch.ops.lopro, name).default


def reference(format: str, kind: str) -> Callable[..., Tensor]:
    """The definition of `operator_of(format, kind)`, with the same operands and no faster kernels."""
    operator, owner = operator_of(format, kind), known_format(format)
    names = [argument.name for argument in operator._schema.arguments]
    return _implementation(owner, kind, names, (), getattr(definition, kind))


def _define(format: Format, kind: str) -> None:
    operands = _operands(format, kind)
    kernels = [kernel for kernel in format.kernels() if kernel.operator == kind]
    defined: _Definition = getattr(definition, kind)
    if kind == "experts":
        defined = _loop
    elif kind == "experts_site":
        defined = functools.partial(definition.experts_site, product=_experts)
    schema = f"{format.prefix}_{kind}({', '.join(operands)}) -> Tensor"
    registry.register(schema, _implementation(format, kind, _names(operands), kernels, defined))


def _define_loop(format: Format) -> None:
    operands = _operands(format, "experts")
    names = _names(operands)

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        return named["x"].new_empty(named["ids"].shape[0], named[format.tensor_names[0]].shape[1])

    schema = f"{format.prefix}_{_LOOP}({', '.join(operands)}) -> Tensor"
    registry.register_opaque(schema, _implementation(format, "experts", names, (), definition.experts), fake)


def _experts(format: Format, named: Mapping[str, Any]) -> Tensor:
    return _call(operator_of(format.name, "experts"), named)


def _loop(format: Format, named: Mapping[str, Any]) -> Tensor:
    return _call(getattr(torch.ops.lopro, f"{format.prefix}_{_LOOP}").default, named)


def _call(operator: Any, named: Mapping[str, Any]) -> Tensor:
    return operator(*(named[argument.name] for argument in operator._schema.arguments))


def _names(operands: Sequence[str]) -> list[str]:
    return [operand.split()[1].partition("=")[0] for operand in operands]


def _operands(format: Format, kind: str) -> list[str]:
    """Operands of an operator, as its schema declares them."""
    weight = [f"Tensor {name}" for name in format.tensor_names]
    spec = [f"{_TYPES[type(value)]} {name}" for name, value in format.spec.items()]
    if kind == "linear":
        operands = ["Tensor x", *weight, "Tensor? bias", "Tensor? latent", "Tensor? up", "Tensor? up_scale", *spec]
    elif kind == "site":
        operands = [
            "Tensor x", "Tensor? perm", "Tensor? signs", "int block", "int skip", "Tensor? down", "Tensor? down_scale",
            *weight, "Tensor? bias", "Tensor? up", "Tensor? up_scale", *spec,
            "Tensor? norm=None", "float eps=0.0", "Tensor? gate=None", 'str activation=""', "Tensor? residual=None",
        ]  # fmt: skip
    elif kind == "experts_site":
        operands = [
            "Tensor x", "Tensor ids", "int slots", "Tensor? perm", "Tensor? signs", "int block", "int skip",
            "Tensor? down", "Tensor? down_scale", *weight, "Tensor? up", "Tensor? up_scale", "Tensor? cells",
            "Tensor? core", *spec, "Tensor? gate=None", 'str activation=""',
        ]  # fmt: skip
    elif kind == "experts":
        operands = [
            "Tensor x", "Tensor ids", "int slots", *weight, "Tensor? latent", "Tensor? up", "Tensor? up_scale",
            "Tensor? cells", "Tensor? core", *spec,
        ]  # fmt: skip
    else:
        operands = ["Tensor ids", *weight, *spec, "int in_features", "ScalarType dtype"]
    return operands


def _implementation(
    format: Format,
    kind: str,
    names: Sequence[str],
    kernels: Sequence[Kernel],
    defined: _Definition,
) -> Callable[..., Tensor]:
    """Run the first kernel that takes the operands, else the definition."""
    defaults: Mapping[str, Any] = _DEFAULTS.get(kind, {})

    def run(*args: Any, **kwargs: Any) -> Tensor:
        named = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        for kernel in kernels:
            if kernel.refuses(named) is None:
                return kernel.run(**named)
        return defined(format, named)

    return run
