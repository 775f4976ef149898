"""The inverse of the rewrite: packed groups and sites of a program that was quantised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.calls import (
    PACKED_LINEAR,
    PROJECT,
    ROTATE,
    PackedLinear,
    Project,
    Rotate,
    group_of,
    operands,
    sites_of,
)
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.passes.rewrite import META
from lopro_fx.passes.weights import parameter_fqns, tensor_of

PACKED_EMBEDDING = torch.ops.lopro.packed_embedding.default


def recover(program: ExportedProgram) -> tuple[dict[str, PackedGroup], dict[str, PackedSite]]:
    """Groups and sites by name, as `RewritePass` takes them; the tensors are the program's own.

    Raises:
        GraphError: the program was not quantised, or was optimised after it, which merges and folds what is asked for.
    """
    record = program.graph_module.meta.get(META)
    if record is None:
        raise GraphError("this program was not quantised by lopro_fx; there is nothing to recover")
    if "optimized" in record:
        raise GraphError("this program was optimised, which merges its layers: take the one before lopro_fx.optimize")
    rotations = {group_of(node): operands(Rotate, node) for node in _calls(program, ROTATE)}
    projections = {group_of(node): operands(Project, node) for node in _calls(program, PROJECT)}
    fqns = parameter_fqns(program)

    def tensors(**named: Node | None) -> dict[str, Tensor]:
        return {key: tensor_of(program, fqns[node.name]) for key, node in named.items() if node is not None}

    looked_up = {name for node in _calls(program, PACKED_EMBEDDING) for name in sites_of(node)}
    groups, sites = {}, {}
    for node in _calls(program, PACKED_LINEAR):
        (name,), call = sites_of(node), operands(PackedLinear, node)
        if name in sites:
            continue
        row = record["sites"][name]
        rows, width = row["shape"]
        own = tensors(codes=call.codes, scales=call.scales, zeros=call.zeros, up=call.up, up_scale=call.up_scale)
        sites[name] = PackedSite(
            name, group_of(node), call.bits, call.group_size, rows, width, own, row, embedding=name in looked_up
        )
    for name, members in record["groups"].items():
        turn, projection = rotations.get(name), projections.get(name)
        block, skip = (turn.block, turn.skip) if turn else (1, 0)
        shared = tensors(perm=turn.perm, signs=turn.signs) if turn else {}
        shared |= tensors(down=projection.down, down_scale=projection.scale) if projection else {}
        width = sites[members[0]].in_features
        groups[name] = PackedGroup(name, tuple(members), width, block, skip, shared)
    return groups, sites


def _calls(program: ExportedProgram, target: object) -> list:
    return list(program.graph.find_nodes(op="call_function", target=target))  # pyright: ignore[reportArgumentType]
