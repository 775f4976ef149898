"""A pass of one's own over a quantised program: every packed Linear reads its input clamped."""

import torch
from torch import nn
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.errors import GraphError
from lopro_fx.passes.base import ProgramPass
from lopro_fx.passes.calls import kind_of, packed_calls
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import sites_of

CLAMP = torch.ops.aten.clamp.default


class ClampPass(ProgramPass):
    """Clamps the input of each operator of the kind "site" to [-limit, limit], whatever its weight's format."""

    name = "clamp"

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def requires(self, program: ExportedProgram) -> None:
        if not packed_calls(program.graph, "site"):
            raise GraphError("the program has no packed sites to clamp; lopro_fx.optimize makes them")

    def call(self, program: ExportedProgram) -> ExportedProgram:
        editor = ProgramEditor(program)
        for node in packed_calls(editor.graph, "site"):
            site = operands(node)
            clamped = editor.add_call(node, f"clamp_{node.name}", CLAMP, (site.x, -self.limit, self.limit), node)
            site.replace(x=clamped).write(node)
        return editor.finish()

    def ensures(self, program: ExportedProgram) -> None:
        for node in packed_calls(program.graph, "site"):
            self.promise(operands(node).x.target is CLAMP, f"'{sites_of(node)[0]}' reads an input that is not clamped")


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10)).eval(), torch.randn(1024, 64)
    quantized = lopro_fx.quantize(torch.export.export(model, (x,)), [x], lopro_fx.LoPRo(bits=4, rank=4))
    optimized = lopro_fx.optimize(quantized)
    clamped = ClampPass(limit=1.0)(optimized)
    for node in clamped.graph.nodes:
        if kind := kind_of(node):
            print(kind, sites_of(node), "reads", operands(node).x.name)
    largest = (clamped.module()(x) - optimized.module()(x)).abs().max().item()
    print(f"clamping changes the result by at most {largest:.2f}")


if __name__ == "__main__":
    main()
