"""Editing takes a time that grows as the program does, not as its square: mixtures of experts hold 70,000 buffers."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph
from torch.nn import functional

import lopro_fx
from lopro_fx.passes.editor import ProgramEditor
from lopro_fx.passes.fold_permutation import FoldPermutationPass
from lopro_fx.passes.fuse_prologue import FuseProloguePass
from lopro_fx.passes.fuse_residual import FuseResidualPass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.native_cpu import NativeCpuPass
from lopro_fx.passes.rewrite import RewritePass
from tests.passes.packs import packed
from tests.passes.quantised import rewritten
from tests.programs import WIDTH, export, rows, seeded

FOLDERS = {"passes": Path(lopro_fx.passes.__path__[0]), "kernels": Path(lopro_fx.kernels.__path__[0])}


@functools.cache
def _folder(file: str) -> str:
    """Which of the folders a source file lies in; "" for none."""
    return next((name for name, folder in FOLDERS.items() if folder in Path(file).parents), "")


def _work(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Instructions that `run` takes in each folder; a search of the graph costs one for every node that it gives."""
    done: Counter[str] = Counter()
    search = Graph.find_nodes

    def find_nodes(self: Graph, **options: Any) -> Any:
        found = search(self, **options)
        done["passes"] += len(found)
        return found

    def enter(frame: Any, event: str, _: Any) -> Any:
        name = _folder(frame.f_code.co_filename)
        if not name:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True

        def count(frame: Any, event: str, _: Any) -> Any:
            done[name] += event == "opcode"
            return count

        return count

    before = sys.gettrace()
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "find_nodes", find_nodes)
        sys.settrace(enter)
        try:
            run()
        finally:
            sys.settrace(before)
    return done


def _program(linears: int = 1) -> ExportedProgram:
    return export(seeded(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(linears)])), rows(4))


def test_buffers_are_added_and_dropped_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program()

    def edit(count: int) -> None:
        editor = ProgramEditor(program)
        added = [editor.add_buffer(f"experts.{index}.codes", torch.zeros(1)) for index in range(count)]
        assert all(editor.drop_unused_weight(node) for node in added[1:])
        assert "experts.0.codes" in editor.finish().state_dict

    few, many = (_work(lambda count=count: edit(count), monkeypatch)["passes"] for count in (50, 200))
    assert many < 4.1 * few


class Block(nn.Module):
    """Everything that the passes look for: shared inputs, norms, a gated activation and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _rewrite(program: ExportedProgram) -> Callable[[], Any]:
    groups, sites = packed(program)
    return lambda: RewritePass(groups, sites, {})(program)


def _blocks(count: int) -> ExportedProgram:
    return export(seeded(nn.Sequential(*[Block() for _ in range(count)])), rows(4))


def _packed_blocks(count: int, *passes: Any) -> ExportedProgram:
    program = rewritten(seeded(nn.Sequential(*[Block() for _ in range(count)])), rows(4))
    for apply in passes:
        program = apply(program)
    return program


_MERGED = (MergeLinearsPass(), FuseSitePass())
PASSES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fold_permutation": (FoldPermutationPass(), ()),
    "merge": (MergeLinearsPass(), ()),
    "fuse_site": (FuseSitePass(), _MERGED[:1]),
    "fuse_prologue": (FuseProloguePass(), _MERGED),
    "fuse_residual": (FuseResidualPass(), _MERGED),
    "native_cpu": (NativeCpuPass(8), ()),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_take_linear_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, before = PASSES[name]
    few, many = (_packed_blocks(count, *before) for count in (4, 16))
    work = [_work(lambda program=program: apply(program), monkeypatch) for program in (few, many)]
    assert work[1]["passes"] < 4.1 * work[0]["passes"]


def test_the_rewrite_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [_work(_rewrite(_blocks(count)), monkeypatch) for count in (4, 16)]
    assert work[1]["passes"] < 4.1 * work[0]["passes"]
    # The result of an operator is computed once for all calls that are alike.
    assert work[1]["kernels"] == work[0]["kernels"] > 0


def test_readers_of_one_input_take_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Experts(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            return sum((expert(x).relu() for expert in self.experts), x)

    work = [_work(_rewrite(export(seeded(Experts(count)), rows(4))), monkeypatch) for count in (8, 32)]
    assert work[1]["passes"] < 4.1 * work[0]["passes"]


def test_results_of_alike_calls_are_no_aliases() -> None:
    program = rewritten(seeded(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(2)])), rows(4))
    values = [node.meta["val"] for node in program.graph.nodes if node.target is torch.ops.lopro.packed_linear.default]
    assert values[0].shape == values[1].shape
    assert values[0].requires_grad == values[1].requires_grad
    assert values[0].untyped_storage()._cdata != values[1].untyped_storage()._cdata
