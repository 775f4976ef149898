"""The table that a program looks its token ids up in."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from lopro_fx.passes.calls import PACKED_EMBEDDING
from lopro_fx.passes.compat import viewed_operand
from lopro_fx.passes.operands import operands
from lopro_fx.passes.weights import parameter_fqns

# Operator to the names of its table and of the ids.
_LOOKUPS = {torch.ops.aten.embedding.default: ("weight", "indices"), PACKED_EMBEDDING: ("codes", "ids")}
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


def table_rows(program: ExportedProgram | GraphModule) -> int | None:
    """Rows of the smallest table whose row numbers are the program's first input; None if there is none."""
    graph, rows = program.graph, []
    weights = parameter_fqns(program) if isinstance(program, ExportedProgram) else {}
    first = next((node for node in graph.find_nodes(op="placeholder") if node.name not in weights), None)
    for node in graph.nodes:
        if node.target not in _LOOKUPS:
            continue
        table, ids = (operands(node).named[name] for name in _LOOKUPS[node.target])
        if isinstance(table, Node) and isinstance(ids, Node) and _source(ids) is first:
            rows.append(table.meta["val"].shape[0])
    return min(rows, default=None)


def _source(node: Node) -> Node:
    """What a view or copy was made of."""
    while (source := node.args[0] if node.target in _COPIES else viewed_operand(node)) is not None:
        assert isinstance(source, Node)
        node = source
    return node
