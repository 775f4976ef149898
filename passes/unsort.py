"""Undo the sorting of rows by expert around products that take their experts in any order."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from lopro_fx.passes.editor import ProgramEditor

aten = torch.ops.aten
# These act on each row alone if they leave the first dimension.
_ALONG = {
    aten.chunk.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.unsqueeze.default: 1,
    aten.slice.Tensor: 1, aten.select.int: 1, aten.squeeze.dim: 1, aten.softmax.int: 1, aten.glu.default: 1,
}  # fmt: skip
_BY_ROW = frozenset({
    operator.getitem, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default,
    aten.contiguous.default, aten.detach.default, aten._assert_tensor_metadata.default, aten.rms_norm.default,
    aten.layer_norm.default, torch.ops.lopro.routed_linear.default,
})  # fmt: skip
_COPIES = (aten.to.dtype, aten._to_copy.default)
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode)
_WRITES = (aten.index_put_.default, aten.index_put.default)


def unsorted(editor: ProgramEditor, sort: Node) -> bool:
    """Give what reads `sort`, an `aten.sort` of expert ids, the rows in their own order; return whether it can be.

    Needed is that sorted rows are taken by the permutation, that every node on them acts on each row alone, and that
    the inverse permutation brings the results back.
    """
    plan = _Plan.of(sort)
    if plan is None:
        return False
    ids = sort.args[0]
    assert isinstance(ids, Node)
    for index, slots in plan.tokens:
        rows = editor.add_call(
            index, f"repeated_{index.name}", aten.repeat_interleave.self_int, (index.args[0], slots, 0), index
        )
        editor.replace(index, rows)
    for index in (*plan.taken, *plan.restored):
        source = index.args[0]
        assert isinstance(source, Node)
        editor.replace(index, source)
    for value in plan.ids:
        value.replace_all_uses_with(ids)
    for node in (*plan.inverse, *plan.divided, *sort.users):
        operands = node.all_input_nodes
        editor.graph.erase_node(node)
        for operand in operands:
            if operand.target in _ARANGES:
                editor.erase_unread(operand)
    editor.erase_unread(sort)
    return True


class _Plan:
    """What an unsorting replaces: rows of tokens `x[perm // slots]`, rows `x[perm]`, results `y[inverse]`, the sorted
    ids; and the nodes that compute `perm // slots` and the inverse, a reader before what it reads."""

    def __init__(self) -> None:
        self.tokens: list[tuple[Node, int]] = []
        self.taken: list[Node] = []
        self.restored: list[Node] = []
        self.ids: list[Node] = []
        self.divided: list[Node] = []
        self.inverse: list[Node] = []

    @classmethod
    def of(cls, sort: Node) -> _Plan | None:
        """The plan for an `aten.sort`; None if its order shows."""
        plan = cls()
        for part in sort.users:
            if part.args[1] == 0:
                plan.ids.append(part)
            elif not plan._read_permutation(part):
                return None
        return plan if plan.restored and plan._acts_on_rows() else None

    def _read_permutation(self, perm: Node) -> bool:
        """Sort the readers of a permutation into the plan; False if there is another one."""
        for user in perm.users:
            if _takes(user, perm):
                self.taken.append(user)
            elif user.target in _DIVISIONS and isinstance(user.args[1], int):
                if user.kwargs.get("rounding_mode", "floor") != "floor":
                    return False
                if not all(_takes(reader, user) for reader in user.users):
                    return False
                self.tokens += [(reader, user.args[1]) for reader in user.users]
                self.divided.append(user)
            elif user.target is aten.empty_like.default:
                if not self._read_inverse(user, perm):
                    return False
            elif user.target not in _WRITES:
                return False
        return True

    def _read_inverse(self, empty: Node, perm: Node) -> bool:
        """Read inverse[perm] = arange(rows), which is written into `empty`; False if something else is."""
        (write,) = empty.users if len(empty.users) == 1 else (None,)
        if write is None or write.target not in _WRITES or not all(_takes(reader, write) for reader in write.users):
            return False
        operands: Any = write.args
        _, places, values, *_ = operands
        if list(places) != [perm] or values.target not in _ARANGES:
            return False
        self.restored += write.users
        self.inverse += [write, empty]
        return True

    def _acts_on_rows(self) -> bool:
        """Whether every node between the sorted rows and the restored ones acts on each row alone."""
        rows = {*(index for index, _ in self.tokens), *self.taken, *self.ids}
        waiting = [user for node in rows for user in node.users if not _counts(user)]
        while waiting:
            node = waiting.pop()
            if node in rows or node in self.restored:
                continue
            rows.add(node)
            waiting += node.users
        return all(node in self.restored or _by_row(node, rows) for node in rows.difference(
            self.taken, self.ids, (index for index, _ in self.tokens)
        ))  # fmt: skip


def _counts(node: Node) -> bool:
    """Whether `node` counts ids, which their order doesn't change."""
    if node.target in _COPIES:
        return bool(node.users) and all(user.target is aten.histc.default for user in node.users)
    return node.target is aten.histc.default


def _takes(node: Node, indices: Node) -> bool:
    """Whether `node` is x[indices]."""
    return node.target is aten.index.Tensor and list(node.args[1]) == [indices]  # pyright: ignore[reportArgumentType]


def _by_row(node: Node, rows: set[Node]) -> bool:
    """Whether `node` acts on each row alone, `rows` being all nodes whose first dimension is that of the rows."""
    target, first = node.target, node.all_input_nodes[0]
    if target is aten.index.Tensor:
        # A bias of each row's expert: x[ids].
        return first not in rows
    if target in _ALONG:
        dims = (
            first.meta["val"].dim() + (target is aten.unsqueeze.default) if first in rows and _is_tensor(first) else 0
        )
        at = _ALONG[target]  # pyright: ignore[reportArgumentType]
        dim = node.args[at] if len(node.args) > at else 0
        return isinstance(dim, int) and dims > 1 and dim % dims != 0
    if target in _BY_ROW:
        return True
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise not in target.tags:
        return False
    # What has fewer dimensions is the same for all rows.
    return all(
        operand in rows or not _is_tensor(operand) or operand.meta["val"].dim() < node.meta["val"].dim()
        for operand in node.all_input_nodes
    )


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
