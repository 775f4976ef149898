"""Rewrite the products of routed tokens and experts' weights as `lopro::routed_linear`, however they are spelled.

transformers stores the experts of a layer as one parameter (experts, out, in), or its transpose, and multiplies by it
in two forms that can be exported:

    batched_mm   bmm(weight[ids], x) for each pair of token and expert: the weights are gathered
    grouped_mm   pairs sorted by expert, and one grouped product over their offsets

Both become one node for each weight. What is around them (activations, gates, biases, routing weights) stays as it is,
so that no family is known here. Sorting is undone where every node between acts on each pair alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.base import ProgramPass, counters
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.unsort import unsorted
from lopro_fx.passes.weights import FLOATS, Weights

aten = torch.ops.aten
ROUTED = torch.ops.lopro.routed_linear.default
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
_NO_OP = frozenset({aten.to.dtype, aten.to.device, aten.contiguous.default, aten.clone.default, aten.detach.default})


class _Routed(NamedTuple):
    """A product to replace: its result, rows, expert of each row, and weight (experts, out_features, in_features),
    which is transposed first if `transposed`."""

    result: Node
    x: Node
    ids: Node
    weight: Node
    transposed: bool
    grouped: bool


class ExpertsPass(ProgramPass):
    """Rewrite such products; return `program` itself if there are none."""

    name = "experts"

    def call(self, program: ExportedProgram) -> ExportedProgram:
        if next(_found(program.graph.nodes, Weights.of(program)), None) is None:
            return program
        editor = ProgramEditor(program)
        weights = Weights(editor.graph, editor.names, program.graph_signature)
        sorts: dict[Node, None] = {}
        calls = []
        for found in list(_found(editor.graph.nodes, weights)):
            calls.append(_write(editor, found))
            counters["experts.routed"] += 1
            if found.grouped:
                sorts[found.ids.all_input_nodes[0]] = None
        for sort in sorts:
            if unsorted(editor, sort):
                counters["experts.unsorted"] += 1
        for call in calls:
            _fold_repetition(editor, call)
        return editor.finish()

    def ensures(self, program: ExportedProgram) -> None:
        left = next(_found(program.graph.nodes, Weights.of(program)), None)
        self.promise(left is None, "a product with experts is no lopro::routed_linear")


def _found(nodes: Any, weights: Weights) -> Iterator[_Routed]:
    for node in nodes:
        if node.target is aten.bmm.default:
            found = _batched(node, weights)
        elif isinstance(node.target, OpOverload) and node.target._schema.name in _GROUPED:
            found = _sorted(node, weights)
        else:
            continue
        if found is not None and found.x.meta["val"].dtype in FLOATS:
            yield found


def _batched(node: Node, weights: Weights) -> _Routed | None:
    """bmm(weight[ids], x.unsqueeze(-1)).squeeze(-1), or bmm(x.unsqueeze(1), weight[ids]).squeeze(1)."""
    operands: Any = node.args
    left, right = operands
    for gathered, row, dim, by_rows in ((left, right, 2, True), (right, left, 1, False)):
        index: Any = _plain(gathered)
        if index.target is not aten.index.Tensor or len(index.args[1]) != 1 or row.target is not aten.unsqueeze.default:
            continue
        table, (ids,) = index.args
        seen, result = weights.seen(table), _squeezed(node, dim)
        if seen is None or not weights.is_parameter(seen) or result is None or row.args[1] % 3 != dim:
            continue
        if not isinstance(ids, Node) or ids.meta["val"].dim() != 1 or ids.meta["val"].dtype not in _INTEGERS:
            continue
        if seen.whole_stack or seen.transposed_stack:
            return _Routed(result, row.args[0], ids, seen.placeholder, by_rows != seen.whole_stack, False)
    return None


def _sorted(node: Node, weights: Weights) -> _Routed | None:
    """_grouped_mm(x, weight of (experts, in_features, out_features), offsets), with the offsets of sorted ids."""
    given: Any = (*node.args, *(node.kwargs[key] for key in ("offs",) if key in node.kwargs))
    if len(given) != 3 or any(node.kwargs.get(key) is not None for key in ("bias", "out_dtype")):
        return None
    x, table, offsets = given
    seen, ids = weights.seen(table), _counted(offsets)
    if seen is None or not weights.is_parameter(seen) or ids is None or x.meta["val"].dim() != 2:
        return None
    if seen.whole_stack or seen.transposed_stack:
        return _Routed(node, x, ids, seen.placeholder, seen.whole_stack, True)
    return None


_INTEGERS = (torch.int64, torch.int32)


def _counted(offsets: Any) -> Node | None:
    """The sorted ids whose numbers of rows `offsets` adds up, cumsum(histc(ids)); None for other offsets."""
    if not isinstance(offsets, Node) or offsets.target is not aten.cumsum.default:
        return None
    counts: Any = offsets.args[0]
    if counts.target is not aten.histc.default:
        return None
    ids: Any = counts.args[0]
    while ids.target in (aten.to.dtype, aten._to_copy.default):
        ids = ids.args[0]
    if ids.target is not operator.getitem or ids.args[1] != 0:
        return None
    sort: Any = ids.args[0]
    return ids if sort.target is aten.sort.default and not sort.args[1:] else None


def _plain(node: Any) -> Node:
    """`node` before copies that leave its dtype."""
    while node.target in _NO_OP and node.args[0].meta["val"].dtype == node.meta["val"].dtype:
        node = node.args[0]
    return node


def _squeezed(node: Node, dim: int) -> Node | None:
    """The only reader of `node`, if it squeezes `dim` of three."""
    users: Any = list(node.users)
    if len(users) == 1 and users[0].target is aten.squeeze.dim and users[0].args[1] % 3 == dim:
        return users[0]
    return None


def _write(editor: ProgramEditor, found: _Routed) -> Node:
    weight, old = found.weight, list(found.result.all_input_nodes)
    if found.transposed:
        weight = editor.add_call(
            found.result, f"transposed_{found.result.name}", aten.transpose.int, (weight, 1, 2), found.result
        )
    x = found.x
    if weight.meta["val"].dtype != x.meta["val"].dtype:
        weight = editor.add_call(
            found.result, f"cast_{found.result.name}", aten.to.dtype, (weight, x.meta["val"].dtype), found.result
        )
    call = editor.add_call(found.result, f"routed_{found.result.name}", ROUTED, (x, found.ids, weight, 1), found.result)
    editor.replace(found.result, call)
    for node in old:
        editor.erase_unread(node)
    return call


def _fold_repetition(editor: ProgramEditor, call: Node) -> None:
    """Let a product read each token once, in place of a copy for each of its experts."""
    operands: Any = call.args
    x, ids, weight, _ = operands
    repeated = _plain(x)
    if repeated.target is not aten.repeat_interleave.self_int or not isinstance(repeated.args[1], int):
        return
    repetition: Any = repeated.args
    source, slots, *dim = repetition
    if dim == [0] and source.meta["val"].dim() == 2 and not written_between(source, repeated, call):
        call.args = (source, ids, weight, slots)
        editor.erase_unread(x)
