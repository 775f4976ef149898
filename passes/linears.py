"""Rewrite products of an activation and a parameter as `aten.linear`, whichever operator spells them.

`x @ W.T`, `addmm(b, x, W)` (GPT-2's Conv1D), `einsum("...i,oi->...o", x, W)` and others are the same function; later
passes then handle one form. Results are those of the original operator, up to the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.base import ProgramPass, counters
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.experts import ExpertsPass
from lopro_fx.passes.inline import InlineModesPass
from lopro_fx.passes.weights import FLOATS, Seen, Weights

aten = torch.ops.aten
LINEAR = aten.linear.default


@dataclass(frozen=True)
class Product:
    """linear(x, weight) + bias; `columns` contracts x's second-to-last dimension instead, as in `W @ x`.

    `seen` is the weight; with `transposed` the parameter is stored as (in_features, out_features).
    """

    x: Node
    seen: Seen
    transposed: bool
    bias: Node | None = None
    columns: bool = False


class LinearsPass(ProgramPass):
    """Rewrite such products; return `program` itself if there are none."""

    name = "linears"

    def call(self, program: ExportedProgram) -> ExportedProgram:
        if not _products(program):
            return program
        editor = ProgramEditor(program)
        weights = Weights(editor.graph, editor.names, program.graph_signature)
        for node in list(editor.graph.nodes):
            product = match(node, weights)
            if product is not None:
                _write(editor, node, product)
                counters["linears.product"] += 1
        return editor.finish()

    def ensures(self, program: ExportedProgram) -> None:
        self.promise(not _products(program), "a product with a parameter is no aten.linear")


def as_linears(program: ExportedProgram) -> ExportedProgram:
    """Prepare a program for `find_sites`: inline graphs that only switch modes, rewrite products as `aten.linear`, and
    those of experts as `lopro::routed_linear`."""
    return ExpertsPass()(LinearsPass()(InlineModesPass()(program)))


def _products(program: ExportedProgram) -> bool:
    weights = Weights.of(program)
    return any(match(node, weights) for node in program.graph.nodes)


def match(node: Node, weights: Weights) -> Product | None:
    """Match `node`, other than an `aten.linear`, as a Linear with a parameter; None if it is none."""
    matcher = _MATCHERS.get(node.target)  # pyright: ignore[reportArgumentType]
    return matcher(node.args, node.kwargs, weights) if matcher else None


def _product(
    x: Any, weight: Any, weights: Weights, rows: bool, bias: Node | None = None, columns: bool = False
) -> Product | None:
    """`rows`: the weight's rows are output features."""
    if not isinstance(x, Node) or not isinstance(weight, Node) or x.meta["val"].dtype not in (*FLOATS, torch.float64):
        return None
    found = weights.seen(weight)
    # A product of two parameters, such as an adapter that is added to a weight, involves no activation.
    if found is None or not weights.is_parameter(found) or weights.seen(x) is not None:
        return None
    if not (found.whole or found.transposed):
        return None
    # `einsum` broadcasts an operand of one feature; `aten.linear` doesn't.
    if x.meta["val"].shape[-2 if columns else -1] != weight.meta["val"].shape[1 if rows else 0]:
        return None
    return Product(x, found, found.whole != rows, bias, columns)


def _matmul(args: Any, _: Any, weights: Weights) -> Product | None:
    left, right = args
    right_hand = _product(left, right, weights, rows=False)
    if right_hand is not None or not isinstance(right, Node):
        return right_hand
    return _product(right, left, weights, rows=True, columns=right.meta["val"].dim() > 1)


def _addmm(args: Any, kwargs: Any, weights: Weights) -> Product | None:
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    bias, left, right = args
    return _product(left, right, weights, rows=False, bias=bias)


def _inner(args: Any, _: Any, weights: Weights) -> Product | None:
    x, weight = args
    return _product(x, weight, weights, rows=True)


def _tensordot(args: Any, _: Any, weights: Weights) -> Product | None:
    x, weight, mine, others = args
    if list(mine) not in ([-1], [x.meta["val"].dim() - 1]) or len(others) != 1:
        return None
    return _product(x, weight, weights, rows=others[0] in (1, -1))


def _einsum(args: Any, _: Any, weights: Weights) -> Product | None:
    equation, operands = args[:2]
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    labels = terms.split(",")
    if not arrow or len(labels) != 2:
        return None
    pairs = list(zip(labels, operands, strict=True))
    for (of_x, x), (of_weight, weight) in (pairs, pairs[::-1]):
        named, inner = of_x.replace("...", ""), of_x[-1:]
        if len(of_weight) == len(set(of_weight)) == 2 and len(named) == len(set(named)) and inner in set(of_weight):
            free = of_weight.replace(inner, "")
            if free not in of_x and result == of_x[:-1] + free:
                found = _product(x, weight, weights, rows=of_weight[1] == inner)
                if found is not None:
                    return found
    return None


_MATCHERS = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.addmm.default: _addmm,
    aten.inner.default: _inner,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
}


def _write(editor: ProgramEditor, node: Node, product: Product) -> None:
    def add(name: str, target: Any, *args: Any) -> Node:
        return editor.add_call(node, f"{name}_{node.name}", target, args, node)

    x, weight, bias = product.x, product.seen.placeholder, product.bias
    dtype, old = x.meta["val"].dtype, list(node.all_input_nodes)
    if product.transposed:
        weight = add("transposed", aten.t.default, weight)
    if weight.meta["val"].dtype != dtype:
        weight = add("cast", aten.to.dtype, weight, dtype)
    if product.columns:
        x = add("rows", aten.transpose.int, x, -1, -2)
    is_vector = bias is not None and bias.meta["val"].shape == weight.meta["val"].shape[:1]
    result = add("linear", LINEAR, x, weight, bias if is_vector else None)
    if bias is not None and not is_vector:
        result = add("sum", aten.add.Tensor, result, bias)
    if product.columns:
        # Readers may take views that only a contiguous result allows, as the product's was.
        result = add("dense", aten.contiguous.default, add("columns", aten.transpose.int, result, -1, -2))
    editor.replace(node, result)
    for operand in old:
        editor.erase_unread(operand)
