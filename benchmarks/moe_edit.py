"""Time and memory of everything but rounding for a mixture of 48 layers of 128 experts: export, edit, store, load.

The graph is that of a Mixtral of Qwen3-30B-A3B's depth and number of experts; its widths are small, since what is
measured grows with nodes and tensors, not with their sizes. Each step's seconds, and the process's peak memory after
it.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import lopro_fx
from benchmarks.common import save_result
from lopro_fx.models import export_causal_lm

VOCAB = 512
Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def timed(name: str, step: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"step": name, "seconds": time.perf_counter() - started, "peak_bytes": peak})
        print(rows[-1], flush=True)
        return result

    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=args.width, intermediate_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=args.experts, num_experts_per_tok=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).eval()
    text = [torch.randint(VOCAB, (1, 128)) for _ in range(4)]
    program = timed("export", lambda: export_causal_lm(model))
    state = timed("calibrate, RTN", lambda: lopro_fx.calibrate(program, text, lopro_fx.RTN(bits=4, group_size=32)))
    quantised = timed("apply", lambda: lopro_fx.apply(program, state))
    for target in ("cpu", "cuda"):
        timed(f"optimize for {target}", lambda target=target: lopro_fx.optimize(quantised, target=target))
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: lopro_fx.save(quantised, Path(folder, "program")))
        timed("load", lambda: lopro_fx.load(Path(folder, "program")))
    save_result("moe_edit", rows, **vars(args), parameters=sum(value.numel() for value in model.parameters()))


if __name__ == "__main__":
    main()
