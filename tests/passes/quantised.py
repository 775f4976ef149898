"""Small programs after quantisation or with random packed contents, and how their results are compared."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import lopro_fx
from lopro_fx.passes.record import META
from lopro_fx.passes.rewrite import RewritePass
from tests.helpers import assert_close
from tests.passes.packs import packed
from tests.programs import decoder, export, ids

ROTATE, PROJECT = torch.ops.lopro.rotate.default, torch.ops.lopro.project.default
PACKED_LINEAR, PACKED_SITE, PACKED_EMBEDDING, CPU_SITE = (
    getattr(torch.ops.lopro, name).default for name in ("packed_linear", "packed_site", "packed_embedding", "cpu_site")
)


@functools.cache
def quantised(transform: str = "partial", rank: int = 2, bits: int = 3, bias: bool = True) -> ExportedProgram:
    """A decoder of one block after LoPRo on one batch; shared, not to be changed."""
    config = lopro_fx.LoPRo(bits=bits, group_size=32, rank=rank, clip_steps=2, sweeps=0, refits=0, salient=16,
                            transforms=transform)  # fmt: skip
    return lopro_fx.quantize(decoder(depth=1, bias=bias)[1], [ids()], config)


def rewritten(module: nn.Module, *args: Any, dynamic: bool = False, **options: Any) -> ExportedProgram:
    """The exported module with random packed contents in all Linears; each site's up factor has scales of its own."""
    program = export(module, *args, dynamic=dynamic)
    groups, sites = packed(program, **{"keep": False, **options})
    for index, (name, layer) in enumerate(sites.items()):
        if layer.up is not None:
            sites[name] = replace(layer, up=replace(layer.up, scale=layer.up.scale * (1 + index)))
    record = {"sites": {name: site.metrics for name, site in sites.items()}, "groups": {name: [] for name in groups}}
    return RewritePass(groups, sites, {"config": {"method": "test"}, "left": [], "info": {}, **record})(program)


def calls(program: ExportedProgram, target: Any) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


def notes(program: ExportedProgram) -> list[dict[str, Any]]:
    return program.graph_module.meta[META]["optimized"]


def reasons(program: ExportedProgram, name: str | None = None) -> dict[str, str]:
    """First layer of each note that has a reason, and that reason; of one pass alone, or of all."""
    return {note["what"][0]: note["reason"] for note in notes(program)
            if "reason" in note and name in (None, note["pass"])}  # fmt: skip


def run(program: ExportedProgram, *args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = program.module()(*args)
    return result if isinstance(result, tuple) else (result,)


def assert_same(before: ExportedProgram, after: ExportedProgram, *args: Any, ratio: float = 2e-6) -> None:
    """Both programs give the same outputs within the order of fp32 sums."""
    for index, (want, got) in enumerate(zip(run(before, *args), run(after, *args), strict=True)):
        assert got.dtype == want.dtype
        assert_close(f"output {index}", want, got, ratio)


def assert_unchanged_by(apply: Any, program: ExportedProgram) -> ExportedProgram:
    """Result of `apply(program)`, which left the program's graph, signature, tensors and record as they were."""
    code, signature, record = program.graph_module.code, str(program.graph_signature), str(program.graph_module.meta)
    tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in program.state_dict.items()}
    result = apply(program)
    assert program.graph_module.code == code
    assert str(program.graph_signature) == signature
    assert str(program.graph_module.meta) == record
    assert list(program.state_dict) == list(tensors)
    for name, (tensor, values) in tensors.items():
        assert program.state_dict[name] is tensor
        assert torch.equal(tensor, values)
    return result
