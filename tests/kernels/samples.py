"""Small arguments of every operator of the `lopro` namespace, those that launch Triton kernels included.

Sizes of weights are static: they are compile-time constants of the kernels, and programs never free them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import lopro_fx.kernels
from lopro_fx.kernels.formats.affine.packing.format import dequantize, group_count, pack
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.trellis.code import code_words
from tests.guests import packed_signs
from tests.helpers import generator
from tests.triton.problems import Problem, problem, trellis_weight

Samples = dict[str, tuple[Any, ...]]
WIDTH, OUT, GROUP = 96, 20, 32
_CORES = "a branch with cores"


def device_modules() -> list[ModuleType]:
    """Modules that launch Triton kernels; importing them registers their operators."""
    if find_spec("triton") is None:
        return []
    package = lopro_fx.kernels
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(module.name) for module in found if module.name.endswith(".device")]


def operators() -> list[str]:
    """Names of every operator that is defined, without the namespace."""
    device_modules()
    names = [name.removeprefix("lopro::") for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("lopro::") and torch._C._dispatch_find_schema_or_throw(name, "")]  # fmt: skip
    return sorted(set(names))


def launches_triton(name: str) -> bool:
    """Whether an operator was registered by `torch.library.triton_op`."""
    from torch._library.custom_ops import OPDEFS

    return f"lopro::{name}" in OPDEFS


def _site(tokens: int = 3, bits: int = 3, wide: bool = False, **options: Any) -> Problem:
    """A packed site whose scales are fp16, or fp32 where `wide`."""
    made = problem(tokens, WIDTH, OUT, bits, GROUP, **options)
    if wide:
        made = replace(made, scales=made.scales.float(), down_scale=_float(made.down_scale),
                       up_scale=_float(made.up_scale))  # fmt: skip
    return made


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()


_WHOLE = {"rank": 4, "block": 32, "permuted": True, "biased": True}
# What a label doesn't name is there. Each check traces the operator several times, so there is no sample of each pair.
_SITES: dict[str, Problem] = {
    "fp32 scales": _site(wide=True, **_WHOLE),
    "bare": _site(),
    "fp16 factors, no signs": _site(factor_bits=16, signed=False, dtype=torch.float16, **_WHOLE),
    "no branch, columns left alone": _site(block=32, skip=32, permuted=True, biased=True, dtype=torch.bfloat16),
}


def _activation(p: Problem) -> Tensor:
    """Two rows of three tokens, for the autograd of the operator."""
    return torch.stack([p.x, p.x + 1]).requires_grad_()


def _rotate() -> Samples:
    return {name: (_activation(p), p.perm, p.signs, p.block, p.skip) for name, p in _SITES.items()}


def _round_activation() -> Samples:
    return {f"{bits} bits, {p.x.dtype}": (_activation(p).detach(), bits, group)
            for p, bits, group in zip(_SITES.values(), (8, 8, 4, 4), (-1, 32, 64, 32), strict=True)}  # fmt: skip


def _project() -> Samples:
    return {name: (_activation(p), p.down, p.down_scale) for name, p in _SITES.items() if p.down is not None}


def _packed_linear() -> Samples:
    samples: Samples = {}
    for name, p in _SITES.items():
        latent = None if p.up is None else torch.randn(2, 3, 4, generator=generator()).to(p.x.dtype)
        branch = (latent, p.up, p.up_scale)
        samples[name] = (_activation(p), p.codes, p.scales, p.zeros, p.bias, *branch, p.bits, p.group_size)
    return samples


def _packed_site() -> Samples:
    samples: Samples = {name: (_activation(p), *p.args()[1:]) for name, p in _SITES.items()}
    p, norm = _site(parts=2, **_WHOLE), torch.randn(WIDTH, generator=generator())
    x, gate, residual = _activation(p), torch.ones(2, 3, WIDTH), torch.ones(2, 3, OUT)
    samples["merged, norm, residual"] = (x, *p.args()[1:], norm, 1e-5, None, "", residual)
    samples["merged, gate"] = (x, *p.args()[1:], None, 0.0, gate, "silu", None)
    return samples


def _packed_int8() -> Samples:
    samples: Samples = {}
    for name, p in _SITES.items():
        latent = None if p.up is None else torch.randn(2, 3, 4, generator=generator()).to(p.x.dtype)
        rest = (p.codes, p.scales, p.zeros, p.bias, latent, p.up, p.up_scale, p.bits, p.group_size)
        act_bits, act_group = (4, 64) if p.up is None else (8, -1)
        samples[name] = (_activation(p), p.perm, p.signs, p.block, p.skip, *rest, act_bits, act_group)
    return samples


def _packed_embedding() -> Samples:
    samples: Samples = {}
    for bits, group_size, scale in ((4, 32, torch.float32), (3, -1, torch.float16)):
        rng, groups = generator(), group_count(72, group_size)
        codes = pack(torch.randint(0, 1 << bits, (37, 72), generator=rng), bits)
        zeros = pack(torch.randint(0, 1 << bits, (37 * groups,), generator=rng), bits)
        scales = torch.randn(37, groups, generator=rng).to(scale)
        ids = torch.randint(0, 37, (2, 5), generator=rng)
        samples[f"{bits} bits, {scale}"] = (ids, codes, scales, zeros, bits, group_size, 72, torch.bfloat16)
    return samples


def _guests() -> dict[str, Callable[[], Samples]]:
    """Samples of the operators that follow from a format, of each that a newcomer registers."""
    weight = torch.randn(OUT, WIDTH, generator=generator())
    made = packed_signs(weight), Packed("exact", (OUT, WIDTH), {}, {"values": weight})
    return {f"{packed.format}_{kind}": functools.partial(samples, tuple(packed.tensors.values()))
            for packed in made
            for kind, samples in (("linear", _linear), ("site", _site_of), ("experts", _experts),
                                  ("experts_loop", _experts), ("experts_site", _experts_site),
                                  ("embedding", _embedding))}  # fmt: skip


def _linear(weight: tuple[Tensor, ...]) -> Samples:
    samples: Samples = {}
    for name, p in _SITES.items():
        latent = None if p.up is None else torch.randn(2, 3, 4, generator=generator()).to(p.x.dtype)
        samples[name] = (_activation(p), *weight, p.bias, latent, p.up, p.up_scale)
    return samples


def _site_of(weight: tuple[Tensor, ...]) -> Samples:
    samples: Samples = {}
    for name, p in _SITES.items():
        rest = (p.perm, p.signs, p.block, p.skip, p.down, p.down_scale, *weight, p.bias, p.up, p.up_scale)
        samples[name] = (_activation(p), *rest)
    norm, residual = torch.randn(WIDTH, generator=generator()), torch.ones(2, 3, OUT)
    whole = samples["fp32 scales"]
    samples["norm, residual"] = (*whole, norm, 1e-5, None, "", residual)
    samples["gate"] = (*whole, None, 0.0, torch.ones(2, 3, WIDTH), "silu", None)
    return samples


def _experts(weight: tuple[Tensor, ...], spec: tuple[Any, ...] = ()) -> Samples:
    """Three experts of one weight: bare, and with a branch in a grid of two rows and two columns."""
    rng, stacks = generator(), tuple(torch.stack([tensor] * 3) for tensor in weight)
    x, ids = torch.randn(4, WIDTH, generator=rng), torch.tensor([2, 0, 0, 2, 2, 2, 0, 0])
    latent, scale = torch.randn(4, 2 * 4, generator=rng), torch.ones(2, 4, dtype=torch.float16)
    up, core = torch.ones(2, OUT, 4, dtype=torch.int8), torch.ones(3, 4, 4, dtype=torch.float16)
    cells = torch.tensor([[0, 0], [1, 0], [1, 1]], dtype=torch.int32)
    return {
        "bare": (x.to(torch.bfloat16), ids.to(torch.int32), 2, *stacks, None, None, None, None, None, *spec),
        _CORES: (x, ids, 2, *stacks, latent, up, scale, cells, core, *spec),
    }


def _experts_site(weight: tuple[Tensor, ...], spec: tuple[Any, ...] = ()) -> Samples:
    samples, site = {}, _SITES["fp32 scales"]
    for name, (x, ids, slots, *rest) in _experts(weight, spec).items():
        stacks, (_, *branch) = rest[: len(weight)], rest[len(weight) : len(rest) - len(spec)]
        down = None if branch[0] is None else torch.ones(8, WIDTH, dtype=torch.int8)
        factor = (down, None if down is None else down[:, 0].to(torch.float16))
        samples[name] = (x, ids, slots, site.perm, site.signs, site.block, site.skip, *factor, *stacks, *branch, *spec)
    whole = samples[_CORES]
    return {**samples, "gate": (*whole, torch.ones(4, WIDTH), "silu")}


def _cpu_experts(weight: tuple[Tensor, ...], spec: tuple[Any, ...]) -> Samples:
    samples = _experts_site(weight, spec)
    return {name: (*samples[name], act_bits) for name, act_bits in (("bare", 0), (_CORES, 8))}


def _affine_weight() -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    site = _SITES["bare"]
    return (site.codes, site.scales, site.zeros), (site.bits, site.group_size)


def _trellis_weight() -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    return trellis_weight(OUT, WIDTH, 2.0, 2, 32), (2.0, 2, 14, 32)


def _routed_linear() -> Samples:
    x, weight = torch.randn(2, 8, generator=generator()), torch.randn(3, 4, 8, generator=generator())
    return {"whole": (x.requires_grad_(), torch.tensor([2, 0, 0, 2]), weight.requires_grad_(), 2)}


def _embedding(weight: tuple[Tensor, ...]) -> Samples:
    ids = torch.randint(0, OUT, (2, 5), generator=generator())
    return {str(dtype): (ids, *weight, WIDTH, dtype) for dtype in (torch.float32, torch.bfloat16)}


def _cpu_site() -> Samples:
    return {name: (_activation(p).detach(), *p.args()[1:], 0 if p.up is None else 8) for name, p in _SITES.items()}


def _trellis(kind: str) -> Samples:
    """Samples of an operator of the format "trellis": what stands around the weight is that of `_SITES`."""
    samples: Samples = {}
    for index, (name, p) in enumerate(_SITES.items()):
        bits, columns, strip = ((3.0, 1, 32), (2.0, 2, -1))[index % 2]
        words = code_words((OUT, WIDTH), round(bits * columns), columns, strip)
        codes = torch.randint(-(1 << 31), 1 << 31, (words,), generator=generator(), dtype=torch.int64).to(torch.int32)
        scales = torch.full((OUT,), 0.1, dtype=p.scales.dtype)
        spec = (bits, columns, 14, strip)
        if kind == "linear":
            latent = None if p.up is None else torch.randn(2, 3, 4, generator=generator()).to(p.x.dtype)
            samples[name] = (_activation(p), scales, codes, p.bias, latent, p.up, p.up_scale, *spec)
            continue
        around = (p.perm, p.signs, p.block, p.skip, p.down, p.down_scale, scales, codes, p.bias, p.up, p.up_scale)
        if kind == "site":
            samples[name] = (_activation(p), *around, *spec)
        else:
            samples[name] = (_activation(p).detach(), *around, *spec, 0 if p.up is None else 8)
    return samples


def _device_site(device: str, tokens: int, rank: int = 4) -> tuple[Any, ...]:
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    return problem(tokens, 192, 72, 3, 64, rank=rank, block=64, permuted=True, biased=True, dtype=dtype).args(device)


def _rotate_device(device: str) -> Samples:
    x, perm, signs, block = _device_site(device, 3)[:4]
    return {
        "whole": (x, perm, signs, block, 0),
        "columns left alone": (x, None, None, block, 64),
        "norm": (x, None, signs, block, 0, x[0], 1e-5, None, ""),
        "in the order of a product": (x, perm, signs, block, 0, None, 0.0, None, "", 2, 128),
    }


def _rotate_project(device: str) -> Samples:
    x, perm, signs, block, _, down, scale = _device_site(device, 3)[:7]
    return {
        "whole": (x, perm, signs, block, 0, down, scale, 64),
        "no scale": (x, None, None, block, 64, down, None, 256),
        "fp32 scale": (x, perm, signs, block, 0, down, scale.float(), 64),
        "gate": (x, perm, signs, block, 0, down, scale, 64, None, 0.0, x + 1, "silu"),
        "in the order of a product": (x, perm, signs, block, 0, down, scale, 64, None, 0.0, None, "", 4, 64),
    }


def _decode_prepare(device: str) -> Samples:
    samples: Samples = {}
    for rank in (0, 4):
        x, perm, signs, block, _, down = _device_site(device, 1, rank)[:6]
        samples[f"rank {rank}"] = (x, perm, signs, block, down, 3, 64)
        samples[f"rank {rank}, norm"] = (x, perm, signs, block, down, 3, 64, x[0], 1e-5, None, "")
        samples[f"rank {rank}, gate"] = (x, perm, signs, block, down, 3, 64, None, 0.0, x + 1, "gelu")
    return samples


def _decode_product(device: str) -> Samples:
    samples: Samples = {}
    for rank, splits, wide in ((0, 1, False), (4, 1, True), (4, 2, False)):
        x, perm, signs, block, _, down, down_scale, codes, scales, zeros, bias, up, up_scale, *_ = _device_site(
            device, 1, rank
        )
        scales = scales.float() if wide else scales
        prepared = torch.ops.lopro.decode_prepare(x, perm, signs, block, down, 3, 64)
        rest = (codes, scales, zeros, bias, down_scale, up, up_scale, 3, 64, splits, x.dtype)
        samples[f"rank {rank}, {splits} parts"] = (*prepared, *rest)
        samples[f"rank {rank}, {splits} parts, residual"] = (*prepared, *rest, x.new_ones(1, 72))
    return samples


def _packed_linear_device(device: str) -> Samples:
    samples: Samples = {}
    for tokens, shape, splits in ((3, 16, 2), (40, 64, 1), (130, 0, 1)):
        x, _, _, _, _, _, _, codes, scales, zeros, bias, up, up_scale, *_ = _device_site(device, tokens)
        latent = x.new_ones(1, tokens, 4).float()
        tile = (3, 64, shape, splits)
        samples[f"{tokens} tokens"] = (x, codes, scales, zeros, bias, latent, up, up_scale, *tile)
        samples[f"{tokens} tokens, no branch, fp32 scales"] = (
            x, codes, scales.float(), zeros, None, None, None, None, *tile, x.new_ones(tokens, 72),
        )  # fmt: skip
    return samples


def _dequantize_device(device: str) -> Samples:
    _, _, _, _, _, down, down_scale, codes, scales, zeros, _, up, up_scale, *_ = _device_site(device, 1)
    weight = (codes, scales, zeros, 3, 64, 192)
    return {
        "fp32": (*weight, torch.float32),
        "narrow, fp32 scales": (codes, scales.float(), *weight[2:], torch.float16),
        "with the branch": (*weight, torch.float32, up, up_scale, down, down_scale),
        "integers": (*weight, torch.int8),
    }


def _trellis_product(device: str) -> Samples:
    samples: Samples = {}
    for rank, splits in ((0, 1), (4, 2)):
        x, perm, signs, block, _, down, down_scale, *_, bias, up, up_scale, _, _ = _device_site(device, 1, rank)
        scales, codes = (tensor.to(device) for tensor in trellis_weight(72, 192, 2.0, 2, 32))
        prepared = torch.ops.lopro.decode_prepare(x, perm, signs, block, down, 8, -1)
        rest = (scales, codes, bias, down_scale, up, up_scale, 4, 2, 14, 32, 192, splits, x.dtype)
        samples[f"rank {rank}, {splits} parts, residual"] = (*prepared, *rest, x.new_ones(1, 72))
    return samples


def _trellis_dequantize(device: str) -> Samples:
    _, _, _, _, _, down, down_scale, *_, up, up_scale, _, _ = _device_site(device, 1)
    scales, codes = (tensor.to(device) for tensor in trellis_weight(72, 192, 3.0, 1, 32))
    weight = (codes, 3, 1, 14, 32, 192)
    return {
        "narrow": (scales, *weight, torch.float16),
        "fp32 scales, with the branch": (scales.float(), *weight, torch.float32, up, up_scale, down, down_scale),
    }


def _round_device(device: str) -> Samples:
    from lopro_fx.kernels.formats.affine.packed_int8.device import columns

    x, perm, signs, block = _device_site(device, 3)[:4]
    return {f"{group} columns": (x, perm, signs, block, 8, group, columns(64, group)) for group in (-1, 64)}


def _int8_operands(device: str, group: int) -> tuple[Any, ...]:
    """(integers, steps, sums), a weight, and a bias with a branch."""
    _, _, _, _, _, _, _, *weight, bias, up, up_scale, _, _ = _device_site(device, 3)
    rounded = torch.ops.lopro.round_device(*_round_device(device)[f"{group} columns"])
    return rounded, weight, (bias, rounded[1].new_ones(3, 4), up, up_scale)


def _int8_matmul_device(device: str) -> Samples:
    samples: Samples = {}
    for group in (-1, 64):
        rounded, weight, branch = _int8_operands(device, group)
        rest = (3, 64, group, 16, branch[0].dtype)
        samples[f"{group} columns"] = (*rounded, *weight, *branch, *rest)
        samples[f"{group} columns, no branch"] = (*rounded, *weight, None, None, None, None, *rest)
    return samples


def _dense_int8_device(device: str) -> Samples:
    samples: Samples = {}
    for group, halves in ((-1, 1), (64, 2)):
        (integers, steps, _), (codes, scales, zeros), branch = _int8_operands(device, group)
        dense = (2 * dequantize(codes, torch.ones_like(scales), zeros, 3, 64, 192, torch.float32)).to(torch.int8)
        rest = (64, group, branch[0].dtype, halves)
        samples[f"{halves} halves"] = (integers, steps, dense, scales, *branch, *rest)
        samples[f"{halves} halves, no branch"] = (integers, steps, dense, scales, None, None, None, None, *rest)
    return samples


def _on(device: str, *values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def _routed(device: str, format: str, name: str) -> tuple[Any, ...]:
    """Operands of "experts_site" on a device."""
    weight = _affine_weight() if format == "affine" else _trellis_weight()
    return _on(device, *_experts_site(*weight)[name])


def _experts_prepare(device: str) -> Samples:
    x, ids, slots, perm, signs, block, _, down, *_, cells, _, bits, group = _routed(device, "affine", _CORES)
    given = (x, ids, slots, 3, perm, signs, block, down)
    return {
        "a grid": (*given, cells, 4, bits, group, None, ""),
        "each its own, gate": (x, ids % 2, slots, 2, None, signs, block, down, None, 4, 8, -1, x + 1, "gelu"),
    }


def _experts_latents(device: str) -> Samples:
    _, ids, slots, *_, cells, core, _, _ = _routed(device, "affine", _CORES)
    latent = torch.ones(4, 8, device=device)
    return {
        "a grid": (latent, ids, slots, 4, 3, cells, core),
        "each its own": (latent, ids % 2, slots, 4, 2, None, None),
    }


def _experts_product(format: str, device: str) -> Samples:
    # The fixed point of a trellis is that of 8 bits.
    width, samples = (8, -1) if format == "trellis" else None, {}
    for name, splits in (("bare", 2), (_CORES, 1)):
        x, ids, slots, perm, signs, block, _, down, down_scale, *rest = _routed(device, format, name)
        stacks, (up, up_scale, cells, core, *spec) = rest[: -4 - len(_spec(format))], rest[-4 - len(_spec(format)) :]
        prepared = width or spec
        if down is None:
            words, steps, latent = *torch.ops.lopro.decode_prepare(x, perm, signs, block, None, *prepared)[:2], None
        else:
            words, steps, latent = torch.ops.lopro.experts_prepare(
                x, ids, slots, 3, perm, signs, block, down, cells, 4, *prepared, None, ""
            )
        last = (4, 2, 14, 32, WIDTH) if format == "trellis" else spec
        branch = (down_scale, up, up_scale, cells, core)
        samples[name] = (words, steps, latent, ids, slots, *stacks, *branch, *last, splits, x.dtype)
    return samples


def _experts_matmul(format: str, device: str) -> Samples:
    from lopro_fx.kernels.formats.affine.linear.device import step_of
    from lopro_fx.kernels.fragments import ordered
    from lopro_fx.kernels.tiles import main_width

    samples: Samples = {}
    for name in ("bare", _CORES):
        x, ids, slots, _, _, _, _, down, _, *rest = _routed(device, format, name)
        stacks, (up, up_scale, cells, _, *spec) = rest[: -4 - len(_spec(format))], rest[-4 - len(_spec(format)) :]
        own = None if down is None else torch.ones(1, 8, 4, device=device)
        order, starts = ids.long().argsort(), torch.tensor([0, 4, 4, 8], dtype=torch.int32, device=device)
        last = (4, 2, 14, 32) if format == "trellis" else spec
        if format == "affine":
            x = ordered(x, main_width(spec[0]), step_of(x.dtype, *spec))
        samples[name] = (x, own, order, starts, slots, *stacks, up, up_scale, cells, *last, 16)
    return samples


def _spec(format: str) -> tuple[Any, ...]:
    return (_affine_weight() if format == "affine" else _trellis_weight())[1]


def _trellis_embedding() -> Samples:
    ids = torch.randint(40, (2, 3), generator=generator())
    return {f"strips of {strip}": (ids, *trellis_weight(40, 33, 3.0, 1, strip), 3.0, 1, 14, strip, 33, torch.float16)
            for strip in (-1, 32)}  # fmt: skip


# Operators whose operands lie anywhere, and those that launch kernels, whose operands lie on the device that is given.
COMPOSITE: dict[str, Callable[[], Samples]] = {
    "cpu_site": _cpu_site, "packed_embedding": _packed_embedding, "packed_int8": _packed_int8,
    "packed_linear": _packed_linear, "packed_site": _packed_site, "project": _project, "rotate": _rotate,
    "routed_linear": _routed_linear, "packed_experts": lambda: _experts(*_affine_weight()),
    "trellis_experts": lambda: _experts(*_trellis_weight()), "cpu_experts": lambda: _cpu_experts(*_affine_weight()),
    "trellis_cpu_experts": lambda: _cpu_experts(*_trellis_weight()),
    "packed_experts_loop": lambda: _experts(*_affine_weight()),
    "trellis_experts_loop": lambda: _experts(*_trellis_weight()),
    "packed_experts_site": lambda: _experts_site(*_affine_weight()),
    "trellis_experts_site": lambda: _experts_site(*_trellis_weight()),
    "round_activation": _round_activation, "trellis_cpu": functools.partial(_trellis, "cpu"),
    "trellis_embedding": _trellis_embedding,
    "trellis_linear": functools.partial(_trellis, "linear"), "trellis_site": functools.partial(_trellis, "site"),
    **_guests(),
}  # fmt: skip
DEVICE: dict[str, Callable[[str], Samples]] = {
    "decode_prepare": _decode_prepare, "decode_product": _decode_product, "dense_int8_device": _dense_int8_device,
    "dequantize_device": _dequantize_device, "int8_matmul_device": _int8_matmul_device,
    "packed_linear_device": _packed_linear_device, "rotate_device": _rotate_device,
    "rotate_project": _rotate_project, "round_device": _round_device,
    "trellis_dequantize": _trellis_dequantize, "trellis_product": _trellis_product,
    "experts_prepare": _experts_prepare, "experts_latents": _experts_latents,
    "packed_experts_product": functools.partial(_experts_product, "affine"),
    "trellis_experts_product": functools.partial(_experts_product, "trellis"),
    "packed_experts_matmul": functools.partial(_experts_matmul, "affine"),
    "trellis_experts_matmul": functools.partial(_experts_matmul, "trellis"),
}  # fmt: skip
