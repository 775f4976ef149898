"""Find MoE routers: Linears whose logits reach a top-k, through operators such as softmax and casts."""

from __future__ import annotations

import operator

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

_TOP_K = aten.topk.default
# Operators between logits and top-k: scores, a load-balancing bias, selection of groups of experts.
_BETWEEN = frozenset({
    aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.to.dtype, aten._to_copy.default,
    aten.type_as.default, aten.view.default, aten.reshape.default, aten.add.Tensor, aten.masked_fill.Scalar,
    aten.sum.dim_IntList, operator.getitem, _TOP_K,
})  # fmt: skip


def find_routers(program: ExportedProgram) -> set[Node]:
    """The `aten.linear` nodes that rank experts."""
    waiting = list(program.graph.find_nodes(op="call_function", target=_TOP_K))
    seen, found = set(waiting), set()
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.target is aten.linear.default:
                found.add(source)
            elif source.target in _BETWEEN and source not in seen:
                seen.add(source)
                waiting.append(source)
    return found
