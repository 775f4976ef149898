"""Fuse a rotation, a low-rank down-projection and the packed Linear that alone reads them into one "site", and experts
into one "experts_site"."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.formats.registry import operator_of
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import PROJECT, ROTATE, ROUND, SITES, PackedPass, format_of, kind_of, packed_calls
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.operands import Operands, operands
from lopro_fx.passes.record import META, Mark, Note, group_of, sites_of


class FuseSitePass(PackedPass):
    """Fuse each packed Linear with the rotation and the down-projection in front of it, if it is their only reader.

    A Linear with neither is skipped. Run `MergeLinearsPass` first for Linears that share a rotation.

    Args:
        experts: fuse experts too. Operators for CPUs take them apart.
    """

    name = "fuse_site"

    def __init__(self, experts: bool = True) -> None:
        self.kinds = tuple(SITES) if experts else ("linear",)

    def edit(self, editor: ProgramEditor) -> list[Note]:
        notes: list[Note] = []
        for node in packed_calls(editor.graph, *self.kinds):
            reason = _reason_to_leave(node)
            if reason:
                notes.append({"what": sites_of(node), "reason": reason})
                continue
            notes.append({"what": sites_of(node)})
            _fuse(editor, node)
            counters["fuse_site.site"] += 1
        return notes

    def ensures(self, program: ExportedProgram) -> None:
        for target in (ROTATE, PROJECT):
            for node in program.graph.find_nodes(op="call_function", target=target):
                self.promise(bool(node.users), f"nothing reads '{node.name}' of '{group_of(node)}'")


def _reason_to_leave(node: Node) -> str | None:
    call = operands(node)
    if call.x.target is ROUND:
        return "its activation is rounded"
    readers = {node}
    if call.latent is not None:
        if call.latent.target is not PROJECT or operands(call.latent).x is not call.x:
            return "its low-rank branch does not project its own input"
        if set(call.latent.users) != {node}:
            return f"its down-projection is shared by {len(call.latent.users)} readers"
        readers.add(call.latent)
    if call.x.target is not ROTATE:
        return None if call.latent else "it has neither a rotation nor a low-rank branch"
    if set(call.x.users) != readers:
        return f"its rotation is shared by {len(call.x.users)} readers"
    return None


def rounding_of(node: Node) -> Node | None:
    """The `lopro::round_activation` node that a packed Linear reads, or None."""
    x = operands(node).x
    return x if x.target is ROUND else None


def unrounded(node: Node) -> Node:
    """Input of a packed Linear before it is rounded."""
    rounded = rounding_of(node)
    return operands(node).x if rounded is None else operands(rounded).x


def fused_operands(node: Node, operator: OpOverload, **others: Any) -> Operands:
    """Operands of `operator`, such as a "site", of a packed Linear with its rotation and projection, and without
    rounding; `others` are further ones."""
    call, x = operands(node).replace(x=unrounded(node)), unrounded(node)
    rotation = operands(x).named if x.target is ROTATE else {"block": 1, "skip": 0}
    projection = {}
    if call.latent is not None:
        project = operands(call.latent)
        projection = {"down": project.down, "down_scale": project.scale}
    # An operator without defaults needs a value for each operand.
    turn = {"perm": None, "signs": None, **rotation}
    return call.replace(latent=None).to(operator, **turn, **projection, **others)


def site_operator(node: Node) -> OpOverload:
    """The operator that fuses a "linear" or "experts" with what it reads."""
    kind = kind_of(node)
    assert kind is not None
    return operator_of(format_of(node).name, SITES[kind])


def _fuse(editor: ProgramEditor, node: Node) -> None:
    call, operator = operands(node), site_operator(node)
    fused = editor.add_operator(node, f"fused_{node.name}", fused_operands(node, operator), node)
    fused.meta[META] = Mark(sites=sites_of(node), group=group_of(node))
    editor.replace(node, fused)
    for gone in (call.latent, call.x if call.x.target is ROTATE else None):
        if gone is not None:
            editor.graph.erase_node(gone)
