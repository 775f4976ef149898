"""Recover inputs and layers from a quantised program: the inverse of the rewrite."""

from __future__ import annotations

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.layer import Activation, Factor, Input, Layer, Transform
from lopro_fx.passes.calls import PROJECT, ROTATE, ROUND, kind_of, packed_calls, stored_weight
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import group_of, record_of, sites_of
from lopro_fx.passes.weights import parameter_fqns, tensor_of


def recover(program: ExportedProgram) -> tuple[dict[str, Input], dict[str, Layer]]:
    """Inputs and layers by name, as `RewritePass` takes them; the tensors are the program's own.

    Raises:
        GraphError: the program was not quantised, or was optimised since, which merges and folds layers.
    """
    record = record_of(program, "recover")
    if "optimized" in record:
        raise GraphError("this program was optimised, which merges its layers: take the one before lopro_fx.optimize")
    fqns = parameter_fqns(program)

    def stored(node: Node) -> Tensor:
        return tensor_of(program, fqns[node.name])

    def factor(values: Node | None, scale: Node | None, dim: int) -> Factor | None:
        return None if values is None else Factor(stored(values), None if scale is None else stored(scale), dim)

    looked_up = {name for node in packed_calls(program.graph, "embedding") for name in sites_of(node)}
    layers: dict[str, Layer] = {}
    for node in packed_calls(program.graph, "linear", "experts"):
        (name,), call = sites_of(node), operands(node)
        if name not in layers:
            up, weight = (
                factor(call.up, call.up_scale, -1 if kind_of(node) == "experts" else 1),
                stored_weight(node, stored),
            )
            others = {key: stored(call.named[key]) for key in ("cells", "core") if call.named.get(key) is not None}
            layers[name] = Layer(name, group_of(node), weight, up, record["sites"][name], name in looked_up, **others)
    transforms = {group_of(node): operands(node) for node in _calls(program, ROTATE)}
    projections = {group_of(node): operands(node) for node in _calls(program, PROJECT)}
    roundings = {group_of(node): operands(node) for node in _calls(program, ROUND)}
    inputs = {}
    for name, readers in record["groups"].items():
        transform, down = Transform(), None
        if name in transforms:
            call = transforms[name]
            perm, signs = (None if node is None else stored(node) for node in (call.perm, call.signs))
            transform = Transform(perm, signs, call.block, call.skip)
        if name in projections:
            down = factor(projections[name].down, projections[name].scale, 0)
        activation = Activation(roundings[name].bits, roundings[name].group) if name in roundings else None
        inputs[name] = Input(name, tuple(readers), layers[readers[0]].in_features, transform, down, activation)
    return inputs, layers


def _calls(program: ExportedProgram, target: object) -> list[Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))  # pyright: ignore[reportArgumentType]
