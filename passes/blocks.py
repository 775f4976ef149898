"""Find the blocks of a program: the repeated modules, such as decoder layers, that its Linears lie in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.sites import Group


@dataclass(frozen=True)
class Block:
    """A run of nodes.

    Args:
        name: module path, or the group's name where the group is in no repeated module.
        groups: of Linears whose first use is in the block, in graph order.
        start, end: places in the graph of its first node and of the node behind it.
        outputs: floating-point nodes, numbers left out, that depend on its Linears and are read behind it.
    """

    name: str
    groups: tuple[Group, ...]
    start: int
    end: int
    outputs: tuple[Node, ...]


def find_blocks(program: ExportedProgram, groups: Sequence[Group]) -> list[Block]:
    """Divide `groups`, which are in graph order, into blocks; a group in no repeated module is one of its own."""
    nodes = list(program.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    merged: list[tuple[str, list[Group]]] = []
    for group in groups:
        path = _item(group.sites[0].nodes[0])
        if path and merged and merged[-1][0] == path:
            merged[-1][1].append(group)
        else:
            merged.append((path or group.name, [group]))
    firsts = [[site.nodes[0] for group in own for site in group.sites] for _, own in merged]
    starts = [min(_start(path, own, nodes, place) for own in firsts[i]) for i, (path, _) in enumerate(merged)]
    blocks = []
    for i, (path, own) in enumerate(merged):
        limit = starts[i + 1] if i + 1 < len(merged) else len(nodes)
        inside = [place[node] for node in firsts[i]]
        inside += [index for index in range(starts[i], limit) if _item(nodes[index]) == path]
        end = max(inside) + 1
        outputs = _outputs(nodes[starts[i] : end], firsts[i])
        blocks.append(Block(path, tuple(own), starts[i], end, outputs))
    return blocks


def _item(node: Node) -> str | None:
    """Path of the outermost list item that the node's module lies in, such as "model.layers.3"."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack", {})
    for path, _ in stack.values():
        parts = path.split(".")
        for index, part in enumerate(parts):
            if part.isdecimal():
                return ".".join(parts[: index + 1])
    return None


def _start(path: str, first: Node, nodes: Sequence[Node], place: Mapping[Node, int]) -> int:
    """Place of the first of the nodes in module `path` that lead up to `first` without one of another module."""
    index = place[first]
    while index and nodes[index - 1].op == "call_function" and _item(nodes[index - 1]) == path:
        index -= 1
    return index


def _outputs(nodes: Sequence[Node], sites: Sequence[Node]) -> tuple[Node, ...]:
    inside, reached, found = set(nodes), set(sites), []
    for node in nodes:
        if reached.intersection(node.all_input_nodes):
            reached.add(node)
        value = node.meta.get("val")
        floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
        if node in reached and floating and any(user not in inside for user in node.users):
            found.append(node)
    return tuple(found)
