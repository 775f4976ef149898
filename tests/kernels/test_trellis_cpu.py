"""`lopro::trellis_cpu`: every path of the compiled kernel against its definition in ATen, in programs and packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lopro_fx
from lopro_fx.kernels.activation.reference import GROUPS
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.formats.affine.packing.format import group_count, pack
from lopro_fx.kernels.formats.affine.rounded import affine
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.kernels.formats.trellis.cpu import reference
from lopro_fx.kernels.rotate.reference import pack_signs
from lopro_fx.layer import Layer
from lopro_fx.methods.base import Method, Solved
from lopro_fx.methods.registry import METHODS, register_method
from tests.helpers import TOLERANCE, assert_close, generator, heavy_tailed

trellis_cpu = torch.ops.lopro.trellis_cpu.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bits and columns of every code that the kernel reads.
CODES = ((2.0, 1), (3.0, 1), (4.0, 1), (1.5, 2), (2.0, 2), (2.5, 2))
# One activation in some thousands lies so close to the middle of two integers that the order of a sum decides.
ROUNDED = 2e-3
# By bits of an activation: a number on the edge of two steps may take either.
SPREAD = {0: 3e-6, 4: 2e-2, 8: ROUNDED}
RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(x) for x in torch.load(sys.argv[2], weights_only=True)], sys.argv[3])
assert "lopro_fx" not in sys.modules
"""


@dataclass(frozen=True, kw_only=True)
class RandomCodes(Method):
    """Random weights: of Linears named in `plain` in the format "affine", of the others in "trellis"."""

    name = "random_codes"
    plain: str = ""

    def solve(self, unit, seen, context) -> Solved:
        layers = [Layer(n, unit.name, self._packed(n, w)) for n, w in zip(unit.names, unit.weights, strict=True)]
        return Solved(unit.input(), tuple(layers))

    def _packed(self, name: str, weight: Tensor) -> Packed:
        out, width = weight.shape
        if name in self.plain.split():
            groups, rng = group_count(width, 32), generator(3)
            codes = pack(torch.randint(0, 8, (out, width), generator=rng), 3)
            zeros = pack(torch.full((out * groups,), 3), 3)
            return affine(codes, torch.ones(out, groups).half() / 32, zeros, 3, 32, width)
        site = operands(out, width, 3.0, 1)
        spec = {"bits": 3.0, "columns": 1, "window": 14, "strip": 64}
        return Packed("trellis", (out, width), spec, {"scales": site[6], "codes": site[7]})


# Test modules are imported anew by each that asks for them.
if RandomCodes.name not in METHODS:
    register_method(RandomCodes)


def operands(
    out: int, width: int, bits: float, columns: int, *, window: int = 14, strip: int = 64, rank: int = 0,
    parts: int = 0, block: int = 1, skip: int = 0, permuted: bool = False, biased: bool = False, factor_bits: int = 8,
) -> tuple[Any, ...]:  # fmt: skip
    """Operands after the activation, without `act_bits`; every bit of the codes is random."""
    rng, word = generator(11), torch.iinfo(torch.int32)
    words = code_words((out, width), round(bits * columns), columns, strip)
    codes = torch.randint(word.min, word.max, (words,), generator=rng, dtype=torch.int32)
    scales = (torch.rand(out, generator=rng) / 8).half()
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
    return (perm, signs, block, skip, down, down_scale, scales, codes, bias, up, up_scale, bits, columns, window, strip)


@pytest.fixture(params=native.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path of the kernel that this processor has."""
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    with native.forced(request.param) as found:
        if not found:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


def compare(x: Tensor, site: tuple[Any, ...], act_bits: int, act_group: int = 0) -> None:
    expected, got = reference.trellis_cpu(x, *site, act_bits, act_group), trellis_cpu(x, *site, act_bits, act_group)
    assert got.dtype == x.dtype
    assert_close(f"{tuple(x.shape)}", expected, got, max(SPREAD[act_bits], 2 * TOLERANCE[x.dtype]))


@pytest.mark.parametrize("window", [12, 14, 16])
@pytest.mark.parametrize(("bits", "columns"), CODES)
@pytest.mark.parametrize("act_bits", [0, 8])
def test_paths_equal_the_definition(path: str, act_bits: int, bits: float, columns: int, window: int) -> None:
    # One row and one column, odd columns, several strips, a last one of any length, rows of several units.
    for out, width, strip, block in (
        (1, 1, 64, 1), (35, 33, -1, 1), (150, 97, 64, 1), (224, 384, 96, 128), (700, 130, 512, 2), (1200, 40, -1, 8),
    ):  # fmt: skip
        site = operands(out, width, bits, columns, window=window, strip=strip, block=block)
        for tokens in (1, 3, 40):
            compare(heavy_tailed(tokens, width), site, act_bits)


@pytest.mark.parametrize("act_group", GROUPS)
def test_groups_of_activations(path: str, act_group: int) -> None:
    for width, block, (bits, columns) in ((96, 1, (3.0, 1)), (1000, 8, (1.5, 2)), (1536, 512, (2.0, 1))):
        site = operands(70, width, bits, columns, block=block, rank=3)
        for tokens, act_bits in ((1, 8), (3, 4), (17, 8), (17, 4)):
            compare(heavy_tailed(tokens, width), site, act_bits, act_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_every_operand(path: str, dtype: torch.dtype, tokens: int) -> None:
    x = heavy_tailed(tokens, 576).to(dtype)
    for options in ({"parts": 5}, {"parts": 2}, {"parts": 0}, {"factor_bits": 16}):
        site = operands(150, 576, 3.0, 1, rank=19, block=64, skip=64, permuted=True, biased=True, **options)
        for act_bits in (0, 4, 8):
            compare(x, site, act_bits)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    bits, columns = data.draw(st.sampled_from(CODES), "bits and columns")
    block = 1 << data.draw(st.integers(0, 7), "log2 of the block")
    skip = data.draw(st.integers(0, 40), "skip") if block > 1 else 0
    width = skip + block * data.draw(st.integers(1, max(1, 300 // block)), "blocks")
    tokens, out = data.draw(st.integers(0, 20), "tokens"), data.draw(st.integers(1, 200), "rows")
    site = operands(
        out, width, bits, columns, window=data.draw(st.integers(12, 16), "window"),
        strip=data.draw(st.sampled_from([-1, 32, 64, 96]), "strip"), rank=data.draw(st.integers(0, 20), "rank"),
        block=block, skip=skip, permuted=data.draw(st.booleans(), "permuted"),
        biased=data.draw(st.booleans(), "biased"),
    )  # fmt: skip
    with native.forced(data.draw(st.sampled_from(native.PATHS), "path")):
        compare(torch.randn(tokens, width, generator=generator()), site, 0)


@pytest.mark.parametrize(("bits", "columns"), CODES)
def test_rounded_products_are_exact(path: str, bits: float, columns: int) -> None:
    """Activations that are integers, and scales that are powers of two: fp32 holds every number without error."""
    site = list(operands(100, 128, bits, columns, block=1))
    site[6] = torch.full((100,), 0.5).half()
    x = torch.randint(-126, 127, (20, 128), generator=generator()).float()
    x[:, ::32] = 127
    for tokens in (1, 5, 20):
        got = trellis_cpu(x[:tokens], *site, 8)
        assert torch.equal(got, reference.trellis_cpu(x[:tokens], *site, 0))


@pytest.mark.parametrize(("tokens", "out"), [(1, 300), (1, 1100), (5, 300), (30, 300)])
def test_threads_agree(path: str, tokens: int, out: int) -> None:
    x, site = heavy_tailed(tokens, 512), operands(out, 512, 2.0, 2, strip=128, rank=4, block=64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(trellis_cpu(x, *site, 8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_output_is_written_in_full(path: str, poisoned_memory: None) -> None:
    for tokens in (1, 6, 20):
        assert torch.isfinite(trellis_cpu(torch.ones(tokens, 96), *operands(37, 96, 3.0, 1), 8)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_what_is_not_finite_shows_where_it_belongs(path: str, tokens: int, value: float) -> None:
    site, x = operands(45, 96, 3.0, 1), torch.ones(tokens, 96)
    x[0, 5] = value
    y = trellis_cpu(x, *site, 8)
    assert not torch.isfinite(y[0]).any()
    assert torch.isfinite(y[1:]).all()
    site[6][9] = value
    finite = torch.isfinite(trellis_cpu(heavy_tailed(tokens, 96), *site, 8))
    assert not finite[:, 9].any()
    assert finite.sum() == tokens * 44


def test_wide_scales_and_strided_activations(path: str) -> None:
    site = list(operands(70, 64, 2.5, 2, block=32))
    site[6] = site[6].float() * 1e5
    wide = torch.randn(4, 6, 128, generator=generator())
    for x in (wide[..., :64].transpose(0, 1), wide[..., ::2], wide[:, :1, 64:].expand(4, 3, 64), wide[:, 1:1, :64]):
        compare(x, tuple(site), 0)


def test_wrong_operands_are_refused() -> None:
    x, site = torch.randn(2, 96), operands(20, 96, 3.0, 1)
    with pytest.raises(ValueError, match="float32"):
        trellis_cpu(x.double(), *site, 8)
    with pytest.raises(ValueError, match="act_bits"):
        trellis_cpu(x, *site, 5)
    if native.load():
        with pytest.raises(ValueError, match="codes"):
            trellis_cpu(torch.randn(2, 64), *site, 8)
        with pytest.raises(ValueError, match="window"):
            trellis_cpu(x, *site[:-2], 17, 64, 8)
        with pytest.raises(ValueError, match="bits"):
            trellis_cpu(x, *site[:-4], 5.0, 1, 14, 64, 8)


@pytest.mark.parametrize("plain", ["", "0"])
def test_programs_and_packages(tmp_path, plain: str) -> None:
    """Alone, and beside Linears in the format "affine", whose kernel the package holds too."""
    if not native.load():
        pytest.skip("no C++ compiler built the kernel")
    module = torch.nn.Sequential(torch.nn.Linear(96, 200), torch.nn.ReLU(), torch.nn.Linear(200, 72))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, (heavy_tailed(7, 96),), dynamic_shapes={"input": {0: batch}})
    quantized = lopro_fx.quantize(program, [heavy_tailed(64, 96)], RandomCodes(plain=plain))
    exact = lopro_fx.optimize(quantized, target="cpu", activations="float")
    rounded = lopro_fx.optimize(quantized, target="cpu")
    found = [node.target for node in rounded.graph.nodes if "lopro" in str(node.target)]
    assert found == [torch.ops.lopro.cpu_site.default if plain else trellis_cpu, trellis_cpu]
    inputs = [heavy_tailed(count, 96) for count in (1, 3, 40)]
    with torch.no_grad():
        want = [rounded.module()(x) for x in inputs]
        for x, got in zip(inputs, want, strict=True):
            assert_close("float", quantized.module()(x), exact.module()(x), 3e-6)
            assert_close("int8", quantized.module()(x), got, 3e-2)
    if not plain:  # what it would show, the package of both formats shows too
        return
    lopro_fx.export_aoti(rounded, tmp_path / "model.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    for expected, got in zip(want, torch.load(tmp_path / "outputs.pt", weights_only=True), strict=True):
        assert_close("package", expected, got, ROUNDED)
