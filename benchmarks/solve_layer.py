"""Time to solve one 4096 x 11008 layer (rank 16, 3 bits): LoPRo beside a full SVD followed by plain GPTQ.

Weights and activations are random with outlier columns. Each part is timed once, in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import save_result
from lopro_fx import GPTQ, LoPRo
from lopro_fx.methods.observers import Statistics


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    m, n = args.rows, args.columns
    weight = torch.randn(m, n) * 0.02
    x = torch.randn(args.tokens, n) * torch.rand(n).mul(3).exp()
    stats = Statistics({"gram": x.T @ x / args.tokens, "magnitude": x.abs().mean(0)}, args.tokens)
    del x
    whole = ((weight @ stats.gram) * weight).sum().item()

    rows = []
    config = LoPRo(bits=3, rank=16)
    solution, seconds = timed(lambda: config.solution([weight], stats, torch.Generator().manual_seed(0)))
    rows.append({"case": "lopro", "seconds": seconds, "relative_loss": solution.relative})
    print(rows[-1], flush=True)

    def baseline() -> float:
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
        low = (u[:, :16] * sigma[:16]) @ vh[:16]
        return GPTQ(bits=3).solution([weight - low], stats, torch.Generator()).loss / whole

    relative, seconds = timed(baseline)
    rows.append({"case": "torch.linalg.svd + plain GPTQ", "seconds": seconds, "relative_loss": relative})
    print(rows[-1], flush=True)
    save_result("solve_layer", rows, shape=[m, n], tokens=args.tokens)


if __name__ == "__main__":
    main()
