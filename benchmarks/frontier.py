"""Accuracy against true bits: settings for all, budgets and low-rank branches; every bit of quantised layers counted.

SmolLM2-135M by the protocol of benchmarks/accuracy.py: dequantised fp32 model, calibration on the first 32 x 512 tokens
of c4_calib.txt, measured on the first 24 windows of 512 tokens of wikitext2_test.txt. stories260k: 64 x 256 tokens of
the first half of tinystories.txt to calibrate, as many of the second half to measure. Beside perplexity: KL divergence
from the unquantised model and share of tokens whose likeliest next token is the same. Programs run by the CPU's kernels
on packed weights, with activations in fp32. Rows are added to the result file as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import TRELLIS, dense_program, tasks
from benchmarks.common import DATA, RESULTS, save_result, solver
from lopro_fx import FLRQ, Budget, LoPRo, QuantState, apply, calibrate, optimize
from lopro_fx.evaluation.divergence import divergence
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.methods.rounding import Rounding
from lopro_fx.models.export import export_causal_lm, export_scorer
from lopro_fx.models.load import load_model

BUDGETS = (1.6, 2.03, 2.18, 2.35, 2.65, 3.03, 3.35, 4.15)
# Bits and ranks of low-rank branches that are compared with budgets of their size.
RANKS = ((2, 8), (2, 16), (2, 32), (3, 16))
_ROTATED = LoPRo(importance="gradient", rank=8)
_FIXED = replace(_ROTATED, transforms=("identity",), rank=1)
# Without the asymmetric target.
_PLAIN = replace(TRELLIS, asymmetry=0.0)
_WIDE = replace(TRELLIS, window=16)
ROWS: dict[str, tuple[Rounding, Budget | None]] = {
    **{f"trellis-{bits}": (replace(TRELLIS, bits=bits), None) for bits in (1.5, 2, 2.5, 3, 4)},
    **{f"trellis-{bits}-plain": (replace(_PLAIN, bits=bits), None) for bits in (2, 2.5, 3, 4)},
    **{f"trellis-{bits}-rank-{rank}": (replace(TRELLIS, bits=bits, rank=rank), None) for bits, rank in RANKS},
    "trellis-4-window-16": (replace(_WIDE, bits=4), None),
    **{f"budget-{bits}": (TRELLIS, Budget(bits_per_weight=bits)) for bits in BUDGETS},
    **{f"budget-{bits}-plain": (_PLAIN, Budget(bits_per_weight=bits)) for bits in BUDGETS},
    "budget-3.05-window-16": (_WIDE, Budget(bits_per_weight=3.05)),
    **{f"flrq-{bits}": (FLRQ(bits=bits, importance="gradient"), None) for bits in (2, 3, 4)},
    # A rank that costs no more than what FLRQ chooses.
    **{f"fixed-{bits}": (replace(_FIXED, bits=bits), None) for bits in (2, 3, 4)},
    "rotated-3": (_ROTATED, None),
    "rotated-3-plain": (replace(_ROTATED, asymmetry=0.0), None),
    "groups-3.45": (replace(_ROTATED, rank=0), Budget(bits_per_weight=3.454)),
}


def ranks(state: QuantState) -> dict[str, int]:
    """Rank of each shared input's branch; empty if none has one."""
    found = {name: shared.down.rank if shared.down else 0 for name, shared in state.inputs.items()}
    return found if any(found.values()) else {}


@dataclass(frozen=True)
class Setup:
    """A model, the windows of tokens (N, S) to calibrate and to measure on, and the result file."""

    model: str
    result: str
    text: Callable[[Any], tuple[Tensor, Tensor]]
    calibration: str


def _smollm2(tokenizer: Any) -> tuple[Tensor, Tensor]:
    calibration = token_windows(tokenizer, read_text(DATA / "c4_calib.txt"), 512, 32)
    return calibration, token_windows(tokenizer, read_text(DATA / "wikitext2_test.txt"), 512, 24)


def _stories(tokenizer: Any) -> tuple[Tensor, Tensor]:
    text = read_text(DATA / "tinystories.txt")
    half = len(text) // 2
    return token_windows(tokenizer, text[:half], 256, 64), token_windows(tokenizer, text[half:], 256, 64)


SETUPS = {
    "smollm2-135m": Setup("smollm2-135m", "frontier", _smollm2, "32x512 c4_calib.txt"),
    "stories260k": Setup(str(DATA.parent / "models" / "stories260k"), "frontier_stories", _stories,
                         "64x256 of the first half of tinystories.txt"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default all")
    parser.add_argument("--model", choices=SETUPS, default="smollm2-135m")
    parser.add_argument("--items", type=int, default=0, help="of each zero-shot task; 0 runs none")
    parser.add_argument("--device", help="where to measure and solve; default the CPU, which runs the result")
    args = parser.parse_args()
    setup = SETUPS[args.model]
    loaded = load_model(setup.model, torch.float32)
    program = export_causal_lm(loaded.model)
    calibration, windows = setup.text(loaded.tokenizer)
    for name in args.rows or ROWS:
        method, budget = ROWS[name]
        started = time.perf_counter()
        state = calibrate(program, list(calibration.split(1)), method, budget=budget, device=args.device)
        row: dict[str, Any] = {"row": name, "seconds": time.perf_counter() - started, "solved_on": solver(args.device)}
        row |= {"bits_per_weight": state.bits_per_weight, "packed_bytes": state.packed_bytes}
        quantised = optimize(apply(program, state), target="cpu", activations="float")
        found = divergence(quantised.module(), program.module(), windows)
        row |= {"perplexity": found.program.ppl, "original": found.original.ppl, "kl": found.kl_mean}
        row |= {"kl_stderr": found.kl_stderr, "top1": found.top1, "top1_stderr": found.top1_stderr}
        if args.items:
            row |= tasks(dense_program(export_scorer(loaded.model), state), loaded.tokenizer, args.items)
        print(row, flush=True)
        settings = {layer: f"{weight.weight.format} {weight.weight.spec['bits']:g}"
                    for layer, weight in state.layers.items()}  # fmt: skip
        # Read again at each row, so that two runs can share the file.
        path = RESULTS / f"{setup.result}.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        rows = list({**done, name: {**row, "layers": settings, "ranks": ranks(state)}}.values())
        save_result(setup.result, rows, calibration=setup.calibration)


if __name__ == "__main__":
    main()
