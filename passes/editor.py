"""Edit a copy of an ExportedProgram: add buffers and nodes, drop what nothing reads, rebuild and validate."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import Parameter

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes import compat
from lopro_fx.passes.operands import Operands
from lopro_fx.passes.ties import identity

# Not allowed in a placeholder's name: it becomes an argument of a Python function and of compiled code.
_NO_IDENTIFIER = re.compile(r"[^A-Za-z0-9_]")
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


class ProgramEditor:
    """A private copy of a program's graph and signature; tensors are shared, never written.

    The cost of an edit doesn't depend on the size of the program: the signature is built at the end.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.graph_module = compat.deep_copy(program.graph_module)
        self.graph = self.graph_module.graph
        self._signature = copy.deepcopy(program.graph_signature)
        self._state = dict(program.state_dict)
        self._constants = dict(program.constants)
        self._fake = compat.fake_mode(program)
        # Copying renames nodes whose names are Python builtins (an input called `input`).
        self.by_name = {
            old.name: new for old, new in zip(program.graph_module.graph.nodes, self.graph.nodes, strict=True)
        }
        self._specs = dict(zip(self._placeholders(), self._signature.input_specs, strict=True))
        self._first_input = next(
            (node for node, spec in self._specs.items() if spec.kind is InputKind.USER_INPUT), None
        )
        self._targets = {
            node.name: spec.target
            for node, spec in self._specs.items()
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR) and spec.target
        }
        # Fake results of lopro's operators, by `_look` of their operands.
        self._results: dict[tuple[Any, ...], Tensor] = {}

    def _placeholders(self) -> list[Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    @cached_property
    def _tensors(self) -> set[str]:
        """FQNs of the program's own tensors."""
        return {*self._program.state_dict, *self._program.constants}

    @cached_property
    def _taken(self) -> set[str]:
        """FQNs of all tensors, and of the modules that they are in."""
        return {fqn[:end] for fqn in self._tensors for end, mark in enumerate(f"{fqn}.") if mark == "."}

    @property
    def names(self) -> Mapping[str, str]:
        """FQN of every parameter, buffer and constant by the name of its placeholder."""
        return self._targets

    def fqn(self, placeholder: Node) -> str:
        """Name of the parameter, buffer or constant that a placeholder stands for."""
        return self._targets[placeholder.name]

    def tensor(self, placeholder: Node) -> Tensor | None:
        """The parameter, buffer or constant that a placeholder stands for; None for any other node."""
        fqn = self._targets.get(placeholder.name)
        if fqn is None:
            return None
        tensor = self._state[fqn] if fqn in self._state else self._constants[fqn]
        assert isinstance(tensor, Tensor), fqn
        return tensor

    def stored(self, placeholder: Node) -> Tensor:
        """The parameter, buffer or constant that a placeholder stands for.

        Raises:
            GraphError: the program computes it.
        """
        tensor = self.tensor(placeholder)
        if tensor is None:
            raise GraphError(
                f"'{placeholder.name}' is computed by the program, and must be one of its tensors; optimise the "
                "program as it was quantised"
            )
        return tensor

    def set_tensor(self, placeholder: Node, tensor: Tensor) -> None:
        """Give a parameter, buffer or constant other values of the same shape and dtype; a parameter stays one."""
        fqn = self._targets[placeholder.name]
        owner = self._state if fqn in self._state else self._constants
        old = owner[fqn]
        assert isinstance(old, Tensor), fqn
        if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            raise GraphError(
                f"'{fqn}' is {tuple(old.shape)} {old.dtype}, and can't become {tuple(tensor.shape)} {tensor.dtype}"
            )
        owner[fqn] = Parameter(tensor, old.requires_grad) if isinstance(old, Parameter) else tensor

    def freeze(self, placeholder: Node) -> None:
        """Clear `requires_grad` of a parameter; leave anything else unchanged."""
        tensor = self.tensor(placeholder)
        if isinstance(tensor, Parameter) and tensor.requires_grad:
            fqn = self._targets[placeholder.name]
            owner = self._state if fqn in self._state else self._constants
            owner[fqn] = Parameter(tensor.detach(), requires_grad=False)

    def add_buffer(self, fqn: str, tensor: Tensor) -> Node:
        """Register a persistent buffer and return its placeholder.

        Underscores are appended to a name that a module or tensor of the program has.
        """
        fqn = self._unused(fqn)
        if self._first_input is not None:
            context = self.graph.inserting_before(self._first_input)
        else:
            context = self.graph.inserting_after(self._placeholders()[-1])
        with context:
            node = self.graph.placeholder("b_" + _NO_IDENTIFIER.sub("_", fqn))
        # Its target names the argument: otherwise FQNs that differ only in such characters would share one.
        node.target = node.name
        node.meta["val"] = compat.fake_input(self._fake, tensor)
        self._specs[node] = InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=True)
        self._state[fqn] = tensor
        self._targets[node.name] = fqn
        return node

    def _unused(self, fqn: str) -> str:
        """Append underscores until no tensor or module has the name, and no prefix of it names a tensor."""
        path: list[str] = []
        for name in fqn.split(".")[:-1]:
            path.append(name)
            while ".".join(path) in self._tensors:
                path[-1] += "_"
        fqn = ".".join((*path, fqn.rpartition(".")[2]))
        while fqn in self._taken:
            fqn += "_"
        self._taken.add(fqn)
        return fqn

    def add_operator(self, before: Node, name: str, operands: Operands, like: Node) -> Node:
        """`add_call` of an operator whose operands are given by name."""
        return self.add_call(before, name, operands.operator, operands.args, like, operands.kwargs)

    def add_call(
        self,
        before: Node,
        name: str,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        like: Node,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Node:
        """Insert a call before a node; `nn_module_stack` and `stack_trace` are those of `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
        node.meta["val"] = self._result(node)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        return node

    def _result(self, node: Node) -> Any:
        """The fake result of a call.

        lopro's operators decompose into many small ones, so calls with operands alike are computed once.
        """
        args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        assert callable(node.target)
        with compat.propagation(self._fake):
            if getattr(node.target, "namespace", "") != "lopro":
                return node.target(*args, **kwargs)
            key = node.target, *map(_look, args), *((name, _look(value)) for name, value in kwargs.items())
            if key in self._results:
                return self._results[key].clone()
            result = node.target(*args, **kwargs)
        if isinstance(result, Tensor):
            self._results[key] = result
        return result

    def replace(self, old: Node, new: Node) -> None:
        """Point every reader of `old` at `new`, and erase `old`."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def erase_unread(self, node: Node) -> None:
        """Erase a view or copy that only metadata assertions read, then its sources likewise."""
        if any(user.target is not _ASSERTION for user in node.users):
            return
        for user in list(node.users):
            self.graph.erase_node(user)
        if node.op != "call_function":
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for source in sources:
            self.erase_unread(source)

    def refresh_views(self, node: Node) -> bool:
        """Recompute the fake values of all views of `node` after its strides changed; False if one can't be taken."""
        for user in node.users:
            if compat.viewed_operand(user) is not node:
                continue
            args, kwargs = map_arg((user.args, user.kwargs), lambda operand: operand.meta["val"])
            assert callable(user.target)
            try:
                with compat.propagation(self._fake):
                    user.meta["val"] = user.target(*args, **kwargs)
            except (RuntimeError, ValueError):
                return False
            if not self.refresh_views(user):
                return False
        return True

    def drop_unused_weight(self, placeholder: Node) -> bool:
        """Remove a parameter or buffer that no node reads any more; False if something still does."""
        if placeholder.users:
            return False
        fqn = str(self._specs.pop(placeholder).target)
        self._state.pop(fqn, None)
        self._constants.pop(fqn, None)
        self.graph.erase_node(placeholder)
        return True

    def drop_unlisted(self, tensors: Collection[Any]) -> None:
        """Remove names without a placeholder, which strict export leaves, of tensors given by their `identity`."""
        listed = {spec.target for spec in self._specs.values()}
        for fqn, tensor in list(self._state.items()):
            if fqn not in listed and identity(tensor) in tensors:
                del self._state[fqn]

    def finish(self) -> ExportedProgram:
        """Lint, derive the signature from the graph, and rebuild the program, which recompiles the graph."""
        placeholders, results = self._placeholders(), self.graph.output_node().args[0]
        self._signature.input_specs = [self._specs[node] for node in placeholders]
        assert isinstance(results, Sequence)
        named = (*zip(placeholders, self._signature.input_specs, strict=True),
                 *zip(results, self._signature.output_specs, strict=True))  # fmt: skip
        for node, spec in named:
            if isinstance(node, Node) and hasattr(spec.arg, "name"):
                spec.arg.name = node.name
        self.graph.lint()
        return compat.rebuild(self._program, self.graph_module, self._signature, self._state, self._constants)


def _look(value: Any) -> Any:
    """Key of everything in an operand that a fake result can depend on; symbolic sizes compare by their expressions."""
    if not isinstance(value, Tensor):
        return type(value), value
    return value.dtype, value.device, str(value.shape), str(value.stride()), value.requires_grad
