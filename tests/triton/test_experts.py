"""Experts by Triton against the definition: gemv of few pairs, gemm of many, and low-rank branches in a grid."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.language.semantic import TritonSemantic

import lopro_fx  # noqa: F401  registers the operators
from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.decode.device import decode_prepare
from lopro_fx.kernels.formats.affine.experts.device import product as affine_product
from lopro_fx.kernels.formats.affine.packing.format import group_count, pack
from lopro_fx.kernels.formats.registry import known_format, operator_of, reference
from lopro_fx.kernels.formats.trellis.code import code_words
from lopro_fx.kernels.formats.trellis.decode.device import prepare
from lopro_fx.kernels.formats.trellis.experts.device import product as trellis_product
from lopro_fx.kernels.routed.choice import DECODE_PAIRS, choose_tile, refuses
from lopro_fx.kernels.routed.device import most_tiles, own_latents, sorted_pairs
from tests.helpers import TOLERANCE, assert_close, generator
from tests.triton.conftest import INTERPRETED
from tests.triton.test_kernels import DECODE_TOLERANCE

Operands = dict[str, Any]
EXPERTS, RANK = 5, 3
Case = tuple[str, Operands, int, int]
# Format, spec, columns and rows.
AFFINE: list[Case] = [
    ("affine", {"bits": bits, "group_size": size}, k, n)
    for bits, size, k, n in ((2, 64, 192, 40), (3, 32, 99, 33), (4, 128, 256, 70), (8, -1, 40, 17), (3, -1, 130, 20),
                             (4, 64, 64, 66), (2, 128, 140, 5), (8, 32, 70, 9))
]  # fmt: skip
TRELLIS: list[Case] = [
    ("trellis", {"bits": bits, "columns": columns, "window": window, "strip": strip}, k, n)
    for bits, columns, window, strip, k, n in ((1.5, 2, 16, -1, 31, 40), (2.0, 1, 12, 32, 20, 100),
                                               (2.5, 2, 14, 32, 36, 66), (3.0, 1, 14, -1, 9, 33),
                                               (4.0, 1, 16, 512, 32, 64), (2.0, 2, 14, 512, 35, 20))
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _integers_wrap_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products mod 2^32 are meant, and the interpreter's checks for overflow take half of its time."""
    if INTERPRETED:
        monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *args, **kwargs: None)


def weights(format: str, spec: Operands, n: int, k: int, experts: int = EXPERTS) -> Operands:
    """Packed weights of experts, random in every bit, and their spec."""
    rng = generator(1)
    if format == "trellis":
        words = code_words((n, k), round(spec["bits"] * spec["columns"]), spec["columns"], spec["strip"])
        codes = torch.randint(-(2**31), 2**31, (experts, words), generator=rng, dtype=torch.int32)
        return {"scales": (torch.rand(experts, n, generator=rng) / 16 + 0.01).half(), "codes": codes, **spec}
    groups, bits = group_count(k, spec["group_size"]), spec["bits"]
    return {
        "codes": pack(torch.randint(0, 1 << bits, (experts, n, k), generator=rng), bits),
        "scales": (torch.rand(experts, n, groups, generator=rng) / (1 << bits) + 0.01).half(),
        "zeros": pack(torch.randint(0, 1 << bits, (experts, n * groups), generator=rng), bits),
        **spec,
    }


def branches(
    tokens: int, n: int, dtype: torch.dtype, *, rank: int = RANK, cells: bool = True, core: bool = True,
    factor_bits: int = 8,
) -> Operands:  # fmt: skip
    """Branches of experts in a grid of two rows and three columns, some of them shared, or each of its own."""
    rng, (rows, columns) = generator(2), (2, 3) if cells else (EXPERTS, EXPERTS)
    named: Operands = {"latent": torch.randn(tokens, rows * rank, generator=rng).to(dtype), "up_scale": None}
    if factor_bits == 8:
        named["up"] = torch.randint(-127, 128, (columns, n, rank), generator=rng, dtype=torch.int8)
        named["up_scale"] = (torch.rand(columns, rank, generator=rng) / 50).half()
    else:
        named["up"] = torch.randn(columns, n, rank, generator=rng).half()
    places = torch.tensor([[0, 0], [1, 2], [0, 1], [1, 2], [0, 2]], dtype=torch.int32)
    named["cells"] = places if cells else None
    named["core"] = torch.randn(EXPERTS, rank, rank, generator=rng).half() if core else None
    return named


NO_BRANCH: Operands = dict.fromkeys(("latent", "up", "up_scale", "cells", "core"))


def tokens_of(count: int, k: int, dtype: torch.dtype) -> Tensor:
    """A few columns are outliers."""
    x = torch.randn(count, k, generator=generator(3))
    x[:, :2] *= 30
    return x.to(dtype)


def route(tokens: int, slots: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """No token for expert 1, and most for expert 3."""
    skewed = torch.tensor([0, 2, 3, 3, 3, 3, 4])
    return skewed[torch.randint(len(skewed), (tokens * slots,), generator=generator(4))].to(dtype)


def compare(device: torch.device, format: str, x: Tensor, ids: Tensor, slots: int, named: Operands) -> None:
    """The operator against its definition in fp32, which the gemv comes closest to."""
    wide = {key: value.float() if key == "latent" and value is not None else value for key, value in named.items()}
    expected = reference(format, "experts")(x=x.float(), ids=ids, slots=slots, **wide)
    got = run(device, format, x, ids, slots, named)
    assert got.dtype == x.dtype
    few = len(ids) <= DECODE_PAIRS
    assert_close(format, expected, got, DECODE_TOLERANCE[x.dtype] if few else 2 * TOLERANCE[x.dtype])


def compare_site(
    device: torch.device, format: str, x: Tensor, ids: Tensor, slots: int, named: Operands, around: Operands
) -> None:
    """ "experts_site" against its definition in fp32."""
    named = {key: value for key, value in named.items() if key != "latent"}
    wide = {key: value.float() if key == "gate" and value is not None else value for key, value in around.items()}
    expected = reference(format, "experts_site")(x=x.float(), ids=ids, slots=slots, **named, **wide)
    got = run(device, format, x, ids, slots, {**named, **around}, "experts_site")
    few = len(ids) <= DECODE_PAIRS
    assert_close(format, expected, got, DECODE_TOLERANCE[x.dtype] if few else 2 * TOLERANCE[x.dtype])


def run(device: torch.device, format: str, x: Tensor, ids: Tensor, slots: int, named: Operands,
    kind: str = "experts") -> Tensor:  # fmt: skip
    there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in named.items()}
    with dispatch.triton_on_cpu() if INTERPRETED else contextlib.nullcontext():
        return operator_of(format, kind)(x=x.to(device), ids=ids.to(device), slots=slots, **there).cpu()


@pytest.mark.parametrize(("tokens", "slots"), [(1, 2), (33, 1)])
@pytest.mark.parametrize("index", range(len(AFFINE + TRELLIS)))
def test_every_spec(device: torch.device, index: int, tokens: int, slots: int) -> None:
    format, spec, k, n = (AFFINE + TRELLIS)[index]
    # The interpreter multiplies no bf16, but the gemv multiplies integers.
    dtype = (torch.float32, torch.bfloat16 if tokens == 1 else torch.float16)[index % 2]
    x, named = tokens_of(tokens, k, dtype), weights(format, spec, n, k)
    compare(device, format, x, route(tokens, slots), slots, {**named, **branches(tokens, n, dtype)})


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
@pytest.mark.parametrize(("format", "spec", "k", "n"), [AFFINE[1], TRELLIS[3]])
def test_every_number_of_pairs(
    device: torch.device, format: str, spec: Operands, k: int, n: int, tokens: int, slots: int
) -> None:
    x, named = tokens_of(tokens, k, torch.float32), {**weights(format, spec, n, k), **NO_BRANCH}
    compare(device, format, x, route(tokens, slots, torch.int32), slots, named)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(
    ("case", "cells", "core", "factor_bits", "rank"),
    [(AFFINE[5], False, False, 8, 1), (AFFINE[5], False, True, 16, 4), (AFFINE[5], True, False, 16, 5),
     (AFFINE[5], True, True, 8, 19), (AFFINE[5], True, True, 16, 40), (TRELLIS[3], False, False, 16, 4),
     (TRELLIS[3], True, True, 8, 19)],
)  # fmt: skip
def test_branches(
    device: torch.device, case: Case, cells: bool, core: bool, factor_bits: int, rank: int, tokens: int
) -> None:
    format, spec, k, n = case
    named = branches(tokens, n, torch.float32, cells=cells, core=core, factor_bits=factor_bits, rank=rank)
    x = tokens_of(tokens, k, torch.float32) / 10
    compare(device, format, x, route(tokens, 2), 2, {**weights(format, spec, n, k), **named})


@pytest.mark.parametrize(("tokens", "slots"), [(1, 3), (5, 1), (3, 2), (17, 2), (0, 2)])
@pytest.mark.parametrize(
    ("case", "cells", "core", "factor_bits", "gated", "permuted", "skip"),
    [(AFFINE[5], True, True, 8, True, True, 0), (AFFINE[1], False, False, 16, False, True, 0),
     (AFFINE[5], False, True, 8, True, False, 0), (AFFINE[5], True, True, 8, True, True, 32),
     (TRELLIS[0], True, True, 8, True, True, 0), (AFFINE[5], None, None, 8, True, True, 0)],
)  # fmt: skip
def test_sites(
    device: torch.device, case: Case, cells: bool | None, core: bool | None, factor_bits: int, gated: bool,
    permuted: bool, skip: int, tokens: int, slots: int,
) -> None:  # fmt: skip
    """Gate, rotation and projection inside; no branch where `cells` is None."""
    format, spec, _, n = case
    k, rng = 96, generator(5)
    named = {**weights(format, spec, n, k), **NO_BRANCH}
    around: Operands = {"down": None, "down_scale": None, "perm": None, "skip": skip, "block": 32, "activation": ""}
    around |= {"signs": torch.randint(0, 256, (k // 8,), generator=rng, dtype=torch.uint8), "gate": None}
    if cells is not None:
        named |= branches(tokens, n, torch.float32, cells=cells, core=bool(core), factor_bits=factor_bits)
        rows = named["latent"].shape[1]
        down = torch.randint(-127, 128, (rows, k), generator=rng, dtype=torch.int8)
        around["down"], around["down_scale"] = down, (torch.rand(rows, generator=rng) / 500).half()
        if factor_bits == 16:
            around["down"], around["down_scale"] = torch.randn(rows, k, generator=rng).half() / 9, None
    if permuted:
        around["perm"] = torch.randperm(k, generator=rng).to(torch.int16)
    x = tokens_of(tokens, 2 * k, torch.float32)[:, :k] / 10
    if gated:
        # Both halves of one product, which a gate and what it multiplies are.
        around |= {"gate": torch.randn(tokens, 2 * k, generator=rng)[:, k:], "activation": "silu"}
    compare_site(device, format, x, route(tokens, slots), slots, named, around)


@pytest.mark.parametrize(("format", "spec", "k", "n"), [AFFINE[5], TRELLIS[3]])
def test_larger_tiles(device: torch.device, format: str, spec: Operands, k: int, n: int) -> None:
    """More pairs of an expert than a tile takes, and more experts than have pairs."""
    for count, dtype in ((17 * EXPERTS, torch.float32), (65 * EXPERTS, torch.float16)):
        x, ids = tokens_of(count, k, dtype), torch.where(torch.arange(count) % 7 == 0, 4, 2)
        compare(device, format, x, ids, 1, {**weights(format, spec, n, k), **branches(count, n, dtype)})


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize(("format", "spec", "k", "n"), [AFFINE[1], TRELLIS[3]])
def test_ids_of_no_expert_leave_nan(
    device: torch.device, format: str, spec: Operands, k: int, n: int, tokens: int
) -> None:
    """The others' rows are right. Without a synchronisation, nothing can be raised."""
    x, ids = tokens_of(tokens, k, torch.float32), route(tokens, 1)
    named = {**weights(format, spec, n, k), **branches(tokens, n, torch.float32)}
    expected = reference(format, "experts")(x=x, ids=ids, slots=1, **named)
    ids[1], ids[2] = -1, EXPERTS
    got = run(device, format, x, ids, 1, named)
    assert got[1:3].isnan().all()
    known = [0, *range(3, tokens)]
    assert_close(format, expected[known], got[known], 5e-4)


@pytest.mark.parametrize("format", ["affine", "trellis"])
def test_parts_of_the_columns(device: torch.device, format: str) -> None:
    """They are summed up; the row of no expert is NaN."""
    ids, k = torch.tensor([3, 9], device=device), 520 if format == "affine" else 130
    x = tokens_of(1, k, torch.float32)
    if format == "affine":
        named = weights(format, {"bits": 8, "group_size": 32}, 3, k)
        words, steps, _ = decode_prepare(x.to(device), None, None, 1, None, 8, 32)
        packed = (named[key].to(device) for key in ("codes", "scales", "zeros"))
        got = affine_product(words, steps, None, ids, 2, *packed, *[None] * 5, 8, 32, 2, torch.float32)
    else:
        named = weights(format, {"bits": 2.0, "columns": 2, "window": 12, "strip": -1}, 3, k)
        words, steps, _ = prepare(x.to(device), None, None, 1, None)
        packed = (named[key].to(device) for key in ("scales", "codes"))
        spec = (4, 2, 12, -1, k, 2, torch.float32)
        got = trellis_product(words, steps, None, ids, 2, *packed, *[None] * 5, *spec)
    expected = reference(format, "experts")(x=x, ids=ids[:1].cpu(), slots=1, **named, **NO_BRANCH)
    assert_close(format, expected, got[:1].cpu(), 5e-4)
    assert got[1].isnan().all()


def test_scales_in_fp32(device: torch.device) -> None:
    for format, spec, k, n in (AFFINE[2], TRELLIS[3]):
        for tokens in (1, 33):
            named = {**weights(format, spec, n, k), **branches(tokens, n, torch.float32)}
            named |= {name: named[name].float() * 2.0**-90 for name in ("scales", "up_scale")}
            compare(device, format, tokens_of(tokens, k, torch.float32), route(tokens, 1), 1, named)


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_own_latents(device: torch.device, cells: bool, core: bool) -> None:
    named, ids = branches(4, 1, torch.float16, rank=40, cells=cells, core=core), route(4, 2)
    latent, places, matrix = named["latent"], named["cells"], named["core"]
    rows = ids if places is None else places[ids, 0]
    expected = latent.float().view(4, -1, 40)[torch.arange(8) // 2, rows.long()]
    if matrix is not None:
        expected = torch.einsum("por,pr->po", matrix[ids].float(), expected)
    there = (None if value is None else value.to(device) for value in (places, matrix))
    got = own_latents(latent.to(device), ids.to(device), 2, 40, EXPERTS, *there)
    assert_close("own", expected.unsqueeze(0), got.cpu(), 1e-6)


def test_sorted_pairs(device: torch.device) -> None:
    for dtype in (torch.int32, torch.int64):
        order, starts = sorted_pairs(torch.tensor([3, -1, 0, 3, 7, 1], dtype=dtype, device=device), 4)
        assert starts.dtype == torch.int32
        assert starts.tolist() == [0, 1, 2, 2, 4]
        places = order.tolist()
        assert places[:2] == [2, 5]
        assert sorted(places[2:4]) == [0, 3]
        assert sorted(places[4:]) == [1, 4]


def test_tiles_are_enough() -> None:
    for pairs in range(1, 40):
        for used in range(1, min(pairs, 6) + 1):
            # One of the `used` experts, ids of none included, has all that the others leave.
            counts = [1] * (used - 1) + [pairs - used + 1]
            tiles = sum(-(-count // 4) for count in counts)
            assert tiles <= most_tiles(pairs, max(used - 1, 1), 4)
    assert [choose_tile(pairs, 8, (9, 0)) for pairs in (33, 128, 129, 512, 513)] == [16, 16, 64, 64, 0]
    assert choose_tile(513, 8, (8, 0)) == 64


def test_what_triton_refuses() -> None:
    named = {"x": torch.ones(2, 4), "ids": torch.zeros(2, dtype=torch.int64), "scales": torch.ones(3, 4)}
    assert "device" in (refuses(named) or "")
    with dispatch.triton_on_cpu():
        assert refuses(named) is None
        assert "dtype" in (refuses({**named, "x": torch.ones(2, 4, dtype=torch.float64)}) or "")
        many = torch.empty(1 << 21, device="meta")
        assert "tiles" in (refuses({**named, "ids": many}) or "")
    for format in ("affine", "trellis"):
        assert [kernel.refuses for kernel in known_format(format).kernels() if kernel.operator == "experts"] == [
            refuses
        ]


def test_shapes_that_do_not_fit(device: torch.device) -> None:
    format, spec, k, n = AFFINE[0]
    with pytest.raises(ValueError, match="2 slots"):
        run(
            device, format, tokens_of(3, k, torch.float32), route(3, 1), 2, {**weights(format, spec, n, k), **NO_BRANCH}
        )


_AHEAD = """
from benchmarks.ahead import compile_launch
from benchmarks.launches import expert_launches
for capability, bits, columns, tile in ((80, 4, 1, "64"), (90, 3, 2, "many"), (100, 2, 1, "16")):
    for format, spec in (("affine", {"bits": bits, "group_size": 64}),
                         ("trellis", {"bits": 2.0, "columns": columns, "window": 14, "strip": 512})):
        found = dict(expert_launches(format, spec, capability))
        parts = ("decode, prepare", "decode, product", f"matmul, {tile} pairs")
        names = [f"experts, {format}, {part}" for part in parts]
        for name in names if bits != 4 else ["experts, latents", *names]:
            resources = compile_launch(found[name], capability)
            assert resources.spill_bytes == 0, (name, resources)
            assert resources.shared_bytes <= 160 * 1024, (name, resources)
"""


def test_no_kernel_spills() -> None:
    """Each takes seconds to compile; `benchmarks/kernel_resources.py` has all of them for every GPU."""
    # A process of its own: the interpreter's functions can't be compiled.
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _AHEAD], cwd=Path(__file__).parents[2], env=variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
