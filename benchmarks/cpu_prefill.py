"""Decoder layers on 512 tokens on a CPU: weights of 8 and 4 bits with 8-bit activations beside bf16 and torchao.

SmolLM2-135M without its output projection, one text of 512 tokens, every side compiled by torch.compile with fixed
sizes. "torchao" is Int8DynamicActivationInt8Weight on the bf16 model. Sides take turns; medians of all turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from benchmarks.common import save_result
from lopro_fx import RTN, optimize, quantize
from lopro_fx.models.load import load_model

_TOKENS = 512


class _Layers(nn.Module):
    """Token ids (1, S) to the last hidden states."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state


def sides(ids: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Compiled functions of token ids, by name."""
    layers = _Layers(load_model("smollm2-135m", torch.bfloat16).model.model).eval()
    rounded = copy.deepcopy(layers)
    quantize_(rounded, Int8DynamicActivationInt8WeightConfig())
    found: dict[str, Callable[[Tensor], Tensor]] = {"bf16": layers, "torchao, W8A8": rounded}
    wide = _Layers(load_model("smollm2-135m", torch.float32).model.model).eval()
    for bits in (8, 4):
        program = quantize(torch.export.export(wide, (ids,)), None, RTN(bits=bits, group_size=128, head_bits=0))
        found[f"lopro_fx, W{bits}A8"] = optimize(program, target="cpu", activations="int8").module()
    return {name: torch.compile(side, dynamic=False) for name, side in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    turns = parser.parse_args().turns
    ids = torch.randint(0, 49152, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        compiled = sides(ids)
        for turn in range(turns + 1):
            for name, side in compiled.items():
                started = time.perf_counter()
                side(ids)
                # The first call compiles.
                if turn:
                    times.setdefault(name, []).append(time.perf_counter() - started)
    rows = []
    for name, own in times.items():
        median = statistics.median(own)
        rows.append({
            "row": name, "milliseconds": 1e3 * median, "least": 1e3 * min(own), "most": 1e3 * max(own),
            "times_bf16": statistics.median(times["bf16"]) / median,
            "times_torchao": statistics.median(times["torchao, W8A8"]) / median,
        })  # fmt: skip
        print(rows[-1], flush=True)
    save_result("cpu_prefill", rows, tokens=_TOKENS, turns=turns)


if __name__ == "__main__":
    main()
