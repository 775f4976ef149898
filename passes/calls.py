"""Shared by passes over quantised programs: lopro's operators, and the base of such a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.kernels.formats.base import Format, Packed
from lopro_fx.kernels.formats.registry import OPERATORS
from lopro_fx.passes.base import ProgramPass
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import Note, add_notes
from lopro_fx.passes.weights import parameter_fqns

ROTATE = torch.ops.lopro.rotate.default
PROJECT = torch.ops.lopro.project.default
ROUND = torch.ops.lopro.round_activation.default
# Kinds of operators with the same rotation and projection inside.
SITES = {"linear": "site", "experts": "experts_site"}
EXPERTS = ("experts", "experts_site")


def is_ours(node: Node) -> bool:
    """Whether a node calls an operator of this package."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lopro"


def kind_of(node: Node) -> str | None:
    """Kind of the format's operator that a node calls: "linear", "site", "embedding" or its own; None for others."""
    owner = OPERATORS.get(node.target)  # pyright: ignore[reportArgumentType]
    return None if owner is None else owner[1]


def packed_calls(graph: Graph, *kinds: str) -> list[Node]:
    """Nodes that call operators of these kinds, of any format, in graph order."""
    return [node for node in graph.nodes if kind_of(node) in kinds]


def format_of(node: Node) -> Format:
    """The format of the weight that a packed node reads."""
    return OPERATORS[node.target][0]  # pyright: ignore[reportArgumentType]


def table_of(node: Node) -> Node:
    """First tensor of the weight that a packed node reads, with one row per output feature."""
    return operands(node).named[format_of(node).tensor_names[0]]


def out_features(node: Node) -> int:
    """Output features of a packed node, of each expert where it has many."""
    return table_of(node).meta["val"].shape[1 if "slots" in operands(node).named else 0]


def weight_fqn(editor: ProgramEditor, node: Node) -> str:
    """Common prefix of the FQNs of a packed weight's tensors, without the dot."""
    return editor.fqn(table_of(node)).rpartition(".")[0]


def stored_weight(node: Node, stored: Callable[[Node], Tensor]) -> Packed:
    """Packed weight of a node; `stored` gives the tensors of its operands."""
    call, format = operands(node), format_of(node)
    tensors = {name: stored(call.named[name]) for name in format.tensor_names}
    width = call.named["in_features"] if "in_features" in call.named else call.x.meta["val"].shape[-1]
    return format.of({**call.named, **tensors}, int(width))


def packed_names(program: ExportedProgram) -> set[str]:
    """FQNs of the tensors that stand for weights in a program: packed tensors, factors, permutations, signs."""
    fqns = parameter_fqns(program)
    return {
        fqns[operand.name]
        for node in program.graph.nodes
        if is_ours(node)
        for operand in operands(node).weights.values()
        if operand.name in fqns
    }


def same_shape(left: Node, right: Node) -> bool:
    """Whether two nodes are tensors of one shape, without a guard on symbolic sizes."""
    # Imported here: it brings sympy, which a process that only runs programs doesn't need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    shapes = [node.meta["val"].shape for node in (left, right) if isinstance(node.meta["val"], torch.Tensor)]
    return len({len(shape) for shape in shapes}) == 1 < len(shapes) and statically_known_true(sym_eq(*shapes))


class PackedPass(ProgramPass):
    """A pass over a quantised program; every decision is added to the program's record under "optimized".

    A note holds "pass", "what" (names of layers), and the "reason" if they were skipped.

    Raises:
        GraphError: the program holds no packed Linear.
    """

    def requires(self, program: ExportedProgram) -> None:
        if not packed_calls(program.graph, "linear", "site", "int8", *EXPERTS):
            raise GraphError(
                "the program holds no packed Linear to optimise; quantise it first, and don't decompose it in between"
            )

    def call(self, program: ExportedProgram) -> ExportedProgram:
        editor = ProgramEditor(program)
        notes = [{"pass": self.name, **note} for note in self.edit(editor)]
        add_notes(editor.graph_module, notes)
        return editor.finish()

    def edit(self, editor: ProgramEditor) -> list[Note]:
        """Change the editor's graph and return notes of what was done."""
        raise NotImplementedError
