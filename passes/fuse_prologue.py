"""Fuse RMS norms and gated activations into the site that is their only reader: a kernel applies them as it loads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import (
    EXPERTS,
    ROTATE,
    ROUND,
    SITES,
    PackedPass,
    kind_of,
    packed_calls,
    same_shape,
    table_of,
    weight_fqn,
)
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fuse_site import fused_operands, site_operator
from lopro_fx.passes.mutation import written_between
from lopro_fx.passes.norms import Norm, match_norm
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META, Note, sites_of

aten = torch.ops.aten
_ASSERTION = aten._assert_tensor_metadata.default


class Gate(NamedTuple):
    """activation(gate) * x; `inside` holds the nodes that compute it."""

    x: Node
    gate: Node
    activation: str
    inside: set[Node]


class FuseProloguePass(PackedPass):
    """Fuse an RMS norm or a gated activation into the site that is its only reader.

    This saves a launch and the memory traffic of its result. Every kernel program that rotates a part of a token then
    computes the whole norm, so kernels keep it apart for more than `dispatch.NORM_TOKENS` tokens, or a free number.
    Skipped, with the reason in the record: sites with another input, and an input with other readers, which would be
    computed twice.
    """

    name = "fuse_prologue"

    def edit(self, editor: ProgramEditor) -> list[Note]:
        notes: list[Note] = []
        for node in packed_calls(editor.graph, *SITES, *SITES.values()):
            if has_prologue(node):
                continue
            x = operands(node).x
            # The router of experts reads their norm too.
            found = match_gate(x) or (None if kind_of(node) in EXPERTS else match_norm(x))
            reason = _reason_to_leave(editor, node, x, found)
            if reason or found is None:
                notes.append({"what": sites_of(node), "reason": reason})
                continue
            kind = "norm" if isinstance(found, Norm) else "gate"
            notes.append({"what": sites_of(node), "prologue": kind})
            _fuse(editor, as_site(editor, node), found)
            counters[f"fuse_prologue.{kind}"] += 1
        return notes

    def ensures(self, program: ExportedProgram) -> None:
        for node in packed_calls(program.graph, *SITES.values()):
            site, name = operands(node), sites_of(node)[0]
            norm = site.named.get("norm")
            fits = norm is None or norm.meta["val"].shape == site.x.meta["val"].shape[-1:]
            self.promise(fits, f"the norm of '{name}' has not one weight a column")
            self.promise((site.gate is None) == (site.activation == ""), f"'{name}' has half of a gated activation")


def has_prologue(node: Node) -> bool:
    """Whether a node is a site that has a norm or a gate already."""
    if kind_of(node) not in SITES.values():
        return False
    site = operands(node).named
    return site.get("norm") is not None or site["gate"] is not None


def as_site(editor: ProgramEditor, node: Node) -> Node:
    """Replace a packed Linear by a "site", and experts by an "experts_site"; return either itself."""
    if kind_of(node) in SITES.values():
        return node
    site = editor.add_operator(node, f"site_{node.name}", fused_operands(node, site_operator(node)), node)
    site.meta[META] = node.meta[META]
    editor.replace(node, site)
    return site


def reads_its_own_input(node: Node) -> bool:
    """Whether no separate node rotates, rounds or projects the input of a packed node."""
    if kind_of(node) in SITES.values():
        return True
    call = operands(node)
    return call.latent is None and call.x.target not in (ROTATE, ROUND)


def match_gate(node: Node) -> Gate | None:
    """Match `node` as the result of a gated activation."""
    if node.target is not aten.mul.Tensor or not all(isinstance(factor, Node) for factor in node.args):
        return None
    left, right = node.args
    for gate, x in ((left, right), (right, left)):
        assert isinstance(gate, Node)
        assert isinstance(x, Node)
        activation = _activation(gate)
        if activation is not None and same_shape(gate, x):
            source = gate.args[0]
            assert isinstance(source, Node)
            return Gate(x, source, activation, {node, gate})
    return None


def _activation(node: Node) -> str | None:
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


def _reason_to_leave(editor: ProgramEditor, node: Node, x: Node, found: Norm | Gate | None) -> str | None:
    if not reads_its_own_input(node):
        return "its rotation or low-rank branch is shared by several readers"
    if found is None:
        return "its input is neither an RMS norm nor a gated activation"
    if isinstance(found, Norm) and editor.tensor(found.weight) is None:
        return "the weight of its norm is computed by the program"
    if isinstance(found, Norm) and len(table_of(node).users) > 1:
        return "its weight is applied more than once"
    sources = [found.x, *([found.gate] if isinstance(found, Gate) else [])]
    if any(source.meta["val"].dtype != x.meta["val"].dtype for source in sources):
        return f"its prologue turns {found.x.meta['val'].dtype} into {x.meta['val'].dtype}"
    for inner in found.inside:
        for user in inner.users:
            if user is not node and user not in found.inside and user.target is not _ASSERTION:
                return f"'{inner.name}' is also read by '{user.name}'"
    # The site reads the sources later than the inner nodes did.
    if any(written_between(source, min(found.inside), node) for source in sources):
        return "the program writes into what its prologue reads"
    return None


def _fuse(editor: ProgramEditor, site: Node, found: Norm | Gate) -> None:
    if isinstance(found, Norm):
        prologue = {"norm": _weight(editor, site, found), "eps": found.eps}
    else:
        prologue = {"gate": found.gate, "activation": found.activation}
    operands(site).replace(x=found.x, **prologue).write(site)
    _erase(editor, found.inside)
    if isinstance(found, Norm) and all(user.target is _ASSERTION for user in found.weight.users):
        for user in list(found.weight.users):
            editor.graph.erase_node(user)
        editor.drop_unused_weight(found.weight)


def _weight(editor: ProgramEditor, site: Node, norm: Norm) -> Node:
    """The norm's weight, with its shift added and in the order of the site's columns."""
    call, weight = operands(site), editor.stored(norm.weight).detach()
    if norm.shift:
        weight = weight.to(torch.float32) + norm.shift
    if call.perm is not None:
        weight = weight[editor.stored(call.perm).to(torch.int64)]
    elif not norm.shift:
        return norm.weight
    return editor.add_buffer(f"{weight_fqn(editor, site)}.norm", weight)


def _erase(editor: ProgramEditor, nodes: set[Node]) -> None:
    """Erase nodes that only each other and assertions read, and these assertions."""
    for node in sorted(nodes, reverse=True):
        for user in list(node.users):
            editor.graph.erase_node(user)
        editor.graph.erase_node(node)
