"""Resolve the parameter that a node shows, directly or through views, transposes and copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.fx import Graph, Node

from lopro_fx.passes.compat import viewed_operand, written_operands
from lopro_fx.passes.mutation import base_of

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# These copy or cast their first operand; the others say how.
_COPIES = frozenset({
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.to.dtype,
    aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default, aten.lift_fresh_copy.default,
})  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A node whose elements are those of a parameter, buffer or constant.

    `view` is its placement in a contiguous parameter, on the meta device; None if that isn't known.
    """

    placeholder: Node
    view: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether it is the whole parameter, not transposed."""
        return self._is(lambda matrix: matrix)

    @property
    def transposed(self) -> bool:
        """Whether it is the transpose of the parameter."""
        return self._is(torch.t)

    @property
    def whole_stack(self) -> bool:
        """Whether it is a whole parameter of three dimensions."""
        return self._is(lambda matrices: matrices, 3)

    @property
    def transposed_stack(self) -> bool:
        """Whether it is a parameter of three dimensions, each matrix transposed."""
        return self._is(lambda matrices: matrices.mT, 3)

    def _is(self, of: Callable[[Tensor], Tensor], dims: int = 2) -> bool:
        matrix = _contiguous(self.placeholder.meta["val"])
        return self.view is not None and matrix.dim() == dims and _placement(self.view) == _placement(of(matrix))


class Weights:
    """Parameters, buffers and constants of a graph that nothing writes, by placeholder name."""

    def __init__(self, graph: Graph, fqns: Mapping[str, str], signature: ExportGraphSignature) -> None:
        self._written = {base_of(operand) for node in graph.nodes for operand in written_operands(node)}
        self._signature = signature
        mutated = set(signature.buffers_to_mutate.values())
        self.fqns = {name: fqn for name, fqn in fqns.items() if fqn not in mutated}
        self._parameters = set(signature.parameters)

    @classmethod
    def of(cls, program: ExportedProgram) -> Weights:
        """Weights of a program."""
        return cls(program.graph, parameter_fqns(program), program.graph_signature)

    def inside(self, graph: Graph, operands: Sequence[Node]) -> Weights:
        """Weights of a nested graph that is called with `operands`."""
        placeholders = graph.find_nodes(op="placeholder")
        given = zip(placeholders, map(self.seen, operands), strict=False)
        return Weights(graph, {node.name: self.fqn(seen) for node, seen in given if seen}, self._signature)

    def fqn(self, seen: Seen) -> str:
        """FQN of a seen weight."""
        return self.fqns[seen.placeholder.name]

    def is_parameter(self, seen: Seen) -> bool:
        """Whether a seen weight is a parameter, and neither a buffer nor a constant."""
        return self.fqn(seen) in self._parameters

    def seen(self, node: Node) -> Seen | None:
        """Resolve `node` to the weight that it shows; None if it is computed."""
        chain: list[Node] = []
        while node not in self._written:
            if node.name in self.fqns:
                return Seen(node, _view(node, chain[::-1]))
            source = node.args[0] if node.target in _COPIES else viewed_operand(node)
            if not isinstance(source, Node):
                return None
            chain.append(node)
            node = source
        return None


def _view(placeholder: Node, chain: Sequence[Node]) -> Tensor | None:
    value = _contiguous(placeholder.meta["val"])
    try:
        for step in chain:
            if step.target not in _COPIES:
                assert callable(step.target)
                value = step.target(value, *step.args[1:], **step.kwargs)
            elif step.meta["val"].dtype not in FLOATS:
                return None
    # Sizes that the program computes are nodes, which operators refuse.
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
        return None
    return value if isinstance(value, Tensor) and value.dtype == torch.float32 else None


def parameter_fqns(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name to FQN, for parameters, buffers and constants."""
    return {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target is not None
    }


def tensor_of(program: ExportedProgram, fqn: str) -> Tensor:
    """A parameter, buffer or constant; non-persistent buffers lie among the constants."""
    tensor = program.state_dict[fqn] if fqn in program.state_dict else program.constants[fqn]
    assert isinstance(tensor, Tensor), fqn
    return tensor


def _contiguous(value: Tensor) -> Tensor:
    # At offset 1 of its storage: a copy, such as `reshape` may make, starts at 0 and can't be taken for a view.
    return torch.empty(1 + value.numel(), dtype=torch.float32, device="meta")[1:].view(value.shape)


def _placement(view: Tensor) -> tuple[object, ...]:
    """Equal for views of one tensor that hold the same elements in the same order."""
    strides = [stride for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1]
    return tuple(view.shape), strides, view.storage_offset()
