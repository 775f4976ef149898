"""Permute the rows of packed Linears ahead of time instead of an activation at run time.

`down(silu(gate(x)) * up(x))` gathers the columns of the product by its permutation. The product's columns are rows of
`gate` and `up`, so permuting those once leaves nothing to gather.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.formats.base import Packed
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import ROTATE, PackedPass, format_of, kind_of, stored_weight, table_of
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import Note, group_of, sites_of

aten = torch.ops.aten

# Column j of the result depends on column j of each operand alone, whatever the other arguments are.
_ELEMENTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.to.dtype,
        aten._to_copy.default,
    }
)
# These read the shape or the dtype, which a permutation keeps.
_ANY_ORDER = frozenset({aten._assert_tensor_metadata.default, aten.sym_size.int})


class FoldPermutationPass(PackedPass):
    """Remove the permutation of each `lopro::rotate` whose input is an elementwise function of packed Linears.

    Packed weights, up factors and biases of those Linears are permuted by rows; a rotation that does nothing else is
    removed. Run it before Linears are merged or fused: that would hide their rows.
    """

    name = "fold_permutation"

    def edit(self, editor: ProgramEditor) -> list[Note]:
        notes: list[Note] = []
        for node in editor.graph.find_nodes(op="call_function", target=ROTATE):
            rotate = operands(node)
            if rotate.perm is None:
                continue
            cone, reason = _cone(node, rotate.x)
            leaves = sorted(member for member in cone if kind_of(member) == "linear")
            reason = reason or _reason_to_leave(editor, leaves)
            moved = {} if reason else _moved(editor, leaves, editor.stored(rotate.perm).to(torch.int64))
            if reason or isinstance(moved, str):
                notes.append({"what": [group_of(node)], "reason": reason or moved})
                continue
            notes.append({"what": [group_of(node)], "rows_of": [name for leaf in leaves for name in sites_of(leaf)]})
            for operand, tensor in moved.items():
                editor.set_tensor(operand, tensor)
            if rotate.block == 1:
                editor.replace(node, rotate.x)
            else:
                rotate.replace(perm=None).write(node)
            editor.drop_unused_weight(rotate.perm)
            counters["fold_permutation.rotate"] += 1
            counters["fold_permutation.linear"] += len(leaves)
        return notes

    def ensures(self, program: ExportedProgram) -> None:
        for node in program.graph.find_nodes(op="call_function", target=ROTATE):
            rotate = operands(node)
            self.promise(
                rotate.perm is not None or rotate.block > 1, f"the rotation of '{group_of(node)}' does nothing"
            )


def _cone(rotate: Node, source: Node) -> tuple[set[Node], str | None]:
    """Elementwise nodes and packed Linears that compute `source`, and the reason if they can't be permuted."""
    cone: set[Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if node in cone:
            continue
        cone.add(node)
        if kind_of(node) == "linear":
            continue
        if node.target not in _ELEMENTWISE:
            return cone, f"its input depends on '{node.name}', which is neither a packed Linear nor elementwise"
        pending += [operand for operand in node.all_input_nodes if not _broadcasts(operand.meta["val"])]
    for node in cone:
        for user in node.users:
            if user is not rotate and user not in cone and user.target not in _ANY_ORDER:
                return cone, f"'{node.name}' is also read by '{user.name}', which needs the original order"
    return cone, None


def _broadcasts(value: object) -> bool:
    """Whether an operand is the same for all columns: a number, or a tensor with one column."""
    return not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] == 1


def _reason_to_leave(editor: ProgramEditor, leaves: list[Node]) -> str | None:
    for leaf in leaves:
        call = operands(leaf)
        for operand in (table_of(leaf), call.bias):
            if operand is None:
                continue
            if editor.tensor(operand) is None:
                return f"the bias of '{sites_of(leaf)[0]}' is computed by the program"
            if any(user not in leaves for user in operand.users):
                return f"the weight or bias of '{sites_of(leaf)[0]}' is also applied elsewhere"
    return None


def _moved(editor: ProgramEditor, leaves: list[Node], perm: Tensor) -> dict[Node, Tensor] | str:
    """Gather the rows of every Linear's tensors by `perm`, or return the reason why a format can't.

    Each tensor is gathered once however many nodes read it.
    """
    moved: dict[Node, Tensor] = {}
    for leaf in {table_of(leaf): leaf for leaf in leaves}.values():
        weight = format_of(leaf).permute_rows(stored_weight(leaf, editor.stored), perm)
        if not isinstance(weight, Packed):
            return weight
        call = operands(leaf)
        moved |= {call.named[name]: tensor for name, tensor in weight.tensors.items()}
    rows = {operand for leaf in leaves for call in [operands(leaf)]
            for operand in (call.up, call.bias) if operand is not None}  # fmt: skip
    return moved | {operand: editor.stored(operand).detach()[perm] for operand in rows}
