"""What the passes over quantised programs share: operands of lopro's nodes by name, and notes of what was decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.base import ProgramPass
from lopro_fx.passes.compat import bound_operands
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.rewrite import META
from lopro_fx.passes.weights import parameter_fqns

ROTATE = torch.ops.lopro.rotate.default
PROJECT = torch.ops.lopro.project.default
PACKED_LINEAR = torch.ops.lopro.packed_linear.default
PACKED_SITE = torch.ops.lopro.packed_site.default
CPU_SITE = torch.ops.lopro.cpu_site.default

# Operands of lopro's operators that hold what was a weight.
_TENSORS = {"codes", "scales", "zeros", "up", "up_scale", "perm", "signs", "down", "down_scale", "scale"}

Note = dict[str, Any]
_Operands = TypeVar("_Operands")


class Rotate(NamedTuple):
    """Operands of `lopro::rotate`."""

    x: Node
    perm: Node | None
    signs: Node | None
    block: int
    skip: int


class Project(NamedTuple):
    """Operands of `lopro::project`."""

    x: Node
    down: Node
    scale: Node | None


class PackedLinear(NamedTuple):
    """Operands of `lopro::packed_linear`."""

    x: Node
    codes: Node
    scales: Node
    zeros: Node
    bias: Node | None
    latent: Node | None
    up: Node | None
    up_scale: Node | None
    bits: int
    group_size: int


class PackedSite(NamedTuple):
    """Operands of `lopro::packed_site`."""

    x: Node
    perm: Node | None
    signs: Node | None
    block: int
    skip: int
    down: Node | None
    down_scale: Node | None
    codes: Node
    scales: Node
    zeros: Node
    bias: Node | None
    up: Node | None
    up_scale: Node | None
    bits: int
    group_size: int
    norm: Node | None = None
    eps: float = 0.0
    gate: Node | None = None
    activation: str = ""
    residual: Node | None = None


def operands(kind: Callable[..., _Operands], node: Node) -> _Operands:
    """Operands of a node by name, however they are passed; `kind` is the class for the node's operator."""
    return kind(*node.args, **node.kwargs)


def packed_names(program: ExportedProgram) -> set[str]:
    """FQNs of the tensors that stand for weights in a program: codes, scales, factors, permutations, signs."""
    fqns = parameter_fqns(program)
    return {
        fqns[operand.name]
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "lopro"
        for argument, operand in bound_operands(node)
        if argument.name in _TENSORS and operand.name in fqns
    }


def same_shape(left: Node, right: Node) -> bool:
    """Whether two nodes are tensors of one shape, without a guard on sizes that are free."""
    # Brings sympy, which a process that only runs programs has no need of.
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    shapes = [node.meta["val"].shape for node in (left, right) if isinstance(node.meta["val"], torch.Tensor)]
    return len({len(shape) for shape in shapes}) == 1 < len(shapes) and statically_known_true(sym_eq(*shapes))


def sites_of(node: Node) -> list[str]:
    """Names of the Linears that a packed node computes."""
    mark = node.meta.get(META, {})
    return mark.get("sites") or [mark.get("site", node.name)]


def group_of(node: Node) -> str:
    """Name of the group that one of lopro's nodes belongs to."""
    return node.meta.get(META, {}).get("group", node.name)


class PackedPass(ProgramPass):
    """A pass over a quantised program; every decision is added to the program's record under "optimized".

    A note holds "pass", "what" (names of layers), and the "reason" if they were left as they are.

    Raises:
        GraphError: the program holds no packed Linear.
    """

    name: str

    def requires(self, program: ExportedProgram) -> None:
        if not any(program.graph.find_nodes(op="call_function", target=t) for t in (PACKED_LINEAR, PACKED_SITE)):
            raise GraphError(
                "the program holds no packed Linear to optimise; quantise it first, and don't decompose it in between"
            )

    def call(self, program: ExportedProgram) -> ExportedProgram:
        editor = ProgramEditor(program)
        notes = [{"pass": self.name, **note} for note in self.edit(editor)]
        record = editor.graph_module.meta.get(META, {})
        editor.graph_module.meta[META] = {**record, "optimized": [*record.get("optimized", ()), *notes]}
        return editor.finish()

    def edit(self, editor: ProgramEditor) -> list[Note]:
        """Change the editor's graph and say what was done."""
        raise NotImplementedError
