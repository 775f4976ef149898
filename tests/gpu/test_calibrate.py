"""Calibration and solving on a GPU: the program stays on the host, the result is that of the CPU up to ties."""

from __future__ import annotations

import pytest
import torch

import lopro_fx
from lopro_fx.layer import dense_weight
from lopro_fx.methods.base import Method
from lopro_fx.passes.to_device import to_device
from tests.helpers import relative_rms
from tests.huggingface.models import case, token_ids

pytestmark = pytest.mark.gpu
CONFIG = lopro_fx.LoPRo(bits=4, group_size=32, rank=4, importance="gradient", head_bits=8)
TRELLIS = lopro_fx.LoPRo(bits=3, format="trellis", window=12, strip=32, rank=4, importance="gradient")
METHODS: dict[str, Method] = {
    "affine": CONFIG,
    "trellis": TRELLIS,
    "flrq": lopro_fx.FLRQ(bits=4, group_size=32),
    "lrc": lopro_fx.LRC(group_size=32, act_group=32, factor_share=0.2),
    "lrq": lopro_fx.LRQ(bits=4, group_size=32, steps=12),
    "lrq low rank": lopro_fx.LRQ(bits=4, group_size=32, steps=12, divisors="low_rank", act_bits=8),
}


@pytest.mark.parametrize("name", METHODS)
def test_weights_stay_on_the_host_and_results_agree(name: str) -> None:
    config, program, batches = METHODS[name], case("tied").program, [token_ids(2, 24, seed) for seed in range(2)]
    here = lopro_fx.calibrate(program, batches, config)
    there = lopro_fx.calibrate(program, batches, config, device="cuda")
    assert {tensor.device.type for site in there.layers.values() for tensor in site.tensors.values()} == {"cpu"}
    losses = []
    for name, site in here.layers.items():
        other = there.layers[name]
        mine, theirs = (dense_weight(state.inputs[at.input], at) for state, at in ((here, site), (there, other)))
        # Each is as far from the weight as rounding takes it, and a sum in another order moves a rounding.
        assert relative_rms(mine, theirs) < 0.3, name
        losses += [(site.metrics[key], other.metrics[key]) for key in ("relative_loss", "block_error")
                   if key in site.metrics]  # fmt: skip
    # Weights that differ by 1e-6 move the loss of one layer by up to 15 percent.
    assert [there for _, there in losses] == pytest.approx([here for here, _ in losses], rel=0.4)
    assert sum(there for _, there in losses) == pytest.approx(sum(here for here, _ in losses), rel=0.1)


def test_a_program_on_the_gpu_is_solved_there() -> None:
    program = to_device(case("tied").program, torch.device("cuda", 0))
    state = lopro_fx.calibrate(program, [token_ids(2, 24)], CONFIG)
    assert {tensor.device.type for site in state.layers.values() for tensor in site.tensors.values()} == {"cuda"}
    ids = token_ids(2, 9).cuda()
    quantized = lopro_fx.apply(program, state).module()(ids)
    assert quantized.device.type == "cuda"
    assert quantized.isfinite().all()
