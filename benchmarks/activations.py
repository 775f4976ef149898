"""Accuracy with 4-bit activations: rounding, rotation, and what a low-rank branch buys, every stored bit counted.

SmolLM2-135M by the protocol of benchmarks/frontier.py; weights of 4 bits in groups of 128, activations of 4 bits with a
step for each 128 columns of a token, unless stated. The output projection keeps its activations. Programs run by the
CPU's kernels, which compute with the stored 4-bit integers. Rows are added to the result file as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.common import DATA, RESULTS, save_result, solver
from lopro_fx import GPTQ, LRC, RTN, LoPRo, Method, apply, calibrate, optimize
from lopro_fx.evaluation.divergence import divergence
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.models.export import export_causal_lm
from lopro_fx.models.load import load_model

_W4A4: dict[str, Any] = {"bits": 4, "group_size": 128, "act_bits": 4, "act_group": 128}
# Nothing that GPTQ behind a rotation lacks.
_PLAIN: dict[str, Any] = {**_W4A4, "importance": "none", "asymmetry": 0.0}
_PAPER: dict[str, Any] = {**_PLAIN, "compensation": 1.0, "deflated": False}
_BEST: dict[str, Any] = {**_W4A4, "importance": "gradient"}
ROWS: dict[str, Method] = {
    "rtn": RTN(**_W4A4),
    "gptq": GPTQ(**_W4A4),
    "rotated": LoPRo(**_PLAIN),
    "rotated-best": LoPRo(**_BEST),
    # The bytes of a branch in groups of 32, and activations with them.
    "rotated-32": LoPRo(**{**_PLAIN, "group_size": 32, "act_group": 32}),
    "rotated-32-best": LoPRo(**{**_BEST, "group_size": 32, "act_group": 32}),
    # Groups of 32 for activations alone: no byte more, and for the compiled kernel of CPUs none of its groups.
    "rotated-act-32": LoPRo(**{**_PLAIN, "act_group": 32}),
    "lrc-10-32-best": LRC(**{**_BEST, "group_size": 32, "act_group": 32}),
    # Factors for the rounding error of the weights, of about the size of "lrc-10".
    "rotated-rank-40": LoPRo(**_PLAIN, rank=40),
    "lrc-0-paper": LRC(**_PAPER, rank=0),
    "lrc-0": LRC(**_PLAIN, rank=0),
    "lrc-10-paper": LRC(**_PAPER),
    "lrc-10-paper-5": LRC(**_PAPER, iterations=5),
    "lrc-30-paper": LRC(**_PAPER, factor_share=0.3),
    "lrc-10-deflated": LRC(**_PLAIN, deflated=True),
    **{f"lrc-{share}": LRC(**_PLAIN, deflated=False, factor_share=share / 100) for share in (10, 20, 30)},
    **{f"lrc-{share}-best": LRC(**_BEST, factor_share=share / 100) for share in (0, 10, 20, 30)},
    "lrc-10-best-5": LRC(**_BEST, iterations=5),
    "w4a16": LoPRo(**{**_BEST, "act_bits": 0}),
    "w4a8": LoPRo(**{**_BEST, "act_bits": 8}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default all")
    parser.add_argument("--device", help="where to measure and solve; default the CPU, which runs the result")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", torch.float32)
    program = export_causal_lm(loaded.model)
    calibration = token_windows(loaded.tokenizer, read_text(DATA / "c4_calib.txt"), 512, 32)
    windows = token_windows(loaded.tokenizer, read_text(DATA / "wikitext2_test.txt"), 512, 24)
    for name in args.rows or ROWS:
        started = time.perf_counter()
        state = calibrate(program, list(calibration.split(1)), ROWS[name], device=args.device)
        row: dict[str, Any] = {"row": name, "seconds": time.perf_counter() - started, "solved_on": solver(args.device)}
        found = divergence(optimize(apply(program, state), target="cpu", activations="float").module(),
                           program.module(), windows)  # fmt: skip
        row |= {"bits_per_weight": state.bits_per_weight, "perplexity": found.program.ppl}
        row |= {"original": found.original.ppl, "kl": found.kl_mean, "kl_stderr": found.kl_stderr, "top1": found.top1}
        row |= {"ranks": sorted({layer.metrics["rank"] for layer in state.layers.values()}), "config": state.config}
        print(row["row"], row["bits_per_weight"], row["perplexity"], row["kl"], flush=True)
        # Read again at each row, so that two runs can share the file.
        path = RESULTS / "activations.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        save_result("activations", list({**done, name: row}.values()), calibration="32x512 c4_calib.txt")


if __name__ == "__main__":
    main()
