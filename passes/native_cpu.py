"""`lopro::cpu_site`, which has a compiled kernel, for every packed Linear of a program for a CPU."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import CPU_SITE, PACKED_LINEAR, PACKED_SITE, PROJECT, ROTATE, PackedPass
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fuse_site import fused_operands
from lopro_fx.passes.operands import Operands, operands
from lopro_fx.passes.record import META, Mark, Note, group_of, sites_of


class NativeCpuPass(PackedPass):
    """Replaces `packed_site`, and `packed_linear` with the rotation and projection that it reads, by `cpu_site`.

    A rotation or projection with several readers is computed by each of them, which costs less than an operator of its
    own. Parameters ask for no gradients any more. Left alone, with the reason in the record: a Linear whose low-rank
    branch doesn't project its own input.

    Args:
        act_bits: 8 rounds activations to int8 for the packed product, 0 keeps them.
    """

    name = "native_cpu"

    def __init__(self, act_bits: int) -> None:
        self.act_bits = act_bits

    def requires(self, program: ExportedProgram) -> None:
        super().requires(program)
        for node in program.graph.find_nodes(op="call_function", target=PACKED_SITE):
            if fused := operands(node).kwargs:
                raise GraphError(
                    f"'{sites_of(node)[0]}' holds {', '.join(fused)} since the program was optimised for CUDA; "
                    "optimise the quantised program itself"
                )

    def edit(self, editor: ProgramEditor) -> list[Note]:
        # The operator has no derivative: asking for one shall fail, not give gradients to a part of the parameters.
        for placeholder in editor.graph.find_nodes(op="placeholder"):
            editor.freeze(placeholder)
        notes: list[Note] = []
        for node in list(editor.graph.nodes):
            if node.target is PACKED_SITE:
                self._replace(editor, node, operands(node))
            elif node.target is PACKED_LINEAR:
                call = operands(node)
                if call.latent is not None and not _projects(call.latent, call.x):
                    notes.append(
                        {"what": sites_of(node), "reason": "its low-rank branch does not project its own input"}
                    )
                    continue
                self._replace(editor, node, fused_operands(call))
                for gone in (call.latent, call.x):
                    if gone is not None and gone.target in (PROJECT, ROTATE) and not gone.users:
                        editor.graph.erase_node(gone)
            else:
                continue
            notes.append({"what": sites_of(node)})
        return notes

    def _replace(self, editor: ProgramEditor, node: Node, site: Operands) -> None:
        native = editor.add_operator(node, f"native_{node.name}", site.to(CPU_SITE, act_bits=self.act_bits), node)
        native.meta[META] = Mark(sites=sites_of(node), group=group_of(node), bits=site.bits)
        editor.replace(node, native)
        counters["native_cpu.site"] += 1

    def ensures(self, program: ExportedProgram) -> None:
        for node in program.graph.find_nodes(op="call_function", target=PACKED_SITE):
            self.promise(False, f"'{sites_of(node)[0]}' is still a {node.target}")


def _projects(latent: Node, x: Node) -> bool:
    return latent.target is PROJECT and operands(latent).x is x
