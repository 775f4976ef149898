"""Bytes that a program reads of its own tensors when it runs once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.calls import EXPERTS, format_of, kind_of
from lopro_fx.passes.experts import ROUTED
from lopro_fx.passes.operands import operands
from lopro_fx.passes.ties import identity


def weight_bytes(program: ExportedProgram) -> int:
    """Bytes of parameters, buffers and constants that one run reads, tied ones once.

    A tensor that an operator takes counts whole; a table that is only looked up counts the rows that are read, and
    experts count as many as there are pairs of token and expert, if those are fewer.
    """
    signature = program.graph_signature
    names: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    read: dict[tuple[Any, ...], int] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in names or not node.users:
            continue
        tensor = tensors[names[node.name]]
        assert isinstance(tensor, Tensor)
        size = tensor.numel() * tensor.element_size()
        used = min(size, sum(_looked_up(user, node, tensor) or size for user in node.users))
        key = identity(tensor)
        read[key] = max(read.get(key, 0), used)
    return sum(read.values())


def _looked_up(user: Node, table: Node, tensor: Tensor) -> int | None:
    """Bytes of the rows that `user` looks up in `table`; None if it reads the whole."""
    if (kind_of(user) in (*EXPERTS, "cpu_experts") or user.target is ROUTED) and _by_expert(user, table):
        pairs = operands(user).ids.meta["val"].numel()
        return int(pairs) * tensor[0].numel() * tensor.element_size() if isinstance(pairs, int) else None
    packed = kind_of(user) == "embedding"
    if not packed and user.target is not torch.ops.aten.embedding.default:
        return None
    asked = operands(user).ids if packed else operands(user).indices
    if asked is table:
        return None
    count = asked.meta["val"].numel()
    return int(count) * tensor[0].numel() * tensor.element_size() if isinstance(count, int) else None


def _by_expert(user: Node, table: Node) -> bool:
    """Whether an operator of experts reads the parts of `table` of those experts alone."""
    if user.target is ROUTED:
        return operands(user).weight is table
    return table in [operands(user).named[name] for name in (*format_of(user).tensor_names, "core")]
