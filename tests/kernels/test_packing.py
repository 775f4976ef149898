"""The packed format against its NumPy twin, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lopro_fx.kernels.formats.affine.packing.format import (
    dequantize,
    group_count,
    pack,
    packed_words,
    unpack,
    unpack_at,
)
from tests.helpers import generator
from tests.kernels import oracle

BITS = (2, 3, 4, 8)


def _codes(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=generator(seed), dtype=torch.int32)


@given(bits=st.sampled_from(BITS), count=st.integers(1, 140), seed=st.integers(0, 999))
def test_words_equal_the_oracle(bits: int, count: int, seed: int) -> None:
    codes = _codes((count,), bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    np.testing.assert_array_equal(words.numpy().view(np.uint32), oracle.pack(codes.numpy(), bits))
    np.testing.assert_array_equal(
        unpack(words, bits, count).numpy(), oracle.unpack(words.numpy().view(np.uint32), bits, count)
    )


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), count=st.integers(1, 140), seed=st.integers(0, 999))
def test_round_trip_keeps_every_code(bits: int, rows: int, count: int, seed: int) -> None:
    codes = _codes((rows, count), bits, seed)
    words = pack(codes, bits)
    assert words.shape == (rows, packed_words(count, bits))
    torch.testing.assert_close(unpack(words, bits, count), codes, rtol=0, atol=0)


@given(bits=st.sampled_from(BITS), count=st.integers(1, 140), seed=st.integers(0, 999))
def test_single_codes_are_those_of_the_whole_row(bits: int, count: int, seed: int) -> None:
    codes = _codes((count,), bits, seed)
    index = torch.randint(0, count, (3, 5), generator=generator(seed))
    torch.testing.assert_close(unpack_at(pack(codes, bits), bits, index), codes[index], rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [32, 64, 576, 4096])
def test_whole_words_waste_nothing(bits: int, count: int) -> None:
    assert packed_words(count, bits) * 32 == count * bits


@pytest.mark.parametrize("bits", BITS)
def test_largest_codes_survive_the_sign_bit(bits: int) -> None:
    codes = torch.full((64,), (1 << bits) - 1, dtype=torch.uint8)
    words = pack(codes, bits)
    assert (words == -1).all()
    assert (unpack(words, bits, 64) == (1 << bits) - 1).all()


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_codes(bits: int) -> None:
    codes = torch.full((33,), (1 << bits) - 1, dtype=torch.uint8)
    assert not unpack(pack(codes, bits), bits, 64)[33:].any()


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 4),
    width=st.integers(1, 150),
    group_size=st.sampled_from((32, 64, 128, -1)),
    seed=st.integers(0, 999),
)
def test_dequantised_weight_equals_the_oracle(bits: int, rows: int, width: int, group_size: int, seed: int) -> None:
    groups = group_count(width, group_size)
    codes, zeros = _codes((rows, width), bits, seed), _codes((rows, groups), bits, seed + 1)
    scales = torch.randn(rows, groups, generator=generator(seed)).to(torch.float16)
    dense = dequantize(pack(codes, bits), scales, pack(zeros.flatten(), bits), bits, group_size, width, torch.float32)
    expected = oracle.dequantize(codes.numpy(), scales.numpy(), zeros.numpy(), group_size)
    np.testing.assert_array_equal(dense.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_the_fp32_ones_rounded_once(dtype: torch.dtype) -> None:
    codes, zeros = _codes((3, 70), 3, 0), _codes((3, 3), 3, 1)
    packed = (pack(codes, 3), torch.rand(3, 3, generator=generator()).to(torch.float16), pack(zeros.flatten(), 3))
    wide = dequantize(*packed, 3, 32, 70, torch.float32)
    torch.testing.assert_close(dequantize(*packed, 3, 32, 70, dtype), wide.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "group_size", "groups"), [(1, 32, 1), (32, 32, 1), (33, 32, 2), (99, -1, 1), (99, 128, 1)]
)
def test_last_group_may_be_short(width: int, group_size: int, groups: int) -> None:
    assert group_count(width, group_size) == groups
