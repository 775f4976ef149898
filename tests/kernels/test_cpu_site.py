"""`lopro::cpu_site`: every path of the compiled kernel against its definition in ATen, and that against packed_site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels.activation.reference import GROUPS
from lopro_fx.kernels.cpu import build, native
from lopro_fx.kernels.formats.affine.cpu_site import reference
from lopro_fx.kernels.formats.affine.packing.format import group_count, pack
from lopro_fx.kernels.rotate.reference import pack_signs
from tests.helpers import TOLERANCE, assert_close, generator, heavy_tailed

cpu_site = torch.ops.lopro.cpu_site.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One activation in some thousands lies so close to the middle of two integers that the order of a sum decides.
ROUNDED = 2e-3
# By bits of an activation: a number on the edge of two steps may take either.
SPREAD = {0: 3e-6, 4: 2e-2, 8: ROUNDED}


def operands(
    out: int, width: int, bits: int, group_size: int, *, rank: int = 0, parts: int = 0, block: int = 1, skip: int = 0,
    permuted: bool = False, biased: bool = False, factor_bits: int = 8,
) -> tuple[Any, ...]:  # fmt: skip
    """Operands after the activation, without `act_bits`; random, the zero codes too."""
    rng, groups = generator(11), group_count(width, group_size)
    codes = pack(torch.randint(0, 1 << bits, (out, width), generator=rng), bits)
    zeros = pack(torch.randint(0, 1 << bits, (out * groups,), generator=rng), bits)
    scales = (torch.rand(out, groups, generator=rng) / (1 << bits)).to(torch.float16)
    down = up = down_scale = up_scale = None
    if rank and factor_bits == 16:
        down, up = ((torch.randn(shape, generator=rng) / 8).half() for shape in ((rank, width), (out, rank)))
    elif rank:
        down, up = (torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
                    for shape in ((rank, width), (out, rank)))  # fmt: skip
        down_scale = (torch.rand(rank, generator=rng) / 500).half()
        up_scale = (torch.rand((parts, rank) if parts else (rank,), generator=rng) / 500).half()
    perm = torch.randperm(width, generator=rng).to(torch.int16) if permuted else None
    signs = pack_signs(torch.randint(0, 2, (width,), generator=rng) * 2 - 1) if block > 1 else None
    bias = torch.randn(out, generator=rng) if biased else None
    return (perm, signs, block, skip, down, down_scale, codes, scales, zeros, bias, up, up_scale, bits, group_size)


@pytest.fixture(params=native.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path of the kernel that this processor has."""
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    with native.forced(request.param) as found:
        if not found:
            pytest.skip(f"this processor has no {request.param}")
        assert native.active_path() == request.param
        yield request.param


def compare(x: Tensor, site: tuple[Any, ...], act_bits: int, act_group: int = 0) -> None:
    expected, got = reference.cpu_site(x, *site, act_bits, act_group), cpu_site(x, *site, act_bits, act_group)
    assert got.dtype == x.dtype
    assert_close(f"{tuple(x.shape)}", expected, got, max(SPREAD[act_bits], 2 * TOLERANCE[x.dtype]))


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_bits", [0, 8])
def test_paths_equal_the_definition(path: str, act_bits: int, bits: int, group_size: int) -> None:
    for width, block in ((96, 32), (576, 64), (1000, 8), (1536, 512)):
        site = operands(35, width, bits, group_size, block=block)
        for tokens in (1, 3, 17):
            compare(heavy_tailed(tokens, width), site, act_bits)


@pytest.mark.parametrize("group_size", [32, 96, 128, -1])
@pytest.mark.parametrize("act_group", GROUPS)
def test_groups_of_activations(path: str, act_group: int, group_size: int) -> None:
    for width, block, bits in ((96, 1, 3), (1000, 8, 8), (1536, 512, 4), (1536, 1, 8)):
        site = operands(35, width, bits, group_size, block=block, rank=3)
        for tokens, act_bits in ((1, 8), (3, 4), (17, 8), (17, 4)):
            compare(heavy_tailed(tokens, width), site, act_bits, act_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_every_operand(path: str, dtype: torch.dtype, tokens: int) -> None:
    x = heavy_tailed(tokens, 576).to(dtype)
    for options in ({"parts": 5}, {"parts": 2}, {"parts": 0}, {"factor_bits": 16}):
        site = operands(50, 576, 3, 64, rank=19, block=64, skip=64, permuted=True, biased=True, **options)
        for act_bits in (0, 4, 8):
            compare(x, site, act_bits)


@settings(max_examples=40)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    block = 1 << data.draw(st.integers(0, 7), "log2 of the block")
    skip = data.draw(st.integers(0, 40), "skip") if block > 1 else 0
    width = skip + block * data.draw(st.integers(1, max(1, 600 // block)), "blocks")
    tokens, out = data.draw(st.integers(0, 40), "tokens"), data.draw(st.integers(1, 70), "rows")
    rank = data.draw(st.integers(0, 20), "rank")
    site = operands(
        out, width, data.draw(st.sampled_from([2, 3, 4, 8]), "bits"),
        data.draw(st.sampled_from([32, 64, 96, 128, 256, -1]), "group size"), rank=rank,
        block=block, skip=skip, permuted=data.draw(st.booleans(), "permuted"),
        biased=data.draw(st.booleans(), "biased"),
    )  # fmt: skip
    x = torch.randn(tokens, width, generator=generator())
    with native.forced(data.draw(st.sampled_from(native.PATHS), "path")):
        compare(x, site, 0)


@pytest.mark.parametrize("act_bits", [0, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_do_not_depend_on_the_number_of_tokens(path: str, bits: int, act_bits: int) -> None:
    site = operands(40, 320, bits, 64, rank=4, block=64)
    x = heavy_tailed(30, 320)
    alone = torch.cat([cpu_site(row, *site, act_bits) for row in x.split(1)])
    for count in (4, 7, 30):
        assert_close(f"{count} tokens", alone[:count], cpu_site(x[:count], *site, act_bits), 2e-6)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("tokens", "out"), [(1, 300), (1, 3001), (5, 300), (30, 300)])
def test_threads_agree(path: str, tokens: int, out: int, bits: int) -> None:
    x, site = heavy_tailed(tokens, 512), operands(out, 512, bits, 128, rank=4, block=64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(cpu_site(x, *site, 8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_output_is_written_in_full(path: str, poisoned_memory: None) -> None:
    for tokens in (1, 6, 20):
        assert torch.isfinite(cpu_site(torch.ones(tokens, 96), *operands(37, 96, 3, 32), 8)).all()


def test_any_layout_of_the_activation(path: str) -> None:
    site = operands(20, 64, 4, 32, block=32)
    dense = torch.randn(4, 6, 64, generator=generator())
    wide = torch.randn(4, 6, 128, generator=generator())
    for x in (dense.transpose(0, 1), wide[..., ::2], dense[:, :1].expand(4, 3, 64), dense[0, 0], dense[:, 1:1]):
        compare(x, site, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_value_that_is_not_finite_shows(path: str, value: float, tokens: int) -> None:
    x = torch.ones(tokens, 64)
    x[0, 5] = value
    y = cpu_site(x, *operands(20, 64, 4, 32), 8)
    assert not torch.isfinite(y[0]).any()
    assert torch.isfinite(y[1:]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_a_scale_that_is_not_finite_shows_in_its_row_alone(path: str, tokens: int, bits: int, value: float) -> None:
    for width, group_size, block in ((576, 64, 64), (576, 128, 64), (96, 96, 1)):
        site = operands(21, width, bits, group_size, block=block)
        site[7][9] = value
        finite = torch.isfinite(cpu_site(heavy_tailed(tokens, width), *site, 8))
        assert not finite[:, 9].any()
        assert finite.sum() == tokens * 20


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_long_rows(path: str, bits: int) -> None:
    """Several rows are longer than what memory is asked for in advance at least."""
    x = torch.randn(1, 20000, generator=generator())
    x[:, ::40] *= 20
    compare(x, operands(9, 20000, bits, 128, rank=4, block=32), 8)


@pytest.mark.parametrize("scale", [0.0, 1e-35, 1e-20, 1e20])
def test_activations_of_any_size(path: str, scale: float) -> None:
    x, site = torch.randn(2, 64, generator=generator()) * scale, operands(20, 64, 4, 32)
    expected, got = reference.cpu_site(x, *site, 8), cpu_site(x, *site, 8)
    assert_close(str(scale), expected, got, ROUNDED)


def test_the_definition_is_packed_site_but_for_the_rounding() -> None:
    x, site = heavy_tailed(9, 256), operands(48, 256, 3, 64, rank=4, block=64, permuted=True)
    exact = torch.ops.lopro.packed_site(x, *site)
    assert_close("float", exact, reference.cpu_site(x, *site, 0), 1e-6)
    perm, signs, block, skip, down, down_scale, *packed = site
    rotated = torch.ops.lopro.rotate(x, perm, signs, block, skip)
    # Runs of 64 columns, which is the weight's group, are multiples of a 127th of their largest entry.
    runs = rotated.view(9, 4, 64)
    step = runs.abs().amax(-1, keepdim=True) / 127
    rounded = (torch.round(runs / step) * step).view(9, 256)
    latent = torch.ops.lopro.project(rotated, down, down_scale)
    codes, scales, zeros, bias, up, up_scale, bits, group_size = packed
    expected = torch.ops.lopro.packed_linear(
        rounded, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size
    )
    assert_close("int8", expected, reference.cpu_site(x, *site, 8), ROUNDED)


def test_it_stays_one_node() -> None:
    site = operands(20, 96, 3, 32, block=32)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cpu_site(x, *site, 8)

    program = torch.export.export(Module(), (torch.randn(2, 96),)).run_decompositions()
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [cpu_site]


def test_wrong_operands_are_refused() -> None:
    x, site = torch.randn(2, 96), list(operands(20, 96, 3, 32))
    with pytest.raises(ValueError, match="float32"):
        cpu_site(x.double(), *site, 8)
    with pytest.raises(ValueError, match="act_bits"):
        cpu_site(x, *site, 5)
    with pytest.raises(ValueError, match="act_group"):
        cpu_site(x, *site, 8, 48)
    with pytest.raises(ValueError, match="group_size"):
        cpu_site(x, *site[:-1], 48, 8)
    if native.load():
        with pytest.raises(ValueError, match="codes"):
            cpu_site(torch.randn(2, 64), *site, 8)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("value", [-1, 96, 10_000, -32768])
def test_a_permutation_that_leaves_the_columns_is_refused(dtype: torch.dtype, value: int) -> None:
    x, site = torch.randn(2, 96), list(operands(20, 96, 3, 32))
    site[0] = torch.randperm(96).to(dtype)
    cpu_site(x, *site, 8)
    site[0][17] = value
    with pytest.raises((ValueError, IndexError), match=r"perm holds|out of range|out of bounds"):
        cpu_site(x, *site, 8)


def test_without_a_compiler_the_definition_runs(monkeypatch: pytest.MonkeyPatch, caplog, tmp_path) -> None:
    monkeypatch.setenv("LOPRO_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compiler", lambda: str(tmp_path / "none"))
    build._built.cache_clear()
    native._library.cache_clear()
    try:
        assert native.active_path() == "aten"
        assert "CXX" in caplog.text
        assert len(caplog.records) == 1
        native.load()
        assert len(caplog.records) == 1, "the warning is given once"
    finally:
        monkeypatch.undo()
        build._built.cache_clear()
        native._library.cache_clear()
