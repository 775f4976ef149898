"""The inverse of the rewrite: packed groups and sites of a program that was quantised."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.calls import PACKED_LINEAR, ROTATE, PackedLinear, Rotate, group_of, operands, sites_of
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.passes.rewrite import META, buffers_of

PACKED_EMBEDDING = torch.ops.lopro.packed_embedding.default
_SHARED = ("perm", "signs", "down", "down_scale")
_OWN = ("codes", "scales", "zeros", "up", "up_scale")


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
    looked_up = {name for node in _calls(program, PACKED_EMBEDDING) for name in sites_of(node)}
    groups, sites = {}, {}
    for node in _calls(program, PACKED_LINEAR):
        (name,), call = sites_of(node), operands(PackedLinear, node)
        if name in sites:
            continue
        row = record["sites"][name]
        rows, width = row["shape"]
        own = buffers_of(program, name, _OWN)
        sites[name] = PackedSite(
            name, group_of(node), call.bits, call.group_size, rows, width, own, row, embedding=name in looked_up
        )
    for name, members in record["groups"].items():
        turn = rotations.get(name)
        block, skip = (turn.block, turn.skip) if turn else (1, 0)
        width = sites[members[0]].in_features
        groups[name] = PackedGroup(name, tuple(members), width, block, skip, buffers_of(program, name, _SHARED))
    return groups, sites


def _calls(program: ExportedProgram, target: object) -> list:
    return list(program.graph.find_nodes(op="call_function", target=target))  # pyright: ignore[reportArgumentType]
