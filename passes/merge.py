"""Merge packed Linears that read one activation: concatenate their out_features, then slice the result.

An int8 up factor has one scale per component and Linear. Where they differ, the merged `up_scale` has one row per
gcd(rows) rows: no factor is rounded again, and the results are those of the separate Linears.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.formats.base import Packed
from lopro_fx.layer import stored_bytes
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import (
    PackedPass,
    format_of,
    out_features,
    packed_calls,
    stored_weight,
    table_of,
    weight_fqn,
)
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META, Mark, Note, group_of, sites_of
from lopro_fx.passes.rewrite import enclosing

aten = torch.ops.aten
# Largest growth of the stored bytes: row counts with a small common divisor need many rows of `up_scale`.
_GROWTH = 0.01


class MergeLinearsPass(PackedPass):
    """Merge packed Linears that read one tensor and agree in format, spec, dtype of scales and low-rank branch.

    Skipped, with the reason in the record: a Linear without such a partner, one whose weight other nodes read too (it
    would be stored twice), one whose bias is computed, and a merge that would store over 1% more.
    """

    name = "merge"

    def edit(self, editor: ProgramEditor) -> list[Note]:
        readers: dict[Node, list[Node]] = {}
        for node in packed_calls(editor.graph, "linear"):
            readers.setdefault(operands(node).x, []).append(node)
        return [note for nodes in readers.values() for note in _merge_readers(editor, nodes)]

    def ensures(self, program: ExportedProgram) -> None:
        for node in packed_calls(program.graph, "linear"):
            rows, results = out_features(node), node.meta["val"].shape[-1]
            self.promise(rows == results, f"'{sites_of(node)[0]}' gives {results} features of {rows} rows")


def _merge_readers(editor: ProgramEditor, nodes: list[Node]) -> list[Note]:
    """Merge what can be merged among all packed Linears that read one tensor, in graph order."""
    notes: list[Note] = []
    alike: dict[tuple[tuple[str, Any], ...], list[Node]] = {}
    for node in nodes:
        reason = _reason_to_leave(editor, node)
        if reason:
            notes.append({"what": sites_of(node), "reason": reason})
        else:
            alike.setdefault(_key(node), []).append(node)
    for key, members in alike.items():
        note: Note = {"what": [name for node in members for name in sites_of(node)]}
        if len(members) == 1:
            note["reason"] = _reason_alone(key, [other for other in alike if other != key])
        elif written_between(operands(members[0]).x, members[0], members[-1]):
            note["reason"] = "the program writes into their input between them"
        else:
            tensors = _merged(editor, members)
            reason = tensors if isinstance(tensors, str) else _reason_of_size(editor, members, tensors)
            if isinstance(tensors, str) or reason:
                note["reason"] = reason
            else:
                note["into"] = f"{weight_fqn(editor, members[0])}.merged"
                _merge(editor, members, tensors, note["into"])
        notes.append(note)
    return notes


def _key(node: Node) -> tuple[tuple[str, Any], ...]:
    """Key that the members of a merge share, with names for the record."""
    call = operands(node)
    factor = None if call.up is None else (call.up.meta["val"].dtype, call.up_scale is None)
    format = format_of(node)
    spec = [(name.replace("_", " "), call.named[name]) for name in format.spec]
    types = [operand.meta["val"].dtype for name, operand in call.weights.items() if name != "up"]
    return ("format", format.name), *spec, ("low-rank branch", (call.latent, factor)), ("type of the scales", (*types,))


def _reason_to_leave(editor: ProgramEditor, node: Node) -> str | None:
    call = operands(node)
    if set(table_of(node).users) != {node}:
        return "its weight is applied more than once"
    if call.bias is not None and editor.tensor(call.bias) is None:
        return "its bias is computed by the program"
    return None


def _reason_alone(key: tuple[tuple[str, Any], ...], others: list[tuple[tuple[str, Any], ...]]) -> str:
    if not others:
        return "no other Linear reads its input"
    differing = {name: None for other in others for name, mine in key
                 if dict(other).get(name, mine) != mine}  # fmt: skip
    return f"the other Linears that read its input differ in {', '.join(differing)}"


def _stored(editor: ProgramEditor, node: Node) -> dict[str, Tensor]:
    """Packed tensors and bias of a packed Linear, by the operand's name."""
    return {key: editor.stored(operand).detach() for key, operand in _own(node).items()}


def _own(node: Node) -> dict[str, Node]:
    call = operands(node)
    return call.weights if call.bias is None else {**call.weights, "bias": call.bias}


def _merged(editor: ProgramEditor, members: list[Node]) -> dict[str, Tensor] | str:
    """Tensors of the merged Linear by operand name, or the reason why the format can't merge them."""
    weight = format_of(members[0]).cat([stored_weight(node, lambda at: editor.stored(at).detach()) for node in members])
    if not isinstance(weight, Packed):
        return weight
    parts, rows = [_stored(editor, node) for node in members], [out_features(node) for node in members]
    merged = dict(weight.tensors)
    if "up" in parts[0]:
        merged["up"] = torch.cat([part["up"] for part in parts])
    if "up_scale" in parts[0]:
        merged["up_scale"] = _up_scale([part["up_scale"] for part in parts], rows)
    known = next((part["bias"] for part in parts if "bias" in part), None)
    if known is not None:
        merged["bias"] = torch.cat([part.get("bias", known.new_zeros(count))
                                    for part, count in zip(parts, rows, strict=True)])  # fmt: skip
    return merged


def _up_scale(scales: list[Tensor], rows: list[int]) -> Tensor:
    """(rank,) if all agree, else (parts, rank): parts have equally many rows, and none spans two members."""
    if all(torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    runs = [(scale.view(-1, scale.shape[-1]), count) for scale, count in zip(scales, rows, strict=True)]
    step = math.gcd(*[count // len(run) for run, count in runs])
    return torch.cat([run.repeat_interleave(count // len(run) // step, 0) for run, count in runs])


def _reason_of_size(editor: ProgramEditor, members: list[Node], tensors: dict[str, Tensor]) -> str | None:
    def packed(values: dict[str, Tensor]) -> int:
        return stored_bytes(tensor for key, tensor in values.items() if key != "bias")

    before = sum(packed(_stored(editor, node)) for node in members)
    growth = packed(tensors) / before - 1
    return f"merged they would take {growth:.1%} more bytes, for scales of their factors" if growth > _GROWTH else None


def _merge(editor: ProgramEditor, members: list[Node], tensors: dict[str, Tensor], owner: str) -> None:
    first, rows = members[0], [out_features(node) for node in members]
    names = [name for node in members for name in sites_of(node)]
    # Members can share a bias.
    old = dict.fromkeys(operand for node in members for operand in _own(node).values())
    buffers = {key: editor.add_buffer(f"{owner}.{key}", tensor) for key, tensor in tensors.items()}
    stack = enclosing(first.meta.get("nn_module_stack", {}), tuple(names))

    def add(before: Node, sites: list[str], name: str, target: Any, *args: Any) -> Node:
        node = editor.add_call(before, name, target, args, first)
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = dict(stack)
        node.meta[META] = Mark(sites=sites, group=group_of(first))
        return node

    call = operands(first).replace(**{"bias": None, **buffers})
    merged = add(first, names, f"merged_{first.name}", call.operator, *call.args)
    ends = list(accumulate(rows, initial=0))
    parts = [add(first, sites_of(node), f"{node.name}_rows", aten.slice.Tensor, merged, -1, start, end)
             for node, (start, end) in zip(members, pairwise(ends), strict=True)]  # fmt: skip
    for node, part in zip(members, parts, strict=True):
        node.meta["val"] = part.meta["val"]
        if not editor.refresh_views(node):
            # A reader takes a view that a slice doesn't allow: give it a contiguous copy.
            part = add(part.next, sites_of(part), f"{node.name}_dense", aten.contiguous.default, part)
            node.meta["val"] = part.meta["val"]
            editor.refresh_views(node)
        editor.replace(node, part)
    for operand in old:
        editor.drop_unused_weight(operand)
    counters["merge.group"] += 1
    counters["merge.linear"] += len(members)
