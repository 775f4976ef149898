"""What every Triton kernel takes on GPUs that needn't be here: registers, spills, shared memory, hot instructions.

A site of 28672 x 8192, groups of 128, rank 16, bf16, is compiled for each number of bits and each GPU; nothing is run.
Kernels of trellis weights, with windows of 16 bits and strips of 512 rows, come after them, then those of solvers. Last
come those of 128 experts of 1536 x 2048, of which a token has eight.
IDP is the byte dot product of decoding; HMMA (sm_80), HGMMA (sm_90) and UTCHMMA (sm_100) are the tensor cores; LOP3
takes codes out of their words.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.ahead import Launch, compile_launch, record
from benchmarks.common import save_result
from benchmarks.launches import TRELLIS, launches, solver_launches, trellis_launches
from lopro_fx.kernels.formats.affine.decode.device import activation_group
from lopro_fx.kernels.formats.affine.experts import device as affine_experts
from lopro_fx.kernels.formats.affine.packing.format import group_count
from lopro_fx.kernels.formats.registry import empty
from lopro_fx.kernels.formats.trellis.experts import device as trellis_experts
from lopro_fx.kernels.formats.trellis.format import step_of
from lopro_fx.kernels.routed import device as routed
from lopro_fx.kernels.tiles import main_width
from lopro_fx.report.table import render

_OPCODES = ("IDP", "HMMA", "HGMMA", "UTCHMMA", "LOP3")


def measure(name: str, launch: Launch, bits: float, capability: int) -> dict[str, Any]:
    """One row: what the kernel of a launch takes when compiled for `sm_<capability>`."""
    taken = compile_launch(launch, capability)
    return {
        "kernel": name,
        "bits": bits,
        "sm": capability,
        "warps": launch.options.get("num_warps", 4),
        "registers": taken.registers,
        "spill_bytes": taken.spill_bytes,
        "shared_bytes": taken.shared_bytes,
        **{opcode: taken.instructions.get(opcode, 0) for opcode in _OPCODES},
        "instructions": sum(taken.instructions.values()),
        "loop": taken.loop,
        "loop_per_weight": round(taken.loop / weights, 2) if (weights := weights_per_thread(launch)) else None,
    }


def expert_launches(
    format: str, spec: dict[str, Any], capability: int, experts: int = 128, n: int = 1536, k: int = 2048,
    slots: int = 8, rank: int = 16, dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    """(what it is, launch) of the kernels of experts (n, k) in a format, with branches in a grid, and cores."""

    def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    packed = tuple(empty(format, (experts, n, k), spec).tensors.values())
    up, up_scale = tensor(12, n, rank, dtype=torch.int8), tensor(12, rank, dtype=torch.float16)
    cells, ids = tensor(experts, 2, dtype=torch.int32), tensor(slots, dtype=torch.int64)
    core, latent = tensor(experts, rank, rank, dtype=torch.float16), tensor(1, 12 * rank, dtype=dtype)
    yield "experts, latents", record(routed.latents, routed, latent, ids, slots, rank, experts, cells, core)[0]
    tokens = 2048
    many = tensor(tokens, k, dtype=dtype), tensor(1, tokens * slots, rank, dtype=torch.float32)
    places = tensor(tokens * slots, dtype=torch.int64), tensor(experts + 1, dtype=torch.int32)
    module: Any
    if format == "affine":
        module, bits = affine_experts, spec["bits"]
        numbers, last = (bits, spec["group_size"]), ()
        width, group = main_width(bits), activation_group(spec["group_size"])
    else:
        module, numbers, last = trellis_experts, (step_of(spec), spec["columns"], spec["window"], spec["strip"]), (k,)
        width, group = 8, 128
    words = tensor(1, 2, 8 // width, k // 32 * width, dtype=torch.int32)
    steps = tensor(1, 2, group_count(k, group), dtype=torch.float32)
    weight = (*packed, up, up_scale, cells, *numbers)
    down, down_scale = tensor(12 * rank, k, dtype=torch.int8), tensor(12 * rank, dtype=torch.float16)
    signs, x = tensor(k // 8, dtype=torch.uint8), tensor(1, k, dtype=dtype)
    fixed = numbers if format == "affine" else (8, -1)
    given = (x, ids, slots, experts, None, signs, 256, down, cells, rank, *fixed, x, "silu")
    yield f"experts, {format}, decode, prepare", record(affine_experts.prepare, affine_experts, *given)[0]
    parts = tensor(k // 256, slots, rank, dtype=torch.float32)
    few = (words, steps, parts, ids, slots, *packed, down_scale, up, up_scale, cells, core, *numbers, *last, 1, dtype)
    yield f"experts, {format}, decode, product", record(module.product, module, *few)[0]
    for tile in (16, 64, 0):
        if tile or capability >= 90:
            operands = (*many, *places, slots, *weight, tile)
            yield f"experts, {format}, matmul, {tile or 'many'} pairs", record(module.matmul, module, *operands)[0]


def weights_per_thread(launch: Launch) -> float:
    """Packed weights that a thread multiplies in one turn of its kernel's loop; 0 where the kernel has none."""
    options = launch.options
    if "UNROLL" in options:
        # Four rows by words of four columns. The loop over groups, counted with the one inside it, adds a seventh.
        return 4 * options["UNROLL"] * 4
    if "WIDTH" not in options or "BLOCK_N" not in options or ("BLOCK_M" not in options and "BLOCK_W" not in options):
        return 0
    columns = options["BLOCK_K"] if "BLOCK_K" in options else options["BLOCK_W"] * 32 // options["WIDTH"]
    return options["BLOCK_N"] * columns / (32 * options.get("num_warps", 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[2, 3, 4, 8])
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100])
    args = parser.parse_args()
    rows = [
        measure(name, launch, bits, capability)
        for capability in args.sm
        for bits in args.bits
        for name, launch in launches(bits, capability=capability)
    ]
    rows += [
        measure(name, launch, bits, capability)
        for capability in args.sm
        for bits, columns in TRELLIS
        for name, launch in trellis_launches(bits, columns)
    ]
    rows += [
        measure(name, launch, 0, capability)
        for capability in args.sm
        for name, launch in solver_launches(windows=(14, 16))
    ]
    specs: list[tuple[str, dict[str, Any]]] = [("affine", {"bits": bits, "group_size": 128}) for bits in args.bits]
    specs += [("trellis", {"bits": bits, "columns": columns, "window": 16, "strip": 512}) for bits, columns in TRELLIS]
    rows += [
        measure(name, launch, spec["bits"], capability)
        for capability in args.sm
        for format, spec in specs
        for name, launch in expert_launches(format, spec, capability)
    ]
    spilled = sum(row["spill_bytes"] > 0 for row in rows)
    print(render(f"{len(rows)} kernels, {spilled} spill", tuple(rows[0]), [tuple(row.values()) for row in rows]))
    save_result("kernel_resources", rows, shape=[28672, 8192], group_size=128, rank=16, dtype="bfloat16")


if __name__ == "__main__":
    main()
