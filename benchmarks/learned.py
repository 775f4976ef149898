"""Learned rounding beside solved rounding: error, learned numbers and time, at 3 bits and with 8-bit activations.

Models, text and figures of benchmarks/frontier.py; weights in groups of 128 columns, or of the whole row where it has
no more. Rows of learned rounding on stories260k have three seeds. The error of a block is that of its held-out batches.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.common import RESULTS, save_result, solver
from benchmarks.frontier import SETUPS
from lopro_fx import GPTQ, LRQ, RTN, LoPRo, Method, apply, calibrate, optimize
from lopro_fx.evaluation.divergence import divergence
from lopro_fx.models.export import export_causal_lm
from lopro_fx.models.load import load_model

_W3: dict[str, Any] = {"bits": 3, "group_size": 128, "importance": "gradient"}
_W4: dict[str, Any] = {**_W3, "bits": 4}
_LEARNED: dict[str, dict[str, Any]] = {
    "flexround-rtn": {"start": "rtn", "divisors": "full"},
    "lrq-rtn": {"start": "rtn", "divisors": "low_rank"},
    "flexround": {"divisors": "full"},
    "lrq": {"divisors": "low_rank"},
}
_SEEDS = (0, 1, 2)
ROWS: dict[str, Method] = {
    "rtn": RTN(**_W3),
    "gptq": GPTQ(**_W3, asymmetry=0.4),
    "lopro": LoPRo(**_W3),
    **{f"{name} {seed}": LRQ(**{**_W3, **own, "seed": seed}) for name, own in _LEARNED.items() for seed in _SEEDS},
    **{
        f"w4a{act or 16}-{name}": kind(**_W4, act_bits=act)
        for act in (0, 8)
        for name, kind in (("rtn", RTN), ("gptq", GPTQ), ("lopro", LoPRo), ("lrq", LRQ))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"any of {', '.join(ROWS)}; default all")
    parser.add_argument("--model", choices=SETUPS, default="smollm2-135m")
    parser.add_argument("--device", help="where to measure and solve; default the CPU, which runs the result")
    args = parser.parse_args()
    setup = SETUPS[args.model]
    result = setup.result.replace("frontier", "learned")
    loaded = load_model(setup.model, torch.float32)
    program = export_causal_lm(loaded.model)
    calibration, windows = setup.text(loaded.tokenizer)
    for name in args.rows or ROWS:
        started = time.perf_counter()
        state = calibrate(program, list(calibration.split(1)), ROWS[name], device=args.device)
        row: dict[str, Any] = {"row": name, "seconds": time.perf_counter() - started, "solved_on": solver(args.device)}
        found = divergence(optimize(apply(program, state), target="cpu", activations="float").module(),
                           program.module(), windows)  # fmt: skip
        metrics = [layer.metrics for layer in state.layers.values()]
        row |= {"bits_per_weight": state.bits_per_weight, "perplexity": found.program.ppl}
        row |= {"original": found.original.ppl, "kl": found.kl_mean, "kl_stderr": found.kl_stderr, "top1": found.top1}
        row |= {"learned_numbers": sum(own.get("learned_numbers", 0) for own in metrics), "config": state.config}
        row |= {"weights": sum(layer.weights for layer in state.layers.values())}
        errors = [own["block_error"] / own["block_error_before"] for own in metrics if own.get("block_error_before")]
        row |= {"block_error_ratio": sum(errors) / len(errors) if errors else None}
        print({key: value for key, value in row.items() if key != "config"}, flush=True)
        # Read again at each row, so that two runs can share the file.
        path = RESULTS / f"{result}.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        save_result(result, list({**done, name: row}.values()), calibration=setup.calibration)


if __name__ == "__main__":
    main()
