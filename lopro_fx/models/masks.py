"""Check that the attention of an exported program reads its masks in the form that they have.

A mask is boolean, or a number that is added to the scores; the model's attention decides which. The wrong form, a
boolean that is added or a number that is read as a boolean, gives wrong text and no error. The graph shows what
happens, so masks are followed from where they are made to the softmax.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.inline import InlineModesPass


class Form(Enum):
    """Form of a mask."""

    VISIBLE = "a boolean mask that is True where a query may look"
    HIDDEN = "a boolean mask that is True where a query may not look"
    ONES = "a mask of 1 where a query may look and 0 elsewhere"
    ZEROS = "a mask of 0 where a query may look and 1 elsewhere"
    ADDED = "a mask that is very negative where a query may not look"


_OPPOSITE = {Form.VISIBLE: Form.HIDDEN, Form.HIDDEN: Form.VISIBLE, Form.ONES: Form.ZEROS, Form.ZEROS: Form.ONES}
_AS_NUMBER = {Form.VISIBLE: Form.ONES, Form.HIDDEN: Form.ZEROS}
_AS_BOOL = {Form.ONES: Form.VISIBLE, Form.ZEROS: Form.HIDDEN, Form.ADDED: Form.HIDDEN}
_NEGATIVE = -1e3  # far below any score


class Misuse(Exception):
    """Mask read in another form than it has. The text names the operator and the form."""


def check_masks(program: ExportedProgram, name: str, form: Form, least: int) -> None:
    """Follow the masks of a program to its attention.

    Args:
        name: input that is a mask or, where `form` is VISIBLE, whose comparisons make masks.
        form: VISIBLE or ADDED.
        least: fewest attention layers that must read one.

    Raises:
        Misuse: an operator takes a mask for another form, or fewer layers read one.
    """
    walk = _Walk(InlineModesPass()(program), name, form)
    if walk.readers < least:
        raise Misuse(f"{walk.readers} of {least} attention layers are seen to read their mask")


class _Walk:
    def __init__(self, program: ExportedProgram, name: str, form: Form) -> None:
        self.forms: dict[Node, Form] = {}
        self.readers = 0
        self._program, self._name, self._form = program, name, form
        self._sources: set[Node] = set()
        for node in program.graph.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder" and node.name == self._name:
            if self._form is Form.ADDED:
                self.forms[node] = self._form
            else:
                self._sources.add(node)
            return
        if node.op != "call_function":
            return
        name = _operator(node)
        plain = name.strip("_")
        if any(operand in self._sources for operand in node.all_input_nodes):
            if plain in _VIEWS:
                self._sources.add(node)
            elif plain in _COMPARISONS:
                self.forms[node] = Form.VISIBLE
            return
        if not any(operand in self.forms for operand in node.all_input_nodes):
            return
        rule = _RULES.get(plain)
        form = None if rule is None else rule(self, node)
        # An in-place operator changes the form of its operand from here on.
        in_place = name.endswith("_") and not name.startswith("_")
        for changed in (node, node.args[0]) if in_place else (node,):
            if isinstance(changed, Node):
                self.forms.pop(changed, None)
                if form is not None:
                    self.forms[changed] = form

    def of(self, value: Any) -> Form | None:
        """Form of an operand; of a list, the first form in it."""
        if isinstance(value, (list, tuple)):
            return next((self.forms[item] for item in value if item in self.forms), None)
        return self.forms.get(value) if isinstance(value, Node) else None

    def constant(self, value: Any) -> float | None:
        """Number that fills the whole operand, or None."""
        if isinstance(value, (bool, int, float)):
            return float(value)
        if not isinstance(value, Node) or value in self.forms:
            return None
        if value.op != "call_function":
            tensor = self._program.constants.get(self._lifted(value.name))
            return tensor.item() if isinstance(tensor, Tensor) and tensor.numel() == 1 else None
        name = _operator(value).removeprefix("new_").removesuffix("_like")
        if name in ("zeros", "ones"):
            return float(name == "ones")
        if name in ("full", "scalar_tensor"):
            return self.constant(value.args[-1 if name == "full" else 0])
        return self.constant(value.args[0]) if name in _VIEWS else None

    def _lifted(self, name: str) -> str:
        return self._program.graph_signature.inputs_to_lifted_tensor_constants.get(name, "")


def _operator(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", "")


def _fault(node: Node, form: Form) -> Misuse:
    return Misuse(f"aten.{_operator(node)} ('{node.name}') is given {form.value}")


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _keep(walk: _Walk, node: Node) -> Form | None:
    """Keep the operand's form, as boolean or number according to the result's dtype."""
    form, dtype = walk.of(node.args[0]), _dtype(node)
    if form is None or dtype is None:
        return form
    return (_AS_BOOL if dtype == torch.bool else _AS_NUMBER).get(form, form)


def _invert(walk: _Walk, node: Node) -> Form | None:
    form = walk.of(node.args[0])
    return None if form is None else _OPPOSITE[_AS_BOOL.get(form, form)]


def _combine(walk: _Walk, node: Node) -> Form | None:
    forms = {form for form in map(walk.of, node.args[:2]) if form is not None}
    return forms.pop() if len(forms) == 1 else None


def _compare(walk: _Walk, node: Node) -> Form | None:
    form, value, name = walk.of(node.args[0]), walk.constant(node.args[1]), _operator(node)
    if form is None or value is None:
        return None
    levels = {Form.ADDED: (0.0, -torch.inf)}.get(form, (1.0, 0.0))
    if form in (Form.HIDDEN, Form.ZEROS):
        levels = levels[::-1]
    visible, hidden = (bool(getattr(operator, name)(level, value)) for level in levels)
    return None if visible == hidden else Form.VISIBLE if visible else Form.HIDDEN


def _where(walk: _Walk, node: Node) -> Form | None:
    condition, yes, no = node.args[:3]
    return _choose(walk, node, walk.of(condition), yes, no)


def _fill(walk: _Walk, node: Node) -> Form | None:
    rest, condition, value = node.args[:3]
    return _choose(walk, node, walk.of(condition), value, rest)


def _choose(walk: _Walk, node: Node, condition: Form | None, yes: Any, no: Any) -> Form | None:
    if condition is None:
        return walk.of(yes) or walk.of(no)
    visible, hidden = (yes, no) if condition is Form.VISIBLE else (no, yes)
    seen, unseen = walk.constant(visible), walk.constant(hidden)
    if unseen is not None and unseen <= _NEGATIVE:
        return Form.ADDED
    if seen is not None and seen <= _NEGATIVE:
        raise _fault(node, condition)
    if seen is not None and unseen is not None and {seen, unseen} == {0.0, 1.0}:
        truth = Form.VISIBLE if seen else Form.HIDDEN
        return truth if _dtype(node) == torch.bool else _AS_NUMBER[truth]
    return walk.of(visible)


def _add(walk: _Walk, node: Node) -> Form | None:
    one, other = node.args[:2]
    forms = [walk.of(one), walk.of(other)]
    subtracted = _operator(node).startswith("sub")
    if Form.ADDED in forms:
        if subtracted and forms[1] is Form.ADDED:
            raise _fault(node, Form.ADDED)
        return Form.ADDED
    form, rest = (forms[0], other) if forms[0] is not None else (forms[1], one)
    assert form is not None
    if walk.constant(rest) == 1 and forms[0] is None and subtracted:
        return _OPPOSITE[_AS_NUMBER.get(form, form)]
    dtype = _dtype(rest) if isinstance(rest, Node) and rest not in walk.forms else None
    if dtype is not None and dtype.is_floating_point and walk.constant(rest) is None:
        raise _fault(node, form)
    return None


def _rsub(walk: _Walk, node: Node) -> Form | None:
    form = walk.of(node.args[0])
    if form is Form.ADDED:
        raise _fault(node, form)
    one = form is not None and walk.constant(node.args[1]) == 1
    return _OPPOSITE[_AS_NUMBER.get(form, form)] if one and form is not None else None


def _scale(walk: _Walk, node: Node) -> Form | None:
    one, other = node.args[:2]
    form, rest = (walk.of(one), other) if walk.of(one) is not None else (walk.of(other), one)
    factor = walk.constant(rest)
    if form is Form.ADDED:
        if factor is not None and factor < 0:
            raise _fault(node, form)
        return form
    if factor is not None and factor <= _NEGATIVE and _operator(node).startswith("mul"):
        if form in (Form.VISIBLE, Form.ONES):
            raise _fault(node, form)
        return Form.ADDED
    return _combine(walk, node) if isinstance(rest, Node) and rest in walk.forms else None


def _bound(walk: _Walk, node: Node) -> Form | None:
    form = walk.of(node.args[0]) or walk.of(_argument(node, 1, "min"))
    low = walk.constant(_argument(node, 1, "min"))
    return form if form is Form.ADDED and (low is None or low <= _NEGATIVE) else None


def _softmax(walk: _Walk, node: Node) -> None:
    form = walk.of(node.args[0])
    if form is not Form.ADDED:
        raise _fault(node, form or Form.ADDED)
    walk.readers += 1


def _attention(walk: _Walk, node: Node) -> None:
    form = walk.of(_argument(node, 3, "attn_mask"))
    if form in (Form.VISIBLE, Form.ADDED):
        walk.readers += 1
    elif form is not None:
        raise _fault(node, form)


def _refuse_added(walk: _Walk, node: Node) -> None:
    if walk.of(node.args[0]) is Form.ADDED:
        raise _fault(node, Form.ADDED)


# Operators that keep elements as they are, select some, or join them with others.
_VIEWS = frozenset((
    "addmm", "alias", "baddbmm", "bfloat16", "bool", "broadcast_to", "cat", "chunk", "clone", "contiguous", "detach",
    "dropout", "expand", "expand_as", "flatten", "float", "getitem", "half", "index", "lift_fresh_copy", "nan_to_num",
    "narrow", "pad", "permute", "repeat", "reshape", "roll", "select", "slice", "split", "split_with_sizes", "squeeze",
    "stack", "to", "to_copy", "transpose", "tril", "type_as", "unbind", "unflatten", "unsqueeze", "view",
))  # fmt: skip
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_RULES: dict[str, Callable[[_Walk, Node], Form | None]] = {
    **dict.fromkeys(_VIEWS, _keep),
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(("bitwise_not", "logical_not"), _invert),
    **dict.fromkeys(("bitwise_and", "logical_and", "and", "bitwise_or", "logical_or", "or"), _combine),
    **dict.fromkeys(("add", "sub", "subtract"), _add),
    **dict.fromkeys(("mul", "div", "multiply", "divide", "true_divide"), _scale),
    **dict.fromkeys(("maximum", "minimum", "max", "min", "clamp", "clamp_min"), _bound),
    **dict.fromkeys(("softmax", "safe_softmax", "log_softmax", "exp", "sigmoid"), _softmax),
    **dict.fromkeys(("tanh", "neg", "abs", "relu", "gelu", "softplus", "square"), _refuse_added),
    "rsub": _rsub,
    "where": _where,
    "masked_fill": _fill,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip
