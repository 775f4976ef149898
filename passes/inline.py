"""Inline nested graphs of grad and autocast modes that inference doesn't need: their Linears become visible.

`torch.no_grad()` inside a forward becomes `wrap_with_set_grad_enabled`, and `autocast(enabled=False)` becomes
`wrap_with_autocast`: neither changes a program that runs without gradients and autocast. An enabled autocast changes
dtypes and stays nested.
"""

from __future__ import annotations

import operator

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.base import ProgramPass, counters
from lopro_fx.passes.editor import ProgramEditor

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def _operands(node: Node) -> tuple[Node, list[Node]] | None:
    """(node of the nested graph, its operands) if `node` can be inlined, else None."""
    if node.target is _GRAD:
        _, body, *operands = node.args
    elif node.target is _AUTOCAST and node.args[2] is False:
        _, _, _, _, body, *operands = node.args
    else:
        return None
    assert isinstance(body, Node)
    return body, operands  # pyright: ignore[reportReturnType]


def _candidates(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and _operands(node)]


class InlineModesPass(ProgramPass):
    """Inline such graphs; return `program` itself if there are none."""

    name = "inline"

    def call(self, program: ExportedProgram) -> ExportedProgram:
        while names := [node.name for node in _candidates(program)]:
            editor = ProgramEditor(program)
            for name in names:
                self._inline(editor, editor.by_name[name])
                counters["inline.nested_graph"] += 1
            program = editor.finish()
        return program

    def ensures(self, program: ExportedProgram) -> None:
        for node in _candidates(program):
            self.promise(False, f"'{node.name}' is not inlined")

    def _inline(self, editor: ProgramEditor, call: Node) -> None:
        found = _operands(call)
        assert found is not None
        body, operands = found
        nested = editor.graph_module.get_submodule(str(body.target))
        assert isinstance(nested, GraphModule)
        placeholders = nested.graph.find_nodes(op="placeholder")
        env: dict[Node, Node] = dict(zip(placeholders, operands, strict=True))
        results: tuple[Node, ...] = ()
        with editor.graph.inserting_before(call):
            for node in nested.graph.nodes:
                if node.op == "output":
                    results = tuple(env[value] for value in node.args[0])
                elif node.op == "get_attr":
                    target = f"{body.target}_{node.target}".replace(".", "_")
                    editor.graph_module.add_module(target, nested.get_submodule(str(node.target)))
                    env[node] = editor.graph.get_attr(target)
                elif node.op == "call_function":
                    env[node] = editor.graph.node_copy(node, lambda operand, env=env: env[operand])
        for getter in list(call.users):
            index = getter.args[1] if getter.target is operator.getitem else None
            if not isinstance(index, int):
                raise GraphError(f"'{getter.name}' reads all results of '{call.name}' at once; export the model again")
            editor.replace(getter, results[index])
        editor.graph.erase_node(call)
        if not body.users:
            editor.graph.erase_node(body)
