"""Hash of everything that decides a program's numbers: equal in every process, different for different programs.

Node names, source lines and example inputs are left out: they change nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Digest:
    """SHA-256 of a sequence of values, each preceded by its size or shape: otherwise "ab", "c" would equal "abc"."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def text(self, *parts: object) -> None:
        for part in parts:
            data = str(part).encode()
            self._hash.update(b"%d:" % len(data) + data)

    def value(self, value: Any) -> None:
        """Add a tensor by dtype, shape, device type and elements; anything else by its class and text."""
        if isinstance(value, Tensor):
            self.text("tensor", value.dtype, tuple(value.shape), value.device.type)
            data = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._hash.update(data.numpy().data)
        else:
            self.text(type(value).__qualname__, _ADDRESS.sub("", repr(value)))

    def program(self, program: ExportedProgram) -> None:
        """Add a program: graph with its sizes, parameters, buffers and constants."""
        for spec in program.graph_signature.input_specs:
            self.text(spec.kind.name, spec.target)
        self._graph(program.graph_module, {})
        for table in (program.state_dict, program.constants):
            for name, value in sorted(table.items()):
                self.text(name)
                self.value(value)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _graph(self, module: GraphModule, symbols: dict[str, str]) -> None:
        index = {node: f"%{place}" for place, node in enumerate(module.graph.nodes)}
        self.text(len(index))
        for node in module.graph.nodes:
            value = _attribute(module, node)
            target = node.target if node.op == "call_function" else ""
            self.text(node.op, _ADDRESS.sub("", str(target)), _described([node.args, node.kwargs], index))
            self.text(*(_renamed(line, symbols) for line in _sizes(node.meta.get("val"))))
            if isinstance(value, GraphModule):
                self._graph(value, symbols)
            elif node.op == "get_attr":
                self.value(value)


def _attribute(module: GraphModule, node: Node) -> Any:
    value: Any = None
    if node.op == "get_attr":
        value = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
    return value


def _described(value: Any, index: dict[Node, str]) -> str:
    """Operands of a node as text, nodes by their index."""
    if isinstance(value, Node):
        return index[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_described(item, index) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_described(value[key], index)}' for key in sorted(value))}}}"
    if isinstance(value, slice):
        return f"slice{_described([value.start, value.stop, value.step], index)}"
    return _ADDRESS.sub("", repr(value))


def _sizes(value: Any) -> Iterable[str]:
    """Dtype and shape of every tensor in a node's value."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {list(value.shape)}"
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _sizes(item)


def _renamed(line: str, symbols: dict[str, str]) -> str:
    """Rename symbolic sizes by first appearance: their own names depend on what the process traced before."""
    dtype, _, shape = line.partition(" ")
    return f"{dtype} {_SYMBOL.sub(lambda found: symbols.setdefault(found[0], f'size{len(symbols)}'), shape)}"
