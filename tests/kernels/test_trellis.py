"""The trellis code and its search: windows are a walk of states, and the search finds the least error."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lopro_fx.kernels.cpu.native import forced, library
from lopro_fx.kernels.formats.registry import FORMATS
from lopro_fx.kernels.formats.trellis.code import code_words, pack_states, padded, strip_rows, table, values, windows
from lopro_fx.kernels.formats.trellis.encode import native, reference
from lopro_fx.kernels.formats.trellis.quantizer import TrellisQuantizer
from tests.helpers import generator

BITS = (1.5, 2, 2.5, 3, 4)
STEPS = [(3, 2), (4, 2), (5, 2), (2, 1), (3, 1), (4, 1)]
steps, sizes = st.sampled_from(STEPS), st.integers(1, 100)
strips, window_sizes = st.sampled_from((-1, 32, 64, 512)), st.integers(12, 16)


def _walk(rows: int, pairs: int, step: int, window: int, strip: int, seed: int) -> Tensor:
    """Random states int64 (rows, pairs), row by row from the last of each strip."""
    states, first = torch.zeros(rows, pairs, dtype=torch.int64), 0
    for count in strip_rows(rows, strip):
        state = torch.zeros(pairs, dtype=torch.int64)
        for row in range(first + count - 1, first - 1, -1):
            new = torch.randint(1 << step, (pairs,), generator=generator(seed * 1000 + row))
            state = (state << step | new) & (1 << window) - 1
            states[row] = state
        first += count
    return states


@given(sizes, st.integers(1, 9), steps, window_sizes, strips, st.integers(0, 9))
def test_windows_of_the_string_are_the_walk_of_states(
    rows: int, width: int, step: tuple[int, int], window: int, strip: int, seed: int
) -> None:
    new, columns = step
    states = _walk(rows, -(-width // columns), new, window, strip, seed)
    codes = pack_states(states, new, strip)
    assert codes.shape == (code_words((rows, width), new, columns, strip),)
    assert torch.equal(windows(codes, (rows, width), new, columns, window, strip), states)


@given(st.integers(1, 5000), strips)
def test_strips_hold_every_row_once(rows: int, strip: int) -> None:
    parts = strip_rows(rows, strip)
    assert sum(parts) == rows
    if strip == -1:
        assert parts == [rows]
    else:
        assert all(part == strip for part in parts[:-1])
        assert parts[-1] <= 1.5 * strip
        assert len(parts) == 1 or 2 * parts[-1] >= strip


def test_values_are_those_of_the_bytes_of_the_product() -> None:
    for state in (0, 1, 2, 77, 4095, 65535):
        parts = (state * 0x83DCD12D % 2**32).to_bytes(4, "little")
        assert values(torch.tensor(state), 1).tolist() == [(sum(parts) - 510) / 128]
        pair = [(parts[0] + parts[3] - 255) / 128, (parts[1] + parts[2] - 255) / 128]
        assert values(torch.tensor(state), 2).tolist() == pair
        assert table(16, 2)[state].tolist() == pair


@given(st.integers(1, 3), st.sampled_from(((2, 1), (3, 1), (4, 2))), st.integers(0, 99))
@settings(max_examples=10)
def test_the_search_finds_the_least_error(rows: int, step: tuple[int, int], seed: int) -> None:
    """Against every string of so few rows."""
    (new, columns), rng = step, generator(seed)
    first, second = torch.randn(2, rows, generator=rng)
    weight = torch.rand(rows, generator=rng) + 0.1
    carry, ratio = (0.3, 0.7) if columns == 2 else (0.0, 0.0)
    values_ = table(12, columns)

    def loss(states: list[int]) -> float:
        total = 0.0
        for row, state in enumerate(states):
            error = first[row] - values_[state, 0]
            total += float(weight[row] * error**2)
            if columns == 2:
                total += float(weight[row] * ratio * (second[row] + carry * error - values_[state, 1]) ** 2)
        return total

    found = reference.search(first, second, carry, weight, ratio, new, values_).tolist()
    best = float("inf")
    for bits in product(range(1 << new), repeat=rows):
        state, walk = 0, []
        for b in bits:
            state = (state << new | b) & 4095
            walk.append(state)
        best = min(best, loss(walk[::-1]))
    assert loss(found) == pytest.approx(best, rel=1e-4, abs=1e-5)


def _squared(first: Tensor, second: Tensor, carry: float, weight: Tensor, ratio: float, found: Tensor) -> float:
    """What `reference.search` makes least, of the values (rows, 1 or 2) that were found."""
    error = first - found[:, 0]
    total = error.square()
    if found.shape[1] == 2:
        total = total + ratio * (second + carry * error - found[:, 1]).square()
    return float((weight * total).sum())


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["even", "uneven", "outliers", "dead rows"])
def test_compiled_search_is_the_definition(path: str, step: tuple[int, int], kind: str) -> None:
    """Its costs are 16-bit integers: each string is a walk from state 0, and costs at most 1 % more than the least."""
    (new, columns), rng, rows, window = step, generator(3), [97, 1, 3, 40], 12
    weight = torch.randn(2 * columns, sum(rows), generator=rng)
    upper = torch.eye(len(weight)) + torch.randn(len(weight), len(weight), generator=rng).triu(1) * 0.3
    pivots, importance = torch.rand(len(weight), generator=rng) + 0.5, torch.rand(sum(rows), generator=rng) + 0.5
    if kind == "uneven":
        importance = torch.randn(sum(rows), generator=rng).exp()
    elif kind == "outliers":
        weight[:, ::7] *= 100
    elif kind == "dead rows":
        weight[:, 10:20] = importance[30:80] = importance[97] = 0
    with forced(path) as there:
        if not there:
            pytest.skip(f"this processor has no {path}")
        error, packed = native.encode(weight, weight.clone(), upper, pivots, importance, rows, new, columns, window)
    states, values_, target = packed.long() & 0xFFFF, table(window, columns), weight.clone()
    for part in states.T.split(rows):
        assert torch.equal(windows(pack_states(part, new, -1), tuple(part.shape), new, 1, window, -1), part)
    least = cost = 0.0
    for j in range(0, len(weight), columns):
        found = values_[states[j // columns]]
        assert torch.equal(error[j : j + columns], weight[j : j + columns] - found.T)
        carry, ratio = (float(upper[j, j + 1]), float(pivots[j + 1] / pivots[j])) if columns == 2 else (0.0, 0.0)
        second = target[j + columns - 1] + carry * (weight[j] - target[j])
        for first, other, own, part in zip(
            *(t.split(rows) for t in (target[j], second, importance, found)), strict=True
        ):
            best = values_[reference.search(first, other, carry, own, ratio, new, values_)]
            cost += _squared(first, other, carry, own, ratio, part)
            least += _squared(first, other, carry, own, ratio, best)
        target[j + columns :] += upper[j : j + columns, j + columns :].T @ error[j : j + columns]
    assert least <= cost * (1 + 1e-5)
    assert cost <= 1.01 * least


@given(st.sampled_from(BITS), sizes, sizes, strips, st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_packed_weights_are_the_rounded_ones(bits: float, rows: int, width: int, strip: int, seed: int) -> None:
    weight = torch.randn(rows, width, generator=generator(seed))
    weight[rows // 2] = 0
    rounded = TrellisQuantizer(bits=bits, window=12, strip=strip).nearest(weight, (rows,))
    packed, format = rounded.packed(), FORMATS["trellis"]
    assert torch.equal(format.dequantize(packed, torch.float32), rounded.dense())
    ids = torch.randint(rows, (2, 3), generator=generator(seed))
    assert torch.equal(format.lookup(packed, ids, torch.float32), rounded.dense()[ids])
    empty = format.empty(packed.shape, packed.spec).tensors
    assert {name: t.shape for name, t in packed.tensors.items()} == {name: t.shape for name, t in empty.items()}
    bound = 16 * rows + bits * (width + 1) * sum(map(padded, strip_rows(rows, strip)))
    assert 8 * sum(t.nbytes for t in packed.tensors.values()) <= bound


@pytest.mark.skipif(library() is None, reason="no C++ compiler: the search in ATen takes minutes")
@pytest.mark.parametrize(("bits", "most"), [(2, 0.077), (3, 0.0185), (4, 0.0050)])
def test_a_gaussian_source_is_rounded_near_the_limit(bits: float, most: float) -> None:
    weight = torch.randn(512, 8, generator=generator(1))
    rounded = TrellisQuantizer(bits=bits).nearest(weight, (512,))
    assert (weight - rounded.dense()).square().mean() / weight.square().mean() < most


def test_strips_of_one_size_join() -> None:
    format, quantizer = FORMATS["trellis"], TrellisQuantizer(bits=3, window=12, strip=32)
    weight = torch.randn(64 + 40, 5, generator=generator(2))
    rounded = quantizer.nearest(weight, (64, 40))
    joined = format.cat([part.packed() for part in rounded.split((64, 40))])
    assert not isinstance(joined, str)
    assert torch.equal(format.dequantize(joined, torch.float32), rounded.dense())
    reason = format.cat([part.packed() for part in quantizer.nearest(weight, (40, 64)).split((40, 64))])
    assert reason == "40, 64 rows are not whole strips of 32"
