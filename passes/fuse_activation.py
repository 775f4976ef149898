"""Fuse a rounded activation and the packed Linear that reads it into an integer gemm."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.formats.registry import operator_of
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import ROTATE, ROUND, PackedPass, format_of, packed_calls
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fuse_site import rounding_of, unrounded
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META, Mark, Note, group_of, sites_of


class FuseActivationPass(PackedPass):
    """Replace each packed Linear of a rounded activation by the format's "int8" operator, an integer gemm.

    The operator rotates too if nothing else reads the rotation. Merge Linears of one input first: each operator rounds
    for itself. Skipped, with the reason in the record: a Linear whose format has no such operator, and one whose
    activation groups are neither divisors nor multiples of the weight's groups.
    """

    name = "fuse_activation"

    def edit(self, editor: ProgramEditor) -> list[Note]:
        notes: list[Note] = []
        for node in packed_calls(editor.graph, "linear"):
            rounded = rounding_of(node)
            if rounded is None:
                continue
            reason = _reason_to_leave(node, rounded)
            notes.append({"what": sites_of(node), **({"reason": reason} if reason else {})})
            if reason is None:
                _fuse(editor, node, rounded)
                counters["fuse_activation.linear"] += 1
        return notes

    def ensures(self, program: ExportedProgram) -> None:
        for node in program.graph.find_nodes(op="call_function", target=ROUND):
            self.promise(bool(node.users), f"nothing reads '{node.name}' of '{group_of(node)}'")


def _reason_to_leave(node: Node, rounded: Node) -> str | None:
    format = format_of(node)
    if operator_of(format.name, "int8") is None:
        return f"format '{format.name}' has no product of integers"
    act, own = operands(rounded).group, operands(node).named.get("group_size", -1)
    fits = -1 in (act, own) or act % own == 0 or own % act == 0
    return None if fits else f"groups of {act} activations and of {own} weights don't divide each other"


def _fuse(editor: ProgramEditor, node: Node, rounded: Node) -> None:
    call, rounding, x = operands(node), operands(rounded), unrounded(node)
    turn = {"block": 1, "skip": 0}
    # A rotation with other readers stays a node: fused, it would be computed again.
    if x.target is ROTATE and set(x.users) == {rounded} and set(rounded.users) == {node}:
        turn = operands(x).named
    product = call.replace(x=x).to(
        operator_of(format_of(node).name, "int8"), act_bits=rounding.bits, act_group=rounding.group,
        **{"perm": None, "signs": None, **turn},
    )  # fmt: skip
    fused = editor.add_operator(node, f"int8_{node.name}", product, node)
    fused.meta[META] = Mark(sites=sites_of(node), group=group_of(node))
    editor.replace(node, fused)
    for gone in (rounded, x):
        if gone.target in (ROTATE, ROUND) and not gone.users:
            editor.graph.erase_node(gone)
