"""Decode of one layer of experts on a CPU: packed experts with TileQ's factors, without, and bf16 experts.

A layer of Mixtral's shape, scaled to fit: 8 experts of 2048 x 7168, gate, up and down, the best two for a token. Ours
is `lopro::cpu_experts` for each product, with a rotation and int8 activations. The other sides are transformers'
batched_mm, which gathers the weights of each pair, and a plain product by each expert's weight. Median and spread of
several rounds, all sides in turn, experts drawn anew for each call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.common import save_result
from lopro_fx import RTN
from lopro_fx.kernels.formats.packed import Packed, stacked
from lopro_fx.kernels.formats.registry import operator_of
from lopro_fx.methods.placement import grid_of

EXPERTS, SLOTS, WIDTH, HIDDEN, RANK = 8, 2, 2048, 7168, 32
# (gate and up, down): rows and columns of an expert's weight.
_SHAPES = ((2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))
Layer = Callable[[Tensor, Tensor], Tensor]


def _packed(rows: int, columns: int, bits: int, group_size: int) -> Packed:
    quantizer = RTN(bits=bits, group_size=group_size, clip_steps=0).quantizer
    weight = torch.randn(rows, columns) / columns**0.5
    # The same numbers in memory of their own: a decode reads each expert's.
    return stacked([quantizer.nearest(weight, (rows,)).packed()] * EXPERTS)


def _factors(rows: int, columns: int) -> tuple[Tensor, ...]:
    """down, down_scale, up, up_scale, cells, core of a full grid."""
    down, up = grid_of(EXPERTS, columns, rows)
    cells = torch.tensor([[expert // up, expert % up] for expert in range(EXPERTS)], dtype=torch.int32)
    codes = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((down * RANK, columns), (up, rows, RANK)))
    scales = (torch.full(shape, 1e-4, dtype=torch.float16) for shape in ((down * RANK,), (up, RANK)))
    (low, high), (low_scale, high_scale) = codes, scales
    return low, low_scale, high, high_scale, cells, torch.eye(RANK, dtype=torch.float16).repeat(EXPERTS, 1, 1)


def ours(bits: int, group_size: int, factors: bool) -> Layer:
    """The layer as an optimised program runs it; x (1, WIDTH) float32, ids (SLOTS,)."""
    products = []
    for rows, columns in _SHAPES:
        packed, signs = _packed(rows, columns, bits, group_size), torch.zeros(columns // 8, dtype=torch.uint8)
        down, down_scale, up, up_scale, cells, core = _factors(rows, columns) if factors else (None,) * 6
        operator = operator_of(packed.format, "cpu_experts")

        def product(x: Tensor, ids: Tensor, slots: int, packed: Packed = packed, operator: Layer = operator,
                    turn: Sequence[object] = (None, signs, 256, 0, down, down_scale),
                    branch: Sequence[object] = (up, up_scale, cells, core)) -> Tensor:  # fmt: skip
            return operator(x, ids, slots, *turn, *packed.tensors.values(), *branch, *packed.spec.values(), 8)

        products.append(product)
    return lambda x, ids: products[1](_gated(products[0](x, ids, SLOTS)), ids, 1)


def _gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    wide = [(torch.randn(EXPERTS, *shape) / shape[1] ** 0.5).to(torch.bfloat16) for shape in _SHAPES]

    def batched(x: Tensor, ids: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16).repeat_interleave(SLOTS, 0)
        y = _gated(torch.bmm(wide[0][ids], rows.unsqueeze(-1)).squeeze(-1))
        return torch.bmm(wide[1][ids], y.unsqueeze(-1)).squeeze(-1)

    def plain(x: Tensor, ids: Tensor) -> Tensor:
        each = ids.tolist()
        return torch.cat([linear(_gated(linear(x.to(torch.bfloat16), wide[0][e])), wide[1][e]) for e in each])

    sides: dict[str, Layer] = {"bf16, batched_mm": batched, "bf16, a product for each expert": plain}
    for bits, group_size in ((2, 128), (4, 128)):
        for factors in (False, True):
            sides[f"{bits} bits, TileQ rank {RANK}" if factors else f"{bits} bits"] = ours(bits, group_size, factors)
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for place in range(args.rounds + 1):
            for name, run in sides.items():
                calls = [(torch.randn(1, WIDTH), torch.randperm(EXPERTS)[:SLOTS]) for _ in range(20)]
                started = time.perf_counter()
                for x, ids in calls:
                    run(x, ids)
                # The first round warms up.
                if place:
                    times[name].append((time.perf_counter() - started) / len(calls))
    base = statistics.median(times["bf16, batched_mm"])
    rows = [{"row": name, "milliseconds": 1e3 * (middle := statistics.median(own)), "least": 1e3 * min(own),
             "most": 1e3 * max(own), "times_batched_mm": base / middle} for name, own in times.items()]  # fmt: skip
    for row in rows:
        print(row)
    save_result("cpu_experts", rows, threads=torch.get_num_threads(), shape=[EXPERTS, WIDTH, HIDDEN], slots=SLOTS)


if __name__ == "__main__":
    main()
