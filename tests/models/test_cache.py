"""Keys and values in 8 and 4 bits: the bound of the rounding, and programs that read what they have rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lopro_fx
from lopro_fx.errors import ConfigError
from lopro_fx.generation.cache import restored, stored, stored_width
from tests.families import VOCAB, causal_lm
from tests.helpers import assert_close, generator, relative_rms


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([2, 16, 64]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.sampled_from([0.0, -7.0, 40.0]),
    st.integers(0, 99),
)
def test_an_error_is_at_most_half_a_step(
    bits: int, width: int, dtype: torch.dtype, scale: float, offset: float, seed: int
) -> None:
    x = ((torch.randn(3, 2, 5, width, generator=generator(seed)) + offset) * scale).to(dtype)
    rows = stored(x, bits)
    assert rows.dtype == torch.uint8
    assert rows.shape[-1] == stored_width(width, bits)
    found = restored(rows, width, bits, torch.float32)
    wide = x.float()
    span = wide.amax(-1, keepdim=True) - wide.amin(-1, keepdim=True)
    # The range is wider by what its ends lose when they are cut.
    step = (span + 2.0**-13 * wide.amin(-1, keepdim=True).abs()) * (1 + 2.0**-5) / ((1 << bits) - 1)
    assert ((found - wide).abs() <= 0.501 * step + 1e-45).all()
    # Tokens and heads are rounded by themselves.
    assert torch.equal(stored(x[:, :1, 2:3], bits), rows[:, :1, 2:3])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_one_number_and_a_row_of_zeros(bits: int) -> None:
    x = torch.tensor([[0.0] * 8, [3.25] * 8, [-1e-20] * 8])
    found = restored(stored(x, bits), 8, bits, torch.float32)
    assert torch.equal(found[0], x[0])
    assert ((found - x).abs() <= x.abs() * 0.02).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_type_can_hold_stays_finite(bits: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor([[-most, 0.0, 1.0, most], [most, most, most / 2, 0.0]], dtype=dtype)
    assert restored(stored(x, bits), 4, bits, dtype).isfinite().all()


@pytest.mark.parametrize(("name", "bits", "limit", "share"), [("gemma2", 8, 0.02, 0.41), ("llama", 4, 0.3, 0.3)])
def test_programs_with_a_rounded_cache(name: str, bits: int, limit: float, share: float) -> None:
    model = causal_lm(name)
    plain = lopro_fx.export_for_generation(model, max_cache_len=24, batch_size=2)
    programs = lopro_fx.export_for_generation(model, max_cache_len=24, batch_size=2, cache_bits=bits)
    assert lopro_fx.CacheSpec.from_dict(programs.cache.to_dict()) == programs.cache
    # Heads of these models have 8 columns, beside which 5 bytes weigh more than in a real one.
    assert programs.cache.bytes_per_token <= share * plain.cache.bytes_per_token
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator())
    padding = torch.tensor([0, 3])
    run, exact = (lopro_fx.Generator.from_programs(each) for each in (programs, plain))
    wanted = exact.prefill(ids, padding)
    assert 0 < relative_rms(wanted, run.prefill(ids, padding)) < limit
    # A text in pieces reads the same rounded numbers as one in a pass.
    whole = run.prefill(ids[:, :1])
    run.reset()
    run.prefill(torch.cat([ids, ids[:, :1]], 1)[:, :4], padding)
    run.prefill(torch.cat([ids, ids[:, :1]], 1)[:, 4:9])
    assert_close("logits", whole, run.decode(ids[:, :1]), 1e-4)


def test_other_bits_are_refused(llama) -> None:
    for bits in (3, 8.0, True, "8"):
        given: Any = bits
        with pytest.raises(ConfigError, match=f"cache_bits={bits!r}"):
            lopro_fx.export_for_generation(llama, max_cache_len=8, cache_bits=given)
