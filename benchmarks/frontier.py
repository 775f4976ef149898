"""Accuracy against true bits of SmolLM2-135M: uniform settings and budgets, every bit of the quantised layers counted.

Protocol of benchmarks/accuracy.py: dequantised fp32 model, calibration on the first 32 x 512 tokens of c4_calib.txt,
the first 24 windows of 512 tokens of wikitext2_test.txt. Beside perplexity: KL divergence from the unquantised model
and share of tokens whose likeliest next token is the same. The trellis's programs run by the CPU's kernels on packed
weights, with activations in fp32. Rows are added to the result file as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.accuracy import TRELLIS
from benchmarks.common import DATA, RESULTS, save_result
from lopro_fx import Budget, LoPRo, apply, calibrate, optimize
from lopro_fx.evaluation.divergence import divergence
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.models.export import export_causal_lm
from lopro_fx.models.load import load_model

BUDGETS = (1.6, 2.03, 2.35, 2.65, 3.03, 3.35, 4.15)
# Bits and ranks of low-rank branches that are compared with budgets of their size.
RANKS = ((2, 8), (2, 16), (2, 32), (3, 16))
_WIDE = replace(TRELLIS, window=16)
_ASYMMETRIC = replace(TRELLIS, asymmetry=0.4)
ROWS: dict[str, tuple[LoPRo, Budget | None]] = {
    **{f"trellis-{bits}": (replace(TRELLIS, bits=bits), None) for bits in (1.5, 2, 2.5, 3, 4)},
    **{f"budget-{bits}": (TRELLIS, Budget(bits_per_weight=bits)) for bits in BUDGETS},
    "budget-3.05-window-16": (_WIDE, Budget(bits_per_weight=3.05)),
    "trellis-4-window-16": (replace(_WIDE, bits=4), None),
    **{f"trellis-{bits}-rank-{rank}": (replace(TRELLIS, bits=bits, rank=rank), None) for bits, rank in RANKS},
    **{f"trellis-{bits}-asymmetric": (replace(_ASYMMETRIC, bits=bits), None) for bits in (2, 3)},
    **{f"budget-{bits}-asymmetric": (_ASYMMETRIC, Budget(bits_per_weight=bits)) for bits in BUDGETS[:4]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default all")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", torch.float32)
    program = export_causal_lm(loaded.model)
    calibration = token_windows(loaded.tokenizer, read_text(DATA / "c4_calib.txt"), 512, 32)
    windows = token_windows(loaded.tokenizer, read_text(DATA / "wikitext2_test.txt"), 512, 24)
    for name in args.rows or ROWS:
        method, budget = ROWS[name]
        started = time.perf_counter()
        state = calibrate(program, list(calibration.split(1)), method, budget=budget)
        row: dict[str, Any] = {"row": name, "seconds": time.perf_counter() - started}
        row |= {"bits_per_weight": state.bits_per_weight, "packed_bytes": state.packed_bytes}
        quantised = optimize(apply(program, state), target="cpu", activations="float")
        found = divergence(quantised.module(), program.module(), windows)
        row |= {"perplexity": found.program.ppl, "original": found.original.ppl, "kl": found.kl_mean}
        row |= {"kl_stderr": found.kl_stderr, "top1": found.top1, "top1_stderr": found.top1_stderr}
        print(row, flush=True)
        settings = {layer: f"{weight.weight.format} {weight.weight.spec['bits']:g}"
                    for layer, weight in state.layers.items()}  # fmt: skip
        # Read again at each row, so that two runs can share the file.
        path = RESULTS / "frontier.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        save_result("frontier", list({**done, name: {**row, "layers": settings}}.values()),
                    calibration="32x512 c4_calib.txt")  # fmt: skip


if __name__ == "__main__":
    main()
