"""Fuse a residual add into the site whose result it reads: the kernel adds before it rounds."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import PackedPass, kind_of, packed_calls, same_shape
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fuse_prologue import as_site, reads_its_own_input
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import Note, sites_of

aten = torch.ops.aten


class FuseResidualPass(PackedPass):
    """Fuse `x + site(y)` into one site where the sum is the only reader of the site's result.

    The kernel reads one more operand, and a launch is saved. Skipped, with the reason in the record: sites whose result
    has another reader, broadcasts, and sums in another dtype.
    """

    name = "fuse_residual"

    def edit(self, editor: ProgramEditor) -> list[Note]:
        notes: list[Note] = []
        for node in packed_calls(editor.graph, "linear", "site"):
            if _has_residual(node):
                continue
            reason = _reason_to_leave(node)
            notes.append({"what": sites_of(node), **({"reason": reason} if reason else {})})
            if reason is None:
                _fuse(editor, node)
                counters["fuse_residual.site"] += 1
        return notes

    def ensures(self, program: ExportedProgram) -> None:
        for node in packed_calls(program.graph, "site"):
            residual, dtype = operands(node).residual, node.meta["val"].dtype
            kept = residual is None or residual.meta["val"].dtype == dtype
            self.promise(kept, f"'{sites_of(node)[0]}' adds a residual to {dtype} of another type")


def _has_residual(node: Node) -> bool:
    return kind_of(node) == "site" and operands(node).residual is not None


def _reason_to_leave(node: Node) -> str | None:
    if not reads_its_own_input(node):
        return "its rotation or low-rank branch is shared by several readers"
    result = _result(node)
    if len(result.users) != 1:
        return f"its result has {len(result.users)} readers"
    total = next(iter(result.users))
    if total.target is not aten.add.Tensor or total.kwargs.get("alpha", 1) != 1:
        return f"'{total.name}' reads its result, which is no sum"
    other = _other(total, result)
    if other is None or not isinstance(other.meta["val"], torch.Tensor):
        return f"'{total.name}' adds no other tensor"
    value, residual = node.meta["val"], other.meta["val"]
    if residual.dtype != value.dtype:
        return f"'{total.name}' adds {residual.dtype} to {value.dtype}"
    if not same_shape(other, node):
        return f"'{total.name}' broadcasts"
    if any(written_between(operand, node, total) for operand in node.all_input_nodes):
        return "the program writes into its input before the sum"
    return None


def _result(node: Node) -> Node:
    """Follow a result through disabled dropouts, which exported models keep."""
    while len(node.users) == 1:
        reader = next(iter(node.users))
        if reader.target is not aten.dropout.default or (reader.args[2] and reader.args[1]):
            break
        node = reader
    return node


def _other(total: Node, result: Node) -> Node | None:
    """The summand that isn't `result`."""
    found = [operand for operand in total.args[:2] if operand is not result]
    return found[0] if found and isinstance(found[0], Node) else None


def _fuse(editor: ProgramEditor, node: Node) -> None:
    site = as_site(editor, node)
    result = _result(site)
    total = next(iter(result.users))
    operands(site).replace(residual=_other(total, result)).write(site)
    # The residual may be computed after what the site reads.
    total.prepend(site)
    editor.replace(total, site)
    while result is not site:
        before = result.args[0]
        assert isinstance(before, Node)
        editor.graph.erase_node(result)
        result = before
