"""One layer of experts on a GPU: packed experts, with and without TileQ's factors, beside experts in bf16.

A layer of Qwen3-30B-A3B's shape: 128 experts, gate and up 1536 x 2048, down 2048 x 768, the best eight for a token.
Ours is what a program optimised for CUDA holds: two operators with rotation, projection and gate inside. The other
sides are transformers' batched_mm, which gathers the weights of each pair, and its grouped_mm. All are compiled by
Inductor and replayed in turn from CUDA graphs; a layer's weights are larger than the L2, and each call of one token has
experts of its own.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

import lopro_fx  # noqa: F401  registers the operators
from benchmarks.common import RESULTS
from benchmarks.gpu_sites import random_words
from benchmarks.gpu_timing import DEVICE, Contender, measure, save
from lopro_fx.kernels.formats.affine.packing.format import group_count, packed_words
from lopro_fx.kernels.formats.registry import operator_of, reference
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.methods.placement import grid_of

EXPERTS, SLOTS, WIDTH, HIDDEN, RANK, GROUP, BLOCK = 128, 8, 2048, 768, 32, 128, 256
# (gate and up, down): rows and columns of an expert's weight.
_SHAPES = ((2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))
WIDTHS = {"affine": (2, 4), "trellis": (2, 3)}
Operands = dict[str, Any]
Layer = Callable[..., Tensor]


def weight(format: str, bits: int, rows: int, columns: int) -> Operands:
    """Random packed experts, every bit used, whose products are about as large as their inputs."""
    if format == "trellis":
        pair, window, strip = 2 if bits == 2 else 1, 14, 512
        words = code_words((rows, columns), bits * pair, pair, strip)
        scales = torch.full((EXPERTS, rows), columns**-0.5, dtype=torch.float16, device=DEVICE)
        spec = {"bits": float(bits), "columns": pair, "window": window, "strip": strip}
        return {"scales": scales, "codes": random_words(EXPERTS, words), **spec}
    groups = group_count(columns, GROUP)
    scale = columns**-0.5 / (1 << bits - 1)
    return {
        "codes": random_words(EXPERTS, rows, packed_words(columns, bits)),
        "scales": torch.full((EXPERTS, rows, groups), scale, dtype=torch.float16, device=DEVICE),
        "zeros": random_words(EXPERTS, packed_words(rows * groups, bits)),
        "bits": bits,
        "group_size": GROUP,
    }


def factors(rows: int, columns: int) -> Operands:
    """Factors and cores of a full grid, in int8."""
    down, up = grid_of(EXPERTS, columns, rows)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)

    def scale(*shape: int) -> Tensor:
        return torch.full(shape, 1e-3, dtype=torch.float16, device=DEVICE)

    cells = [[expert // up, expert % up] for expert in range(EXPERTS)]
    return {
        "down": codes(down * RANK, columns), "down_scale": scale(down * RANK), "up": codes(up, rows, RANK),
        "up_scale": scale(up, RANK), "cells": torch.tensor(cells, dtype=torch.int32, device=DEVICE),
        "core": torch.eye(RANK, dtype=torch.float16, device=DEVICE).repeat(EXPERTS, 1, 1),
    }  # fmt: skip


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


def ours(format: str, bits: int, branch: bool) -> tuple[Layer, Layer]:
    """The layer with the operators of a program and, for a comparison, with their definitions."""
    packed = [weight(format, bits, *shape) for shape in _SHAPES]
    none = dict.fromkeys(("down", "down_scale", "up", "up_scale", "cells", "core"))
    low = [factors(*shape) if branch else none for shape in _SHAPES]
    signs = [torch.randint(0, 256, (columns // 8,), dtype=torch.uint8, device=DEVICE) for _, columns in _SHAPES]

    def layer(product: Layer) -> Layer:
        def side(index: int, x: Tensor, ids: Tensor, slots: int, **gate: Any) -> Tensor:
            around = {"perm": None, "signs": signs[index], "block": BLOCK, "skip": 0}
            return product(x=x, ids=ids, slots=slots, **around, **packed[index], **low[index], **gate)

        def run(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            gate, up = side(0, x, ids, SLOTS).chunk(2, -1)
            y = side(1, up, ids, 1, gate=gate, activation="silu")
            return (y * scores.unsqueeze(-1)).view(x.shape[0], SLOTS, -1).sum(1)

        return run

    return layer(operator_of(format, "experts_site")), layer(reference(format, "experts_site"))


def dense() -> dict[str, Layer]:
    """The layer in bf16, in transformers' two forms."""
    wide = [torch.randn(EXPERTS, *shape, device=DEVICE, dtype=torch.bfloat16) / shape[1] ** 0.5 for shape in _SHAPES]

    def batched(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        y = gated(torch.bmm(wide[0][ids], x.repeat_interleave(SLOTS, 0).unsqueeze(-1)).squeeze(-1))
        y = torch.bmm(wide[1][ids], y.unsqueeze(-1)).squeeze(-1) * scores.unsqueeze(-1)
        return y.view(x.shape[0], SLOTS, -1).sum(1)

    def grouped(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        ranked, order = ids.sort()
        ends = torch.searchsorted(ranked, torch.arange(1, EXPERTS + 1, device=ids.device), out_int32=True)
        y = gated(grouped_mm(x[order // SLOTS], wide[0].mT, offs=ends))
        y = grouped_mm(y, wide[1].mT, offs=ends) * scores[order].unsqueeze(-1)
        return torch.empty_like(y).index_copy_(0, order, y).view(x.shape[0], SLOTS, -1).sum(1)

    return {"bf16, batched_mm": batched, "bf16, grouped_mm": grouped}


def routes(tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, experts and scores of calls: neighbouring calls of one token share no expert."""
    rng = torch.Generator().manual_seed(0)
    calls = []
    for _ in range(4):
        order = torch.randperm(EXPERTS, generator=rng)
        if tokens == 1:
            drawn = [order[place : place + SLOTS] for place in range(0, EXPERTS, SLOTS)]
        else:
            drawn = [torch.cat([torch.randperm(EXPERTS, generator=rng)[:SLOTS] for _ in range(tokens)])]
        calls += [
            (torch.randn(tokens, WIDTH, generator=rng).to(DEVICE, torch.bfloat16), ids.to(DEVICE),
             torch.rand(tokens * SLOTS, generator=rng).to(DEVICE, torch.bfloat16)) for ids in drawn
        ]  # fmt: skip
    return calls


def _in_bf16(layer: Layer, *call: Tensor) -> Tensor:
    return layer(*(value.to(torch.bfloat16) if value.is_floating_point() else value for value in call))


def contender(name: str, layer: Layer, exact: Layer, calls: list[tuple[Tensor, ...]]) -> Contender:
    """A compiled layer; its first result is held against `exact`."""
    # Compilers are given sizes, as a program of one step has them.
    run = torch.compile(layer, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = exact(*(value.float() if value.is_floating_point() else value for value in calls[0]))
    return Contender(name, [lambda call=call: run(*call) for call in calls], expected, tolerance=2e-2)


def case(tokens: int, repetitions: int, formats: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of one number of tokens."""
    calls, wide = routes(tokens), dense()
    sides: list[Contender] = []
    torch._dynamo.reset()
    for name, layer in wide.items():
        # In bf16 again: the device has no fp32 form of its own grouped product.
        exact = functools.partial(_in_bf16, layer)
        sides.append(contender(name, layer, exact, calls))
    for format in formats:
        for bits in WIDTHS[format]:
            for branch in (False, True):
                layer, exact = ours(format, bits, branch)
                name = f"{format} {bits} bits" + f", TileQ rank {RANK}" * branch
                sides.append(contender(name, layer, exact, calls))
    errors = {side.name: side.error() for side in sides}
    times = measure(sides, repetitions)
    base, rows = min(times[name].median for name in wide), []
    for name, timing in times.items():
        row = {"case": f"{tokens} tokens", "contender": name, "microseconds": timing.median * 1e6,
               "range": [timing.low * 1e6, timing.high * 1e6], "error": errors[name], "correct": errors[name] <= 2e-2,
               "speed_beside_bf16": base / timing.median}  # fmt: skip
        if "TileQ" in name:
            row["overhead"] = timing.median / times[name.partition(",")[0]].median - 1
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.gpu_experts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--formats", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_experts needs a CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows += (own := case(tokens, args.repetitions, args.formats))
        for row in own:
            overhead = f"  {100 * row['overhead']:+.1f} %" if "overhead" in row else ""
            print(f"{row['case']:10} {row['contender']:32} {row['microseconds']:8.1f} us "
                  f"({row['range'][0]:.1f}-{row['range'][1]:.1f})  error {row['error']:.1e}  "
                  f"{row['speed_beside_bf16']:.2f}x bf16{overhead}", flush=True)  # fmt: skip
        save("gpu_experts", args.out, rows, repetitions=args.repetitions, experts=EXPERTS, slots=SLOTS, rank=RANK,
             width=WIDTH, hidden=HIDDEN, group_size=GROUP)  # fmt: skip
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
