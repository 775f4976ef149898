"""Find in-place writes of a program: to buffers, such as a KV cache, and to values between two nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.compat import viewed_operand, written_operands


def mutated_buffers(program: ExportedProgram) -> set[str]:
    """FQNs of buffers that the graph writes, in place (directly or through a view) or by a result copied back."""
    signature = program.graph_signature
    found, buffers = set(signature.buffers_to_mutate.values()), signature.inputs_to_buffers
    for node in program.graph.nodes:
        for operand in written_operands(node):
            name = base_of(operand).name
            if name in buffers:
                found.add(buffers[name])
    return found


def written_between(source: Node, first: Node, last: Node) -> bool:
    """Whether a node from `first` to before `last` writes `source` in place, directly or through a view."""
    owner, node = base_of(source), first
    while node is not last:
        if any(base_of(written) is owner for written in written_operands(node)):
            return True
        node = node.next
    return False


def clean_constants(program: ExportedProgram) -> dict[str, Any]:
    """`program.constants` with zeros for every non-persistent buffer that the graph writes.

    Running a program fills its caches, and with gradients enabled ties them to an autograd graph: neither belongs in a
    saved program.
    """
    constants: dict[str, Any] = dict(program.constants)
    for name in mutated_buffers(program) & constants.keys():
        constants[name] = torch.zeros_like(constants[name]).detach()
    return constants


def base_of(node: Node) -> Node:
    """Follow views from `node` to the node that owns the storage."""
    while (viewed := viewed_operand(node)) is not None:
        node = viewed
    return node
