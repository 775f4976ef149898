"""What a pass promises of its result is checked with an error that names the pass, also where asserts are off."""

from __future__ import annotations

import pytest
import torch
from torch.export import ExportedProgram

from lopro_fx.errors import GraphError
from lopro_fx.passes.base import ProgramPass
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fold_permutation import FoldPermutationPass
from lopro_fx.passes.fuse_prologue import FuseProloguePass
from lopro_fx.passes.fuse_residual import FuseResidualPass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.inline import InlineModesPass
from lopro_fx.passes.linears import LinearsPass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.native_cpu import NativeCpuPass
from lopro_fx.passes.operands import operands
from lopro_fx.passes.recover import recover
from lopro_fx.passes.rewrite import RewritePass
from tests.passes.quantised import PACKED_LINEAR, PACKED_SITE, ROTATE, calls, quantised
from tests.programs import Product, export, rows, seeded


def _edited(fused: bool, target, **changes) -> ExportedProgram:
    """A quantised program whose first call of `target` has other operands; nodes stand for their own names."""
    editor = ProgramEditor(FuseSitePass()(quantised()) if fused else quantised())
    node = editor.graph.find_nodes(op="call_function", target=target)[0]
    operands(node).replace(**changes).write(node)
    return editor.finish()


def _unread_rotation() -> ExportedProgram:
    editor = ProgramEditor(quantised())
    node = editor.graph.find_nodes(op="call_function", target=ROTATE)[0]
    editor.add_operator(node, "unread", operands(node), node)
    return editor.finish()


def _wrong_value(target, value: torch.Tensor) -> ExportedProgram:
    program = ProgramEditor(FuseSitePass()(quantised())).finish()
    calls(program, target)[0].meta["val"] = value
    return program


def _nested() -> ExportedProgram:
    class NoGrad(torch.nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return x * 2

    return export(NoGrad(), rows(4))


def _half_gated() -> ExportedProgram:
    return _edited(True, PACKED_SITE, activation="silu")


BROKEN = {
    "inline": (InlineModesPass(), _nested, "is not inlined"),
    "linears": (LinearsPass(), lambda: export(seeded(Product()), rows(4)), "a product with a parameter"),
    "fold_permutation": (FoldPermutationPass(), lambda: _edited(False, ROTATE, perm=None, block=1), "does nothing"),
    "merge": (MergeLinearsPass(), lambda: _wrong_value(PACKED_LINEAR, torch.ones(3)), "gives 3 features of 32 rows"),
    "fuse_site": (FuseSitePass(), _unread_rotation, "nothing reads 'unread' of"),
    "fuse_prologue": (FuseProloguePass(), _half_gated, "'blocks.0.o' has half of a gated activation"),
    "native_cpu": (NativeCpuPass(8), lambda: FuseSitePass()(quantised()), "'blocks.0.o' is still a lopro.packed_site"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_names_pass_and_layer(name: str) -> None:
    apply, make, message = BROKEN[name]
    assert isinstance(apply, ProgramPass)
    with pytest.raises(GraphError, match=f"the pass '{name}' made a wrong program: .*{message}"):
        apply.ensures(make())


def test_a_residual_of_another_type() -> None:
    program = _edited(True, PACKED_SITE)
    node = calls(program, PACKED_SITE)[0]
    operands(node).replace(residual=operands(node).x).write(node)
    node.meta["val"] = node.meta["val"].to(torch.float16)
    with pytest.raises(GraphError, match=r"the pass 'fuse_residual' .*'blocks.0.o' adds a residual to torch.float16"):
        FuseResidualPass().ensures(program)


def test_a_layer_that_was_not_packed() -> None:
    groups, sites = recover(quantised())
    sites["missing"] = sites["blocks.0.q"]
    with pytest.raises(GraphError, match=r"the pass 'rewrite' .*'missing' is not packed"):
        RewritePass(groups, sites, {}).ensures(quantised())


def test_a_permutation_that_the_program_computes() -> None:
    editor = ProgramEditor(quantised())
    for node in editor.graph.find_nodes(op="call_function", target=ROTATE):
        perm = editor.add_call(node, "computed", torch.ops.aten.clone.default, (operands(node).perm,), node)
        operands(node).replace(perm=perm).write(node)
    with pytest.raises(GraphError, match="'computed_3' is computed by the program, and must be one of its tensors"):
        FoldPermutationPass()(editor.finish())


def test_a_tensor_of_another_shape() -> None:
    editor = ProgramEditor(quantised())
    codes = operands(editor.graph.find_nodes(op="call_function", target=PACKED_LINEAR)[0]).codes
    with pytest.raises(GraphError, match=r"'blocks.0.q.codes' is \(32, 3\) torch.int32, and can't become \(2,\)"):
        editor.set_tensor(codes, torch.ones(2))
