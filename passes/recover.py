"""The inverse of the rewrite: packed groups and sites of a program that was quantised."""

from __future__ import annotations

from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.calls import PACKED_EMBEDDING, PACKED_LINEAR, PROJECT, ROTATE
from lopro_fx.passes.operands import Operands, operands
from lopro_fx.passes.packed import PackedGroup, PackedSite
from lopro_fx.passes.record import group_of, record_of, sites_of
from lopro_fx.passes.weights import parameter_fqns, tensor_of

# Names in a group of what `lopro::project` reads.
_FACTOR = {"down": "down", "scale": "down_scale"}


def recover(program: ExportedProgram) -> tuple[dict[str, PackedGroup], dict[str, PackedSite]]:
    """Groups and sites by name, as `RewritePass` takes them; the tensors are the program's own.

    Raises:
        GraphError: the program was not quantised, or was optimised after it, which merges and folds what is asked for.
    """
    record = record_of(program, "recover")
    if "optimized" in record:
        raise GraphError("this program was optimised, which merges its layers: take the one before lopro_fx.optimize")
    rotations = {group_of(node): operands(node) for node in _calls(program, ROTATE)}
    projections = {group_of(node): operands(node) for node in _calls(program, PROJECT)}
    fqns = parameter_fqns(program)

    def tensors(call: Operands | None) -> dict[str, Tensor]:
        weights = call.weights if call else {}
        return {key: tensor_of(program, fqns[node.name]) for key, node in weights.items()}

    looked_up = {name for node in _calls(program, PACKED_EMBEDDING) for name in sites_of(node)}
    groups, sites = {}, {}
    for node in _calls(program, PACKED_LINEAR):
        (name,), call = sites_of(node), operands(node)
        if name in sites:
            continue
        row = record["sites"][name]
        rows, width = row["shape"]
        sites[name] = PackedSite(
            name, group_of(node), call.bits, call.group_size, rows, width, tensors(call), row,
            embedding=name in looked_up,
        )  # fmt: skip
    for name, members in record["groups"].items():
        turn = rotations.get(name)
        block, skip = (turn.block, turn.skip) if turn else (1, 0)
        factor = {_FACTOR[key]: tensor for key, tensor in tensors(projections.get(name)).items()}
        shared = {**tensors(turn), **factor}
        width = sites[members[0]].in_features
        groups[name] = PackedGroup(name, tuple(members), width, block, skip, shared)
    return groups, sites


def _calls(program: ExportedProgram, target: object) -> list:
    return list(program.graph.find_nodes(op="call_function", target=target))  # pyright: ignore[reportArgumentType]
