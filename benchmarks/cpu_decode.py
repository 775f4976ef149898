"""All packed products of one token, and of a prompt, of a decoder on a CPU: the trellis beside the affine format.

A decoder of the shape of Llama-3.2-1B: 16 layers of merged q, k, v; o; merged gate and up; down, each with a rotation,
a low-rank branch of rank 16 and int8 activations. Codes are random, and each layer has memory of its own, more than
caches hold. Both formats take turns; medians of the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lopro_fx  # noqa: F401  registers the operators
from benchmarks.common import save_result
from benchmarks.cpu_linear import random_site, seconds
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.formats.trellis.code import code_words

LAYERS, GROUP, PROMPT = 16, 128, 512
# Rows and columns of a layer's weights.
SHAPES = ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192))
Call = Callable[[Tensor], Tensor]


def affine(out: int, width: int, bits: int) -> Call:
    site = random_site(out, width, bits, GROUP)
    return lambda x: torch.ops.lopro.cpu_site(x, *site, 8)


def trellis(out: int, width: int, bits: int) -> Call:
    """At the format's defaults: pairs of columns at 2 bits."""
    *turn, _, _, _, bias, up, up_scale, _, _ = random_site(out, width, bits, GROUP)
    columns, window, strip = 2 if bits == 2 else 1, 14, 512
    word, count = torch.iinfo(torch.int32), code_words((out, width), bits * columns, columns, strip)
    codes = torch.randint(word.min, word.max, (count,), dtype=torch.int32)
    site = (
        *turn,
        (torch.rand(out) / width**0.5).half(),
        codes,
        bias,
        up,
        up_scale,
        float(bits),
        columns,
        window,
        strip,
    )
    return lambda x: torch.ops.lopro.trellis_cpu(x, *site, 8)


def model(make: Callable[[int, int, int], Call], bits: int) -> list[tuple[Call, int]]:
    """Products of all layers, each with its number of columns."""
    return [(make(*shape, bits), shape[1]) for _ in range(LAYERS) for shape in SHAPES]


def runner(calls: list[tuple[Call, int]], tokens: int) -> Callable[[], None]:
    inputs = {width: torch.randn(tokens, width) for _, width in calls}

    def run() -> None:
        for call, width in calls:
            call(inputs[width])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", default="cpu_decode", help="name of the result file; one holds one processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    assert native.load(), native.load.__doc__
    rows: list[dict[str, Any]] = []
    for bits in (2, 3, 4):
        models = {"affine": model(affine, bits), "trellis": model(trellis, bits)}
        for tokens in (1, PROMPT) if bits == 3 else (1,):
            count = 5 if tokens == 1 else 1
            sides: dict[str, tuple[Callable[[], Any], int]] = {}
            for name, calls in models.items():
                run = runner(calls, tokens)
                sides[name] = (lambda run=run, count=count: [run() for _ in range(count)], count)
            found = seconds(sides, args.rounds)
            rows.append({"bits": bits, "tokens": tokens, **{f"{name}_ms": 1e3 * value for name, value in found.items()},
                         "ratio": found["affine"] / found["trellis"]})  # fmt: skip
            print(rows[-1], flush=True)
            save_result(args.result, rows, threads=args.threads, layers=LAYERS, shapes=SHAPES, group_size=GROUP)


if __name__ == "__main__":
    main()
