"""Low-rank approximations of rank 32: R1-sketch and block subspace iteration against SVDs of torch.

Matrices have singular values i^-0.5 and Gaussian noise of their size at rank 32. The error is the squared one over that
of the best approximation, which follows from the eigenvalues of W Wᵀ in fp64. torch.linalg.svd of the wide matrix takes
minutes on one core; --svd asks for it.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.common import save_result
from lopro_fx.methods.lowrank import gram_components, r1_sketch

RANK = 32
SHAPES = ((4096, 4096), (4096, 14336))


def decaying(m: int, n: int, seed: int = 0) -> Tensor:
    """Make an fp32 matrix (m, n) of 256 random components of sizes i^-0.5 and noise."""
    rng, kept = torch.Generator().manual_seed(seed), 256
    left, right = (torch.randn(side, kept, generator=rng) / side**0.5 for side in (m, n))
    size = torch.arange(1, kept + 1).pow(-0.5)
    # The largest singular value of the noise is that of component 32.
    noise = torch.randn(m, n, generator=rng) * (RANK**-0.5 / (m**0.5 + n**0.5))
    return (left * size) @ right.T + noise


def by_svd(matrix: Tensor, _: int) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :RANK] * s[:RANK], v[:RANK]


def by_svd_lowrank(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """As wide a block as that of `gram_components`."""
    u, s, v = torch.svd_lowrank(matrix, RANK + 8, iterations)
    return (u * s)[:, :RANK], v[:, :RANK].T


def by_block(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    down = gram_components(matrix, None, RANK, torch.Generator().manual_seed(0), iterations)
    return matrix @ down.T, down


def by_r1(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    return r1_sketch(matrix, RANK, torch.Generator().manual_seed(0), iterations)


SKETCHES = {"R1-sketch": by_r1, "block": by_block, "torch.svd_lowrank": by_svd_lowrank}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--svd", action="store_true", help="torch.linalg.svd of the wide matrix too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for m, n in SHAPES:
        matrix = decaying(m, n)
        wide = matrix.double()
        best = torch.linalg.eigvalsh(wide @ wide.T)[: m - RANK].sum().item()
        exact = [("torch.linalg.svd", by_svd, 0)] if m == n or args.svd else []
        for name, solve, iterations in [*((*case, its) for its in (1, 2, 4) for case in SKETCHES.items()), *exact]:
            started = time.perf_counter()
            left, right = solve(matrix, iterations)
            seconds = time.perf_counter() - started
            error = (wide - left.double() @ right.double()).square().sum().item() / best
            row = {"shape": [m, n], "case": name, "iterations": iterations}
            rows.append({**row, "seconds": seconds, "error_over_best": error})
            print(rows[-1], flush=True)
    save_result("sketch", rows, rank=RANK)


if __name__ == "__main__":
    main()
