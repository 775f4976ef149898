"""One rounding of activations: the kernels' integers are those of the definition, halves and zeros included."""

from __future__ import annotations

import pytest
import torch

from lopro_fx.kernels.activation.reference import LEAST, clip_for, integers
from lopro_fx.kernels.formats.affine.decode.device import activation_group, decode_prepare
from lopro_fx.kernels.formats.affine.decode.reference import prepare
from lopro_fx.kernels.formats.affine.packed_int8.device import round_device
from tests.helpers import generator


def _halves(top: int, tokens: int = 3, width: int = 256) -> torch.Tensor:
    """Numbers half-way between integers of a step of 1, largest `top`, and groups of zeros and of almost nothing."""
    x = torch.randint(-top + 1, top - 1, (tokens, width), generator=generator()) + 0.5
    x[:, ::32] = float(top)
    x[:, 32:64] = 0
    x[0, 64:96] = LEAST / 2
    return x


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_integers_of_the_product(device: torch.device, act_bits: int, group: int) -> None:
    top = (1 << act_bits - 1) - 1
    x = _halves(top)
    want, steps = integers(x, top, group, clip_for(act_bits, group))
    got, step, sums = round_device(x.to(device), None, None, 1, act_bits, group, group)
    assert torch.equal(got.cpu().float(), want.flatten(-2))
    if act_bits == 8:
        assert (got.cpu()[:, 1:32].float() - x[:, 1:32]).abs().eq(0.5).all()
    assert torch.equal(step.cpu().T, steps)
    assert torch.equal(sums.cpu().T, want.sum(-1) * steps)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (3, 32)])
def test_fixed_point_of_one_token(device: torch.device, bits: int, group_size: int) -> None:
    x = _halves(32767, 1)
    words, steps, _ = decode_prepare(x.to(device), None, None, 1, None, bits, group_size)
    want_words, want_steps = prepare(x, None, None, 1, bits, activation_group(group_size))
    assert torch.equal(words.cpu(), want_words)
    torch.testing.assert_close(steps.cpu(), want_steps, rtol=1e-6, atol=0)
