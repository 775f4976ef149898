"""Run an exported graph node by node on all batches in lockstep.

Every value is dropped after its last use, so memory holds the live activations of all batches and no more. The runner
stops at chosen nodes and yields their inputs. Linears can be replaced there, so later nodes read the replacement's
results. It may run on another device than that of the weights, which are then copied for each node that reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_aggregate

from lopro_fx.devices import home_of
from lopro_fx.errors import CalibrationError
from lopro_fx.passes.compat import is_mutable, written_operands
from lopro_fx.passes.experts import ROUTED
from lopro_fx.passes.mutation import base_of

_EMBEDDING = torch.ops.aten.embedding.default


class LockstepRunner:
    """One pass of `program` over `batches` (flattened user inputs) on `device`.

    `replaced` maps a Linear's node to a function of input and bias that is called instead, and the node of experts to
    one of input, ids and slots; the caller may add to it at every stop.
    """

    def __init__(
        self, program: ExportedProgram, batches: Sequence[Sequence[Any]], device: torch.device | None = None
    ) -> None:
        self.replaced: dict[Node, Callable[..., Tensor]] = {}
        self.device = device or home_of(program)
        self._moves = self.device != home_of(program)
        self._program = program
        self._nodes = list(program.graph.nodes)
        self._mutates = any(is_mutable(node.target) for node in self._nodes)
        self._shared: dict[Node, Any] = {}
        self._values: list[dict[Node, Any]] = [{} for _ in batches]
        self._last_use = _last_uses(self._nodes)
        # Nodes before this one have run.
        self._next = 0
        self._bind(batches)

    def allow_gradients(self) -> None:
        """Copy tensors of inference mode, through which no gradient goes; call it before the first node runs."""
        for values in (self._shared, *self._values):
            values.update((node, value.clone()) for node, value in values.items()
                          if isinstance(value, Tensor) and value.is_inference())  # fmt: skip

    def stops(self, at: set[Node]) -> Iterator[tuple[Node, list[Any]]]:
        """Yield (node, its first operand for every batch) before each node in `at` runs; stop at the last of them."""
        for node, (inputs, *_) in self.operand_stops(at, 1):
            yield node, inputs

    def operand_stops(self, at: set[Node], count: int) -> Iterator[tuple[Node, list[list[Any]]]]:
        """`stops` with the first `count` operands, each for every batch."""
        remaining = len(at)
        for index, node in enumerate(self._nodes[self._next :], self._next):
            self._next = index
            if node in at:
                yield node, [[self._near(self._value(operand, values)) for values in self._values]
                             for operand in node.args[:count]]  # fmt: skip
                remaining -= 1
                if not remaining:
                    return
            self._run(node)
            self._free(self._last_use.get(node, ()))

    def advance(self, end: int) -> None:
        """Run what has not run of the graph's first `end` nodes."""
        for node in self._nodes[self._next : end]:
            self._run(node)
            self._free(self._last_use.get(node, ()))
        self._next = max(self._next, end)

    def values(self, node: Node) -> list[Any]:
        """What `node`, which has run and is read later, gave for every batch."""
        return [self._value(node, values) for values in self._values]

    def outputs(self) -> list[Any]:
        """Run what has not run yet and return the program's outputs for every batch."""
        for node in self._nodes[self._next :]:
            if node.op == "output":
                brought = self._brought(node)
                return [self._resolve(node.args[0], values, brought) for values in self._values]
            self._run(node)
            self._free(self._last_use.get(node, ()))
        raise AssertionError("a graph without an output")

    def fork(self, batches: Sequence[int] | None = None) -> LockstepRunner:
        """Return a runner that goes on from the present stop by itself; it shares what this one has computed.

        Args:
            batches: places of those to go on with; None is all.

        Raises:
            CalibrationError: the graph will write in place to what has been computed, which the two would both see.
        """
        computed = self._shared.keys() | {node for values in self._values for node in values}
        rest = self._nodes[self._next :] if self._mutates else ()
        if any(base_of(written) in computed for node in rest for written in written_operands(node)):
            raise CalibrationError(
                "a program that writes in place to what it has computed, such as the buffers of a cache or a sum by "
                "+=, can't run twice from its middle, which a budget and learned rounding need: calibrate a program of "
                "the same model without such writes, and apply the state to this one"
            )
        forked = copy(self)
        forked.replaced = dict(self.replaced)
        forked._shared = dict(self._shared)
        chosen = self._values if batches is None else [self._values[place] for place in batches]
        forked._values = [dict(values) for values in chosen]
        return forked

    def _bind(self, batches: Sequence[Sequence[Any]]) -> None:
        program = self._program
        user = 0
        specs = program.graph_signature.input_specs
        for node, spec in zip(program.graph.find_nodes(op="placeholder"), specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                for values, batch in zip(self._values, batches, strict=True):
                    # A graph may write to an input, such as a cache: each run writes to a copy of its own.
                    given = batch[user]
                    values[node] = self._near(given.clone() if self._mutates and isinstance(given, Tensor) else given)
                user += 1
                continue
            assert spec.target is not None
            table = program.state_dict if spec.target in program.state_dict else program.constants
            tensor = table[spec.target]
            if not isinstance(tensor, Tensor):
                self._shared[node] = tensor
                continue
            tensor = tensor.detach()
            if self._mutates and spec.kind == InputKind.BUFFER:
                # A cache that the graph writes is private to each batch, and the program's own copy stays clean.
                for values in self._values:
                    values[node] = self._near(tensor.clone())
            else:
                self._shared[node] = tensor

    def _run(self, node: Node) -> None:
        if node.op == "placeholder":
            return
        if node.op == "get_attr":
            self._shared[node] = _attribute(self._program.graph_module, str(node.target))
            return
        assert node.op == "call_function", node.format_node()
        if not self._mutates and all(operand in self._shared for operand in node.all_input_nodes):
            # A value that depends on no input is the same for every batch.
            self._shared[node] = self._call(node, {}, self._brought(node))
            return
        brought = self._brought(node)
        for index, values in enumerate(self._values):
            if node.target is _EMBEDDING:
                self._check_indices(node, values, index)
            values[node] = self._call(node, values, brought)
        # The replacement holds an unpacked weight, which would stay in memory.
        self.replaced.pop(node, None)

    def _value(self, operand: Any, values: dict[Node, Any]) -> Any:
        return values.get(operand, self._shared.get(operand)) if isinstance(operand, Node) else operand

    def _free(self, dead: Sequence[Node]) -> None:
        for node in dead:
            self._shared.pop(node, None)
            for values in self._values:
                values.pop(node, None)

    def _near(self, value: Any) -> Any:
        return value.to(self.device) if self._moves and isinstance(value, Tensor) else value

    def _brought(self, node: Node) -> dict[Node, Any]:
        """Copy operands that all batches share to the device on which the node runs."""
        found = {}
        unread = node.args[_weight_place(node)] if node in self.replaced else None
        for operand in node.all_input_nodes:
            if operand in self._shared and operand is not unread:
                found[operand] = self._near(self._shared[operand])
        return found

    def _resolve(self, operands: Any, values: dict[Node, Any], brought: dict[Node, Any]) -> Any:
        def load(operand: Any) -> Any:
            if isinstance(operand, Node):
                return brought[operand] if operand in brought else values[operand]
            # The graph names the device of its tracing; new tensors would be made there.
            return self.device if self._moves and isinstance(operand, torch.device) else operand

        return map_aggregate(operands, load)

    def _call(self, node: Node, values: dict[Node, Any], brought: dict[Node, Any]) -> Any:
        if node in self.replaced:
            given = [operand for place, operand in enumerate(node.args) if place != _weight_place(node)]
            if node.target is not ROUTED and len(given) < 2:
                given.append(None)
            args, kwargs, target = self._resolve(tuple(given), values, brought), {}, self.replaced[node]
        else:
            args, kwargs = self._resolve(node.args, values, brought), self._resolve(node.kwargs, values, brought)
            target: Callable[..., Any] = node.target  # pyright: ignore[reportAssignmentType]
        try:
            return target(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            line = str(error).splitlines()[0]
            raise CalibrationError(f"node '{node.name}' ({node.target}) failed during calibration: {line}") from error

    def _check_indices(self, node: Node, values: dict[Node, Any], index: int) -> None:
        operands: Any = [values.get(operand, self._shared.get(operand)) for operand in node.all_input_nodes[:2]]
        table, ids = operands
        rows = table.shape[0]
        if ids.numel() and (ids.min() < 0 or ids.max() >= rows):
            raise CalibrationError(
                f"calibration batch {index}: node '{node.name}' looks up ids {int(ids.min())}..{int(ids.max())} in a "
                f"table of {rows} rows; was the text encoded with another model's tokenizer?"
            )


def _weight_place(node: Node) -> int:
    return 2 if node.target is ROUTED else 1


def _last_uses(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """Map each node to the values that nothing after it reads."""
    last: dict[Node, Node] = {}
    for node in nodes:
        last[node] = node
        for operand in node.all_input_nodes:
            last[operand] = node
    result: dict[Node, list[Node]] = {}
    for value, reader in last.items():
        result.setdefault(reader, []).append(value)
    return result


def _attribute(root: torch.nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
