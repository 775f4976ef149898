"""The implementation "lopro" of transformers' experts computes what transformers' own functions do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from lopro_fx.models.routed import dispatches, routed_experts_in
from tests.helpers import TOLERANCE, assert_close, generator

EXPERTS, WIDTH, HIDDEN, SLOTS = 3, 8, 6, 2


def _experts(**flags: bool) -> Any:
    """Experts of a class with these flags."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn, self.post_expert_norm = EXPERTS, nn.SiLU(), nn.RMSNorm(WIDTH)
            gated = flags.get("has_gate", True)
            rows = {"gate_up_proj" if gated else "up_proj": (HIDDEN * (1 + gated), WIDTH), "down_proj": (WIDTH, HIDDEN)}
            for name, shape in rows.items():
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, shape[0])))
                stored = shape[::-1] if flags.get("is_transposed") else shape
                self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *stored)))

        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            raise AssertionError("transformers chooses another function")

    torch.manual_seed(0)
    made: Any = use_experts_implementation(**flags)(Experts)
    return made(SimpleNamespace(_experts_implementation="batched_mm"))


@pytest.mark.parametrize("flags", [
    {}, {"is_transposed": True}, {"has_bias": True}, {"has_gate": False}, {"has_post_expert_norm": True},
    {"is_transposed": True, "has_bias": True, "has_gate": False},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_batched_product(flags: dict[str, bool], dtype: torch.dtype) -> None:
    try:
        experts = _experts(**flags).to(dtype)
    except TypeError:
        pytest.skip("this transformers has no such experts")
    assert dispatches(experts)
    x = torch.randn(7, WIDTH, generator=generator(), dtype=dtype)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator(seed))[:SLOTS] for seed in range(7)])
    scores = torch.rand(7, SLOTS, generator=generator(1))
    plain = experts(x, ids, scores)
    experts.config._experts_implementation = "lopro"
    routed = experts(x, ids, scores)
    assert routed.dtype == dtype
    assert_close(str(flags), plain, routed, TOLERANCE[dtype])


def test_other_modules_are_left() -> None:
    assert not dispatches(nn.Linear(2, 2))
    with routed_experts_in(nn.Linear(2, 2)):
        pass
