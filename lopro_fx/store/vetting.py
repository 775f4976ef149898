"""Checks a serialised program before torch reads it, because torch's reader evaluates what the file says.

It passes shape expressions to `sympify` (an `eval`) and compiles guards and node names into Python source. It imports
the module of an enum or default factory in an input structure, and resolves a node's target to any attribute of
`torch`. Each of these is checked here against the little that an exported program needs, and operators against those
that a model is computed with (`operators`).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from lopro_fx.errors import CheckpointError
from lopro_fx.store.operators import is_allowed

_NAME = re.compile(r"\w*")
# Versions, dialects, numbers.
_WORDS = re.compile(r"[\w.+\- ]*")
_UNQUOTED = re.compile(r"[^\"\\\n\r]*")
# Keys of fully qualified names, whose parts may hold any character.
_FQNS = ("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn")
_OPERATOR = re.compile(r"torch\.ops\.\w+(\.\w+){1,2}")
_FUNCTION = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|getitem)"
    r"|math\.(trunc|floor|ceil|sqrt)|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
# Literals of the graph, kept as Python values and quoted in generated source; and metadata, which stays text.
_TEXT = ("as_string", "as_strings", "metadata")
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop,
               ast.cmpop, ast.Load, ast.Call, ast.keyword)  # fmt: skip
_SYMPY = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Mod|Max|Min|Abs|floor|ceiling|And|Or|Not|Piecewise|ExprCondPair|Tuple"
    r"|Equality|Unequality|Eq|Ne|Lt|Le|Gt|Ge|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan|true|false|oo|int_oo"
    r"|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural"
    r"|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt"
    r"|RoundDecimal|ToFloat|Identity"
)
_GUARD = re.compile(r"L|max|min|abs|IsNonOverlappingAndDenseIndicator")
# Functions of these grow without measure: a tower of powers takes for ever.
_POWERS = ("Pow", "PowByNatural", "FloatPow", "LShift")
_MOST_POWER, _LONGEST = 64, 1000
# Operations of an expression, and those of them that torch compares with each other for minutes.
_MOST_OPERATIONS, _MOST_EXTREMES = 200, 6
_GUARD_METHOD = re.compile(r"size|stride|storage_offset|dim")


class _Refused(ValueError):
    """Refusal of a program; the text names what was found."""


def vet(program: Mapping[str, Any], source: str, trust: Collection[str] = ()) -> None:
    """Refuse a program that could make torch run anything but operators of a model.

    Args:
        program: result of `serde.program_to_json`.
        source: its name in an error.
        trust: operators that are allowed besides, such as "mylib.op.default".

    Raises:
        CheckpointError: says what was found.
    """
    unknown = sorted(foreign_operators(program) - set(trust))
    if unknown:
        raise CheckpointError(
            f"{source} calls {', '.join(unknown)}, which models are not computed with; if you trust who made it, load "
            f"it with trust={unknown!r}"
        )
    vet_code(program, source)


def foreign_operators(program: Mapping[str, Any]) -> set[str]:
    """Registered operators that the program calls and a file must be trusted with, such as "mylib.op.default"."""
    return {name.removeprefix("torch.ops.") for name in _targets(program)
            if (operator := _operator(name)) is not None and not is_allowed(operator)}  # fmt: skip


def vet_code(program: Mapping[str, Any], source: str) -> None:
    """Refuse a program that could make torch run anything but registered operators.

    Raises:
        CheckpointError: says what was found.
    """
    try:
        for key, value in program.items():
            if key == "guards_code":
                for guard in value:
                    _guard(guard)
            else:
                _walk(value, key)
    except (_Refused, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} holds what lopro_fx neither saves nor loads: {error}") from error


def _walk(value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _match(_WORDS, name, "key")
            if name == "metadata":
                _match(_UNQUOTED, item.get("nn_module_stack", ""), "module stack")
            elif name not in _TEXT:
                _walk(item, name)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key)
    elif isinstance(value, str):
        _text(value, key)


def _text(value: str, key: str) -> None:
    if key in ("target", "as_operator"):
        _target(value)
    elif key in _FQNS:
        _fqn(value, key)
    elif key == "expr_str":
        _shape(value)
    elif key in ("in_spec", "out_spec"):
        _structure(value)
    else:
        _match(_NAME if key in ("name", "as_name", "forward_arg_names") else _WORDS, value, key)


def _match(pattern: re.Pattern[str], value: str, what: str) -> None:
    if not pattern.fullmatch(value):
        raise _Refused(f"the {what} {value[:80]!r}")


def _fqn(value: str, what: str) -> None:
    """Allow only parts that mean themselves between double quotes, as torch puts them into source."""
    for part in value.split("."):
        if not _WORDS.fullmatch(part):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of backslashes that are no escapes
                    literal = ast.literal_eval(f'"{part}"')
            except (SyntaxError, ValueError):
                literal = None
            if literal != part:
                raise _Refused(f"the {what} {value[:80]!r}")


def _target(value: str) -> None:
    if _FUNCTION.fullmatch(value):
        return
    _match(_OPERATOR, value, "function")
    if _operator(value) is None:
        raise _Refused(f"{value}, which is not a registered operator (import the package that defines it first)")


def _operator(value: str) -> OpOverload | HigherOrderOperator | None:
    """Find the registered operator that a target names."""
    if not _OPERATOR.fullmatch(value):
        return None
    target: Any = torch.ops
    for part in value.split(".")[2:]:
        target = getattr(target, part, None)
    return target if isinstance(target, (OpOverload, HigherOrderOperator)) else None


def _targets(value: Any, key: str = "") -> Iterator[str]:
    """Every text that `_text` takes for a target."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _TEXT:
                yield from _targets(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _targets(item, key)
    elif isinstance(value, str) and key in ("target", "as_operator"):
        yield value


def _shape(value: str) -> None:
    """Allow only sympy's constructors, as `srepr` writes them."""
    _expression(value, "shape expression", _ARITHMETIC, _SYMPY)


def _guard(value: str) -> None:
    """Allow only comparisons of input sizes, such as `L['x'].size()[0] % 2 == 0`."""
    _expression(value, "guard", (*_ARITHMETIC, ast.Subscript), _GUARD)


def _expression(value: str, what: str, syntax: tuple[type[ast.AST], ...], names: re.Pattern[str]) -> None:
    try:
        nodes = list(ast.walk(ast.parse(value, mode="eval")))
    except (SyntaxError, ValueError, MemoryError) as error:
        raise _Refused(f"the {what} {value[:80]!r}") from error
    calls = [node for node in nodes if isinstance(node, (ast.Call, ast.BinOp, ast.BoolOp, ast.Compare))]
    extremes = [node for node in nodes if isinstance(node, ast.Name) and node.id in ("Max", "Min")]
    if len(calls) > _MOST_OPERATIONS or len(extremes) > _MOST_EXTREMES:
        raise _Refused(f"the {what} {value[:80]!r} of {len(calls)} operations")
    for node in nodes:
        if isinstance(node, ast.Name):
            fine = names.fullmatch(node.id)
        elif isinstance(node, ast.Attribute):
            fine = what == "guard" and _GUARD_METHOD.fullmatch(node.attr)
        elif isinstance(node, ast.Constant):
            fine = _WORDS.fullmatch(str(node.value)) and len(str(node.value)) <= _LONGEST
        else:
            fine = isinstance(node, syntax) and _is_small(node)
        if not fine:
            raise _Refused(f"the {what} {value[:80]!r}")


def _is_small(node: ast.AST) -> bool:
    """Whether it is no power, or one that can be computed: of no other power, by a small number."""
    power = _power(node)
    if power is None:
        return True
    _, exponent = power
    numbers = [part.value for part in ast.walk(exponent) if isinstance(part, ast.Constant)]
    if len(numbers) != 1 or type(numbers[0]) is not int or numbers[0] > _MOST_POWER:
        return False
    others = (part for side in power for part in ast.walk(side))
    return not any(_power(part) for part in others) and not any(isinstance(part, ast.Name) and part.id == "Symbol"
                                                                for part in ast.walk(exponent))  # fmt: skip


def _power(node: ast.AST) -> tuple[ast.AST, ast.AST] | None:
    """Base and exponent of a power or a left shift."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
        return node.left, node.right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS:
        return (node.args[0], node.args[1]) if len(node.args) == 2 else (node, node)
    return None


def _structure(value: str) -> None:
    """Allow only a pytree of containers that torch knows, without the name of a module to import."""
    try:
        _, spec = json.loads(value)
        _container(spec)
    except (ValueError, KeyError) as error:
        raise _Refused(f"the input structure {value[:80]!r}") from error


def _container(spec: Mapping[str, Any]) -> None:
    if spec["type"] == "collections.defaultdict":
        raise _Refused("a defaultdict")
    context = spec["context"]
    # torch dumps a context to JSON within the JSON, except a namedtuple's, which is its name.
    is_json = isinstance(context, str) and spec["type"] != "collections.namedtuple"
    for key in _leaves(json.loads(context) if is_json else context):
        _match(_WORDS, key, "key")
    for child in spec["children_spec"]:
        _container(child)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        raise _Refused("an enum among the keys of an input")
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield str(value)
