"""Time to solve one 4096 x 11008 layer at 3 bits: LoPRo of rank 16 and plain GPTQ in groups of 64, and the trellis.

Weights and activations are random with outlier columns. Each method runs once, in one process. The loss is that of what
is stored, on the plain Gram, over that of the weights. With --gptqmodel, GPTQ of GPTQModel (with its own defaults) does
the same, in an environment that has it; nothing in lopro_fx needs it.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.common import save_result
from lopro_fx import GPTQ, LoPRo
from lopro_fx.methods.ldlq import proxy_loss, relative_loss
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.solution import GroupSolution

_CASES = {
    "lopro, rank 16": LoPRo(bits=3, rank=16, asymmetry=0),
    "gptq": GPTQ(bits=3),
    "trellis": LoPRo(format="trellis", bits=3, rank=0, asymmetry=0),
}


def approximation(solution: GroupSolution) -> Tensor:
    """fp32 (m, n) in original coordinates, from what the solution stores."""
    dense = solution.rounded.dense()
    if solution.down is not None:
        dense += torch.cat([up.dense() for up in solution.ups]) @ solution.down.dense()
    return solution.transform.inverse(dense)


def by_gptqmodel(weight: Tensor, x: Tensor) -> tuple[Tensor, float]:
    """Weight (m, n) rounded to 3 bits in groups of 64 on the tokens x (t, n), and seconds without those of the Gram."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ as Theirs

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data.copy_(weight)
    solver = Theirs(linear, QuantizeConfig(bits=3, group_size=64, sym=False))
    solver.quantizer.configure(perchannel=True)
    for part in x.split(512):
        solver.add_batch(part.unsqueeze(0), part[:, :1])
    started = time.perf_counter()
    rounded = solver.quantize()[0]
    return rounded.to(torch.float32), time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gptqmodel", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    m, n, device = args.rows, args.columns, torch.device(args.device)
    weight = (torch.randn(m, n) * 0.02).to(device)
    x = (torch.randn(args.tokens, n) * torch.rand(n).mul(3).exp()).to(device)
    stats = Statistics({"gram": x.T @ x / args.tokens, "magnitude": x.abs().mean(0)}, args.tokens, args.tokens)
    rows = []
    if args.gptqmodel:
        rounded, seconds = by_gptqmodel(weight, x)
        loss = relative_loss(proxy_loss(weight - rounded, stats.gram), weight, stats.gram)
        rows.append({"case": "gptq of GPTQModel", "seconds": seconds, "relative_loss": loss})
        print(rows[-1], flush=True)
    del x

    for name, config in _CASES.items():
        seconds = []
        # The first run on a GPU compiles kernels.
        for _ in range(2 if device.type == "cuda" else 1):
            _wait(device)
            started = time.perf_counter()
            solution = config.solution([weight], stats, torch.Generator().manual_seed(0))
            _wait(device)
            seconds.append(time.perf_counter() - started)
        loss = relative_loss(proxy_loss(weight - approximation(solution), stats.gram), weight, stats.gram)
        rows.append({"case": name, "seconds": min(seconds), "relative_loss": loss})
        print(rows[-1], flush=True)
    save_result("solve_layer" if device.type == "cpu" else "gpu_solve_layer", rows, shape=[m, n], tokens=args.tokens)


if __name__ == "__main__":
    main()
