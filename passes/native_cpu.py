"""Replace packed Linears by the compiled CPU kernel of their format."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.kernels.errors import GraphError
from lopro_fx.kernels.formats.registry import operator_of, rounding_operands
from lopro_fx.passes.base import counters
from lopro_fx.passes.calls import (
    EXPERTS,
    PROJECT,
    ROTATE,
    ROUND,
    SITES,
    PackedPass,
    format_of,
    kind_of,
    packed_calls,
    stored_weight,
)
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fuse_site import fused_operands, rounding_of, unrounded
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META, Mark, Note, group_of, sites_of


class NativeCpuPass(PackedPass):
    """Replace each "site", and each "linear" with its rotation and projection, by the format's "cpu" operator, and
    experts by its "cpu_experts".

    Each reader of a shared rotation or projection computes it again, which costs less than a separate operator.
    Parameters no longer require gradients. Skipped, with the reason in the record: a Linear whose format has no such
    kernel, whose rounding the kernel lacks, or whose low-rank branch doesn't project its own input.

    Args:
        act_bits: 8 rounds activations to int8 for the packed gemm, 0 doesn't. Those that the program rounds keep their
            bits.
    """

    name = "native_cpu"

    def __init__(self, act_bits: int) -> None:
        self.act_bits = act_bits

    def requires(self, program: ExportedProgram) -> None:
        super().requires(program)
        for node in packed_calls(program.graph, *SITES.values()):
            if fused := operands(node).kwargs:
                raise GraphError(
                    f"'{sites_of(node)[0]}' holds {', '.join(fused)} since the program was optimised for CUDA; "
                    "optimise the quantised program itself"
                )

    def edit(self, editor: ProgramEditor) -> list[Note]:
        # The operator has no derivative: backward must fail, not reach only a part of the parameters.
        for placeholder in editor.graph.find_nodes(op="placeholder"):
            editor.freeze(placeholder)
        notes: list[Note] = []
        for node in packed_calls(editor.graph, *SITES, *SITES.values()):
            reason = _reason_to_leave(node)
            notes.append({"what": sites_of(node), **({"reason": reason} if reason else {})})
            if reason is None:
                self._replace(editor, node)
        return notes

    def _replace(self, editor: ProgramEditor, node: Node) -> None:
        call, fused = operands(node), kind_of(node) in SITES.values()
        rounded = None if fused else rounding_of(node)
        act_bits = self.act_bits if rounded is None else operands(rounded).bits
        operator = operator_of(format_of(node).name, _kernel_of(node))
        rounding = {"act_bits": act_bits, **(_group_operand(node) or {})}
        site = call.to(operator, **rounding) if fused else fused_operands(node, operator, **rounding)
        native = editor.add_operator(node, f"native_{node.name}", site, node)
        native.meta[META] = Mark(sites=sites_of(node), group=group_of(node))
        editor.replace(node, native)
        counters["native_cpu.site"] += 1
        for gone in () if fused else (call.latent, call.x, None if rounded is None else operands(rounded).x):
            if gone is not None and gone.target in (PROJECT, ROTATE, ROUND) and not gone.users:
                editor.graph.erase_node(gone)

    def ensures(self, program: ExportedProgram) -> None:
        for node in packed_calls(program.graph, *SITES.values()):
            self.promise(_reason_to_leave(node) is not None, f"'{sites_of(node)[0]}' is still a {node.target}")


def _kernel_of(node: Node) -> str:
    """Kind of the operator that replaces a packed node."""
    return "cpu_experts" if kind_of(node) in EXPERTS else "cpu"


def _group_operand(node: Node) -> dict[str, int] | None:
    """Operand for the columns that share a step; None if the kernel can't have them."""
    format, rounded = format_of(node), None if kind_of(node) in SITES.values() else rounding_of(node)
    operator = operator_of(format.name, _kernel_of(node))
    if rounded is None:
        return rounding_operands(operator, 0, 0)
    x = unrounded(node)
    weight = stored_weight(node, lambda operand: operand.meta["val"])
    own = format.activation_group(weight, x.target is ROTATE and operands(x).block > 1)
    return rounding_operands(operator, own, operands(rounded).group)


def _reason_to_leave(node: Node) -> str | None:
    format = format_of(node)
    if operator_of(format.name, _kernel_of(node)) is None:
        of = " of experts" if kind_of(node) in EXPERTS else ""
        return f"format '{format.name}' has no compiled kernel{of} for CPUs"
    if kind_of(node) in SITES.values():
        return None
    call = operands(node)
    x, rounded = unrounded(node), rounding_of(node)
    if rounded is not None and _group_operand(node) is None:
        return (
            f"its kernel rounds no activation to {operands(rounded).bits} bits in groups of {operands(rounded).group}"
        )
    projects = call.latent is None or (call.latent.target is PROJECT and operands(call.latent).x is x)
    return None if projects else "its low-rank branch does not project its own input"
