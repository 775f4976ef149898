"""Prefill on the CPU with rounded activations: packed weights against compiled bf16 and torchao's int8 products.

Decoder layers of the shape of Llama-3.2-1B with random weights, 512 tokens, without the output projection. All sides
are compiled programs in one process and take turns; the median of the rounds is compared.
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
from torch._inductor import config as inductor
from transformers import LlamaConfig, LlamaModel

from benchmarks.common import save_result
from lopro_fx import RTN, LoPRo, Method, apply, calibrate, optimize

TOKENS = 512
_W8: dict[str, Any] = {"bits": 8, "act_bits": 8}
_W4: dict[str, Any] = {"bits": 4, "group_size": 128, "act_bits": 8}
OURS: dict[str, Method] = {
    "W8A8, a step a row and token": RTN(**_W8, group_size=-1, act_group=-1),
    "W8A8, groups of 128, steps of 32 columns": RTN(**_W8, group_size=128),
    "W4A8, groups of 128, a step a token": RTN(**_W4, act_group=-1),
    "W4A8, groups of 128, steps of 32 columns": RTN(**_W4),
    "W4A8, groups of 128, rotated, steps of 128 columns": LoPRo(**_W4),
    "W4A16, groups of 128, fp32 products": RTN(**{**_W4, "act_bits": 0}),
}


class Layers(nn.Module):
    """Hidden states (1, T, width) of token ids (1, T), without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).last_hidden_state


def build(layers: int) -> Layers:
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=2048,
        num_hidden_layers=layers,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    return Layers(LlamaModel(config)).eval()


def packed(model: Layers, ids: Tensor, method: Method) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (ids,))
    activations = "int8" if method.act_bits else "float"
    rounded = optimize(apply(program, calibrate(program, None, method)), target="cpu", activations=activations)
    return torch.compile(rounded.module())


def torchao(model: nn.Module) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    inductor.freezing = True
    model, ids = build(args.layers), torch.randint(32768, (1, TOKENS))
    sides: dict[str, Callable[[Tensor], Any]] = {
        "fp32": torch.compile(copy.deepcopy(model)),
        "bf16": torch.compile(copy.deepcopy(model).bfloat16()),
        "torchao W8A8, fp32": torchao(copy.deepcopy(model)),
        "torchao W8A8, bf16": torchao(copy.deepcopy(model).bfloat16()),
        **{name: packed(model, ids, method) for name, method in OURS.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for name, side in sides.items():
                started = time.perf_counter()
                side(ids)
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    rows = [{"case": name, "ms": round(1000 * taken, 1), "times bf16": round(medians["bf16"] / taken, 2),
             "times torchao": round(medians["torchao W8A8, bf16"] / taken, 2)}
            for name, taken in medians.items()]  # fmt: skip
    for row in rows:
        print(row)
    save_result("cpu_prefill", rows, tokens=TOKENS, layers=args.layers, rounds=args.rounds)


if __name__ == "__main__":
    main()
