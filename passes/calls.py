"""What the passes over quantised programs share: lopro's operators, and the form of such a pass."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.base import ProgramPass
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import Note, add_notes
from lopro_fx.passes.weights import parameter_fqns

ROTATE = torch.ops.lopro.rotate.default
PROJECT = torch.ops.lopro.project.default
PACKED_LINEAR = torch.ops.lopro.packed_linear.default
PACKED_SITE = torch.ops.lopro.packed_site.default
CPU_SITE = torch.ops.lopro.cpu_site.default
PACKED_EMBEDDING = torch.ops.lopro.packed_embedding.default


def packed_names(program: ExportedProgram) -> set[str]:
    """FQNs of the tensors that stand for weights in a program: codes, scales, factors, permutations, signs."""
    fqns = parameter_fqns(program)
    return {
        fqns[operand.name]
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lopro"
        for operand in operands(node).weights.values()
        if operand.name in fqns
    }


def same_shape(left: Node, right: Node) -> bool:
    """Whether two nodes are tensors of one shape, without a guard on sizes that are free."""
    # Brings sympy, which a process that only runs programs has no need of.
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    shapes = [node.meta["val"].shape for node in (left, right) if isinstance(node.meta["val"], torch.Tensor)]
    return len({len(shape) for shape in shapes}) == 1 < len(shapes) and statically_known_true(sym_eq(*shapes))


class PackedPass(ProgramPass):
    """A pass over a quantised program; every decision is added to the program's record under "optimized".

    A note holds "pass", "what" (names of layers), and the "reason" if they were left as they are.

    Raises:
        GraphError: the program holds no packed Linear.
    """

    def requires(self, program: ExportedProgram) -> None:
        if not any(program.graph.find_nodes(op="call_function", target=t) for t in (PACKED_LINEAR, PACKED_SITE)):
            raise GraphError(
                "the program holds no packed Linear to optimise; quantise it first, and don't decompose it in between"
            )

    def call(self, program: ExportedProgram) -> ExportedProgram:
        editor = ProgramEditor(program)
        notes = [{"pass": self.name, **note} for note in self.edit(editor)]
        add_notes(editor.graph_module, notes)
        return editor.finish()

    def edit(self, editor: ProgramEditor) -> list[Note]:
        """Change the editor's graph and say what was done."""
        raise NotImplementedError
