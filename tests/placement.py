"""Calibration and solving of CPU programs on another device, run by tests/test_placement.py in a process of its own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram
from transformers import LlamaConfig, LlamaForCausalLM

import lopro_fx
from lopro_fx import FLRQ, GPTQ, LRC, LRQ, RTN, LoPRo, Method
from lopro_fx.methods.observers import Statistics
from lopro_fx.models import export_causal_lm
from tests.elsewhere import ELSEWHERE, placed
from tests.helpers import generator

_COMMON = {"bits": 3, "group_size": 32, "clip_steps": 4}
METHODS: dict[str, Method] = {
    "rtn": RTN(**_COMMON, head_bits=8),
    **{f"gptq {order}": GPTQ(**_COMMON, act_order=order) for order in ("group", "static", "column")},
    "lopro": LoPRo(**_COMMON, rank=4, transforms=("full", "partial"), salient=16, importance="gradient", head_bits=4),
    "lopro paper": LoPRo.paper(**{**_COMMON, "rank": 4, "salient": 16}),
    # Each component is a read; the budget allows as many in both of the widths below.
    "flrq": FLRQ(**_COMMON, rank_budget=0.9, least_gain=0),
    "flrq paper": FLRQ.paper(**_COMMON),
    "lrc": LRC(**_COMMON, rank=4),
    "lrq": LRQ(**_COMMON, steps=0),
    "lopro fp16 factors": LoPRo(**_COMMON, rank=4, factor_bits=16, sequential=False),
}
# Checks of the weights where they lie, draws of random numbers, and moves.
_AT_HOME = {
    "add", "flatten", "ne", "nonzero",
    "_to_copy", "abs", "alias", "amax", "as_strided", "clone", "detach", "expand", "le", "mul", "randint", "randn",
    "slice", "split", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


@functools.cache
def _program() -> ExportedProgram:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
        # The fused attention of the CPU is none of the other device's, and differs in the last bit.
        attn_implementation="eager",
    )  # fmt: skip
    return export_causal_lm(LlamaForCausalLM(config).eval())


def check_same_result(name: str) -> None:
    """Every code is that of the CPU, nothing is computed there, and what is kept is put there."""
    program, config = _program(), METHODS[name]
    batches = [torch.randint(97, (2, 20), generator=generator(seed)) for seed in range(2)]
    here = lopro_fx.calibrate(program, batches, config)
    there, placement = placed(lambda: lopro_fx.calibrate(program, batches, config, device=ELSEWHERE))
    for kept, other in ((here.inputs, there.inputs), (here.layers, there.layers)):
        for key, owner in kept.items():
            for tensor, value in owner.tensors.items():
                found = other[key].tensors[tensor]
                assert type(found) is torch.Tensor, (key, tensor)
                assert found.device.type == "cpu", (key, tensor)
                assert torch.equal(found, value), (key, tensor)
    computed = set(placement.on_cpu) - _AT_HOME
    assert not computed, f"{name}: on the CPU: {computed}"


def check_reads(name: str) -> None:
    """The numbers that the host waits for are as many for a wide layer as for a narrow one."""
    config, reads = METHODS[name], []
    for width in (64, 128):
        x = torch.randn(2 * width, width, generator=generator())
        weight = torch.randn(16, width, generator=generator(1))

        def solved(x: torch.Tensor = x, weight: torch.Tensor = weight) -> object:
            x, weight = x.to(ELSEWHERE), weight.to(ELSEWHERE)
            drift = torch.zeros_like(gram := x.T @ x / len(x))
            values = {"gram": gram, "magnitude": x.abs().mean(0), "drift": drift, "rounded": gram.repeat(2, 1, 1)}
            stats = Statistics(values, len(x), len(x))
            return config.solution([weight], stats, generator())

        reads.append(placed(solved)[1].reads)
    assert reads[1] == reads[0], f"{name}: {reads}"


def check_device() -> None:
    """The device itself refuses and counts what the other checks rest on."""

    def mixed() -> None:
        torch.ones(3).to(ELSEWHERE) + torch.ones(3)

    def strayed() -> Tensor:
        return torch.ones(3).to(ELSEWHERE).cpu().exp()

    with pytest.raises(RuntimeError, match="two devices"):
        placed(mixed)
    assert placed(strayed)[1].on_cpu["exp"] == 1
    assert placed(lambda: torch.ones(3).to(ELSEWHERE).sum().item())[1].reads == 1


if __name__ == "__main__":
    check_device()
    for each in METHODS:
        check_same_result(each)
        check_reads(each)
        print("ok", each)  # noqa: T201  what the test that runs this reads
