"""Inputs of a program: rows of its token embedding, and ranges of input sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from lopro_fx.passes.calls import kind_of, table_of
from lopro_fx.passes.compat import viewed_operand
from lopro_fx.passes.operands import operands
from lopro_fx.passes.weights import parameter_fqns

_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


def table_rows(program: ExportedProgram | GraphModule) -> int | None:
    """Rows of the smallest table that the program's first input indexes; None if there is none."""
    graph, rows = program.graph, []
    weights = parameter_fqns(program) if isinstance(program, ExportedProgram) else {}
    first = next((node for node in graph.find_nodes(op="placeholder") if node.name not in weights), None)
    for node in graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, ids = operands(node).weight, operands(node).indices
        elif kind_of(node) == "embedding":
            table, ids = table_of(node), operands(node).ids
        else:
            continue
        if isinstance(table, Node) and isinstance(ids, Node) and _source(ids) is first:
            rows.append(table.meta["val"].shape[0])
    return min(rows, default=None)


def user_placeholders(program: ExportedProgram) -> list[Node]:
    """Placeholders of the inputs that the caller gives, in order."""
    nodes = program.graph.find_nodes(op="placeholder")
    kinds = [spec.kind for spec in program.graph_signature.input_specs]
    return [node for node, kind in zip(nodes, kinds, strict=True) if kind == InputKind.USER_INPUT]


def size_ranges(program: ExportedProgram, placeholder: Node) -> list[tuple[float, float]]:
    """(least, most) of every dimension of an input; both are the size where it is fixed."""
    ranges = []
    for size in placeholder.meta["val"].shape:
        if isinstance(size, int):
            ranges.append((size, size))
            continue
        known = program.range_constraints.get(size.node.expr)
        if known is None:
            ranges.append((0, math.inf))
            continue
        # torch.export writes 2 where it knows no least size, and symbolic infinities are not Python numbers.
        low = int(known.lower)
        ranges.append((low if low > 2 else 0, _number(known.upper)))
    return ranges


def _number(end: Any) -> float:
    return int(end) if getattr(end, "is_finite", False) and end < 1 << 62 else math.inf


def _source(node: Node) -> Node:
    """Follow views and copies back to their source."""
    while (source := node.args[0] if node.target in _COPIES else viewed_operand(node)) is not None:
        assert isinstance(source, Node)
        node = source
    return node
