"""`lopro::packed_embedding` against a lookup in the whole dequantised table, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.formats.affine.packing.format import dequantize, group_count, pack
from tests.helpers import generator

ROWS = 37
lookup = torch.ops.lopro.packed_embedding.default


def _table(bits: int, width: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng, groups = generator(seed), group_count(width, group_size)
    codes = torch.randint(0, 1 << bits, (ROWS, width), generator=rng)
    zeros = torch.randint(0, 1 << bits, (ROWS * groups,), generator=rng)
    return pack(codes, bits), torch.randn(ROWS, groups, generator=rng).half(), pack(zeros, bits)


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    width=st.integers(1, 300),
    group_size=st.sampled_from((32, 64, 128, -1)),
    shape=st.lists(st.integers(0, 4), max_size=3),
    kind=st.sampled_from((torch.int32, torch.int64)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 999),
)
def test_rows_are_those_of_the_dense_table(
    bits: int, width: int, group_size: int, shape: list[int], kind: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    table = _table(bits, width, group_size, seed)
    ids = torch.randint(0, ROWS, shape, generator=generator(seed)).to(kind)
    got = lookup(ids, *table, bits, group_size, width, dtype)
    dense = dequantize(*table, bits, group_size, width, dtype)
    torch.testing.assert_close(got, functional.embedding(ids, dense), rtol=0, atol=0)


def test_nothing_is_read_from_memory_that_was_not_written(poisoned_memory: None) -> None:
    table, ids = _table(4, 99, 32), torch.arange(ROWS)
    assert lookup(ids, *table, 4, 32, 99, torch.float32).isfinite().all()


@pytest.mark.parametrize("outside", [-1, ROWS])
def test_an_id_outside_of_the_table_is_an_error(outside: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        lookup(torch.tensor([outside]), *_table(8, 40, 32), 8, 32, 40, torch.float32)


def test_no_other_row_is_unpacked() -> None:
    """Peak of a lookup in a table of 64 MB, by what the allocator of the profiler sees."""
    codes, scales = torch.zeros(65536, 256, dtype=torch.int32), torch.ones(65536, 16).half()
    zeros = pack(torch.zeros(65536 * 16, dtype=torch.int32), 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        lookup(torch.tensor([5]), codes, scales, zeros, 8, 64, 1024, torch.float32)
    largest = max(abs(event.cpu_memory_usage) for event in profile.events() or ())
    assert 1024 <= largest < 100_000
