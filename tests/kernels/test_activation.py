"""The one definition of a rounded activation: each step as IEEE arithmetic says, on any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx.kernels.activation.reference import LEAST, clip_for, integers, round_activation
from tests.helpers import generator


@given(
    st.integers(1, 5), st.integers(1, 150), st.sampled_from((4, 8)), st.sampled_from((-1, 32, 64)), st.integers(0, 99)
)  # fmt: skip
def test_codes_and_steps_are_those_of_numpy(tokens: int, width: int, bits: int, group: int, seed: int) -> None:
    x, top = torch.randn(tokens, width, generator=generator(seed)), (1 << bits - 1) - 1
    size = width if group == -1 else group
    clip = clip_for(bits, size)
    codes, step = integers(x, top, group, clip)
    padded = np.pad(x.numpy(), ((0, 0), (0, -width % size))).reshape(tokens, -1, size)
    most = np.abs(padded).max(-1) * np.float32(clip)
    inverse = np.float32(top) / most
    assert np.array_equal(codes.numpy(), np.rint(padded * inverse[..., None]).clip(-top, top))
    assert np.array_equal(step.numpy(), most * np.float32(1 / top))
    assert np.abs(codes.numpy()).max() == top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "part"), [(8, 1 / 254), (4, 1 / 14)])
def test_no_number_moves_by_more_than_half_a_step(dtype: torch.dtype, bits: int, part: float) -> None:
    x = torch.randn(7, 3, 96, generator=generator()).to(dtype)
    rounded = round_activation(x, bits, 32)
    assert rounded.dtype == dtype
    most = x.float().unflatten(-1, (3, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, 32).flatten(-2)
    clipped = x.float().clamp(-most * clip_for(bits, 32), most * clip_for(bits, 32))
    assert ((rounded.float() - clipped).abs() <= most * (part + torch.finfo(dtype).eps)).all()
    if bits == 8:
        again = round_activation(rounded, bits, 32)
        assert (again.float() - rounded.float()).abs().max() <= most.max() * torch.finfo(dtype).eps


@pytest.mark.parametrize("columns", [32, 64, 128, 512, 1024])
def test_clipping_is_near_its_best(columns: int) -> None:
    """For numbers with and without heavy tails: within 3 % of the least squared error of any clipping."""
    for name, x in (("normal", torch.randn(4096, columns, generator=generator())),
                    ("Laplace", torch.empty(4096, columns).exponential_(generator=generator()))):  # fmt: skip
        errors = {}
        for clip in (*(step / 20 for step in range(12, 21)), clip_for(4, columns)):
            codes, step = integers(x, 7, columns, clip)
            errors[clip] = ((codes * step.unsqueeze(-1)).flatten(-2) - x).square().mean().item()
        assert errors[clip_for(4, columns)] <= 1.03 * min(errors.values()), (name, errors)


def test_zeros_and_almost_nothing_are_zero() -> None:
    x = torch.zeros(2, 64)
    x[1, :32] = LEAST / 2
    assert not round_activation(x, 8, 32).any()
