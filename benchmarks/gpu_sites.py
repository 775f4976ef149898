"""Random packed sites on the GPU, and the ways to compute with them that the GPU benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_timing import DEVICE, Contender, copies_for
from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.decode import device as decode
from lopro_fx.kernels.formats.affine.packed_int8.reference import packed_int8
from lopro_fx.kernels.formats.affine.packing.format import group_count, packed_words
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.formats.trellis.code import code_words

packed_linear = reference("affine", "linear")
trellis_reference = reference("trellis", "site")
packed_site = reference("affine", "site")

DTYPE = torch.bfloat16
GROUP, RANK, BLOCK = 128, 16, 256


class Site(NamedTuple):
    """Operands of `lopro::packed_site` after the activation."""

    perm: Tensor | None
    signs: Tensor | None
    block: int
    skip: int
    down: Tensor | None
    down_scale: Tensor | None
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    up: Tensor | None
    up_scale: Tensor | None
    bits: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self if isinstance(value, Tensor))

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.zeros


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=DEVICE)


def random_site(k: int, n: int, bits: int) -> Site:
    """A whole LoPRo site: permutation, signs, Hadamard blocks, codes, int8 factors."""

    def factor(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)

    def scale() -> Tensor:
        return (torch.rand(RANK, device=DEVICE) / 500 + 1e-3).half()

    groups = group_count(k, GROUP)
    return Site(
        torch.randperm(k, device=DEVICE).to(torch.int16),
        torch.randint(0, 256, (k // 8,), dtype=torch.uint8, device=DEVICE),
        BLOCK, 0, factor(RANK, k), scale(), random_words(n, packed_words(k, bits)),
        (torch.rand(n, groups, device=DEVICE) / 50 + 0.01).half(), random_words(packed_words(n * groups, bits)), None,
        factor(n, RANK), scale(), bits, GROUP,
    )  # fmt: skip


def random_sites(k: int, n: int, bits: int) -> list[Site]:
    """As many as have to be read in turn for each to be cold."""
    first = random_site(k, n, bits)
    return [first, *(random_site(k, n, bits) for _ in range(copies_for(first.codes.nbytes) - 1))]


def random_trellis(k: int, n: int, bits: int) -> list[tuple[Any, ...]]:
    """Operands of `lopro::trellis_site` after the activation, at the format's defaults; as many as have to be read."""
    columns, window, strip = 2 if bits == 2 else 1, 14, 512

    def operands() -> tuple[Any, ...]:
        site = random_site(k, n, bits)
        codes = random_words(code_words((n, k), bits * columns, columns, strip))
        scales = (torch.rand(n, device=DEVICE) / 50 + 0.01).half()
        return (*site[:6], scales, codes, None, site.up, site.up_scale, float(bits), columns, window, strip)

    return [operands() for _ in range(copies_for(k * n * bits // 8))]


def random_input(m: int, k: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(m, k, device=DEVICE).to(dtype)


def dense(x: Tensor, n: int, name: str = "bf16") -> Contender:
    """The baseline: a dense weight through the vendor's matmul."""
    k = x.shape[1]
    size = n * k * x.element_size()
    weights = [torch.randn(n, k, device=DEVICE, dtype=x.dtype) / k**0.5 for _ in range(copies_for(size))]
    calls = [lambda weight=weight: functional.linear(x, weight) for weight in weights]
    return Contender(name, calls, functional.linear(x.float(), weights[0].float()))


def whole_site(name: str, x: Tensor, sites: Sequence[Site], dense_tokens: int | None = None) -> Contender:
    """`lopro::packed_site`; `dense_tokens` stands in for the limit from which weights are written out in full."""
    limit = dispatch.DENSE_TOKENS if dense_tokens is None else dense_tokens

    def call(site: Site) -> Tensor:
        with mock.patch.object(dispatch, "DENSE_TOKENS", limit):
            return torch.ops.lopro.packed_site(x, *site)

    calls = [lambda site=site: call(site) for site in sites]
    return Contender(name, calls, packed_site(x.float(), *sites[0]))


def trellis_site(name: str, x: Tensor, sites: Sequence[tuple[Any, ...]]) -> Contender:
    """`lopro::trellis_site`, with rotation and low-rank branch."""
    calls = [lambda site=site: torch.ops.lopro.trellis_site(x, *site) for site in sites]
    return Contender(name, calls, trellis_reference(x.float(), *sites[0]))


def packed_matmul(name: str, x: Tensor, sites: Sequence[Site]) -> Contender:
    """`lopro::packed_linear` without rotation and low-rank branch: what other packed products compute."""
    calls = [lambda site=site: torch.ops.lopro.packed_linear(
        x, *site.weight, None, None, None, None, site.bits, site.group_size) for site in sites]  # fmt: skip
    first = sites[0]
    expected = packed_linear(x.float(), *first.weight, None, None, None, None, first.bits, first.group_size)
    return Contender(name, calls, expected)


def rounded_site(
    name: str, x: Tensor, sites: Sequence[Site], act_group: int, dense_tokens: int | None = None
) -> Contender:
    """`lopro::packed_int8` with rotation and activations of 8 bits, a step for `act_group` columns (-1: a token)."""
    limit = dispatch.DENSE_TOKENS if dense_tokens is None else dense_tokens

    def call(rotation: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        with mock.patch.object(dispatch, "DENSE_TOKENS", limit):
            return torch.ops.lopro.packed_int8(x, *rotation, *rest)

    first, *_ = operands = [(site[:4], (*site.weight, None, None, None, None, site.bits, site.group_size, 8, act_group))
                            for site in sites]  # fmt: skip
    calls = [lambda rotation=rotation, rest=rest: call(rotation, rest) for rotation, rest in operands]
    return Contender(name, calls, packed_int8(x.float(), *first[0], *first[1]))


def product_call(x: Tensor, site: Site, splits: int, product: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The second launch of a decode step alone, its activation prepared beforehand."""
    prepared = decode.decode_prepare(x, site.perm, site.signs, site.block, site.down, site.bits, site.group_size)
    return lambda: product(*prepared, *site.weight, None, site.down_scale, site.up, site.up_scale, site.bits,
                           site.group_size, splits, x.dtype)  # fmt: skip


def decode_only(name: str, x: Tensor, sites: Sequence[Site]) -> Contender:
    """`lopro::decode_product`, with the bytes that it has to move."""
    first = sites[0]
    words = decode.decode_prepare(x, first.perm, first.signs, first.block, first.down, first.bits, GROUP)[0]
    splits = decode.choose_splits(first.scales.shape[0], words.shape[-1], dispatch.processors(DEVICE))
    calls = [product_call(x, site, splits, decode.decode_product) for site in sites]
    assert first.up is not None
    moved = sum(tensor.nbytes for tensor in (*first.weight, first.up, words))
    facts = {"bytes": moved + first.scales.shape[0] * x.element_size(), "splits": splits}
    return Contender(name, calls, packed_site(x.float(), *first), facts=facts)


def int4pack(x: Tensor, n: int) -> Contender:
    """`aten::_weight_int4pack_mm`: scale * (code - 8) + zero, in groups of 128."""
    k = x.shape[1]
    packed, expected = [], None
    for _ in range(copies_for(n * k // 2)):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
        grid = torch.rand(k // GROUP, n, 2, device=DEVICE).div(50).add(0.01).to(torch.bfloat16)
        if expected is None:
            scale, zero = (part.float().T.repeat_interleave(GROUP, 1) for part in grid.unbind(-1))
            expected = functional.linear(x.float(), (codes.float() - 8) * scale + zero)
        nibbles = codes[:, ::2] << 4 | codes[:, 1::2]
        packed.append((torch.ops.aten._convert_weight_to_int4pack(nibbles, 8), grid))
    assert expected is not None
    calls = [lambda weight=weight, grid=grid: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, grid)
             for weight, grid in packed]  # fmt: skip
    return Contender("int4pack", calls, expected)


def has_gemlite() -> bool:
    return find_spec("gemlite") is not None


def gemlite(name: str, x: Tensor, n: int, bits: int) -> Contender:
    """GemLite's weight-only product: scale * (code - zero), in groups of 128."""
    from gemlite.helper import A16Wn

    k = x.shape[1]
    layers, expected = [], None
    for _ in range(copies_for(n * k * bits // 8)):
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(n, k // GROUP, device=DEVICE).div(50).add(0.01).to(x.dtype)
        zeros = torch.randint(0, 1 << bits, (n, k // GROUP), device=DEVICE).to(x.dtype)
        if expected is None:
            scale, zero = (part.float().repeat_interleave(GROUP, 1) for part in (scales, zeros))
            expected = functional.linear(x.float(), (codes.float() - zero) * scale)
        layers.append(A16Wn(device=str(x.device), dtype=x.dtype).from_weights(codes, scales, zeros, bits, GROUP))
    assert expected is not None
    return Contender(name, [lambda layer=layer: layer(x) for layer in layers], expected)
