"""One `lopro::packed_site` for a rotation, a down-projection and the packed Linear that alone reads them."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import (
    PACKED_LINEAR,
    PACKED_SITE,
    PROJECT,
    ROTATE,
    Note,
    PackedLinear,
    PackedPass,
    Project,
    Rotate,
    group_of,
    operands,
    sites_of,
)
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.rewrite import META


class FuseSitePass(PackedPass):
    """Fuses each packed Linear with the rotation and the down-projection in front of it, if it is their only reader.

    A Linear with neither is left. Groups that share a rotation are merged first: see `MergeLinearsPass`.
    """

    name = "fuse_site"

    def edit(self, editor: ProgramEditor) -> list[Note]:
        notes: list[Note] = []
        for node in editor.graph.find_nodes(op="call_function", target=PACKED_LINEAR):
            reason = _reason_to_leave(node)
            if reason:
                notes.append({"what": sites_of(node), "reason": reason})
                continue
            notes.append({"what": sites_of(node)})
            _fuse(editor, node)
            counters["fuse_site.site"] += 1
        return notes

    def ensures(self, program: ExportedProgram) -> None:
        inputs = [node for target in (ROTATE, PROJECT)
                  for node in program.graph.find_nodes(op="call_function", target=target)]  # fmt: skip
        assert all(node.users for node in inputs)


def _reason_to_leave(node: Node) -> str | None:
    call = operands(PackedLinear, node)
    readers = {node}
    if call.latent is not None:
        if call.latent.target is not PROJECT or operands(Project, call.latent).x is not call.x:
            return "its low-rank branch does not project its own input"
        if set(call.latent.users) != {node}:
            return f"its down-projection is shared by {len(call.latent.users)} readers"
        readers.add(call.latent)
    if call.x.target is not ROTATE:
        return None if call.latent else "it has neither a rotation nor a low-rank branch"
    if set(call.x.users) != readers:
        return f"its rotation is shared by {len(call.x.users)} readers"
    return None


def fused_operands(call: PackedLinear) -> tuple[Any, ...]:
    """Operands of `lopro::packed_site` for a packed Linear with the rotation and projection that it reads."""
    latent = call.latent
    rotate = operands(Rotate, call.x) if call.x.target is ROTATE else Rotate(call.x, None, None, 1, 0)
    down, scale = operands(Project, latent)[1:] if latent is not None else (None, None)
    return (*rotate, down, scale, call.codes, call.scales, call.zeros, call.bias, call.up, call.up_scale, call.bits,
            call.group_size)  # fmt: skip


def _fuse(editor: ProgramEditor, node: Node) -> None:
    call = operands(PackedLinear, node)
    fused = editor.add_call(node, f"fused_{node.name}", PACKED_SITE, fused_operands(call), node)
    fused.meta[META] = {"sites": sites_of(node), "group": group_of(node), "bits": call.bits}
    editor.replace(node, fused)
    for gone in (call.latent, call.x if call.x.target is ROTATE else None):
        if gone is not None:
            editor.graph.erase_node(gone)
