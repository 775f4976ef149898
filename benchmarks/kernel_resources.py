"""What every Triton kernel takes on GPUs that needn't be here: registers, spills, shared memory, hot instructions.

A site of 28672 x 8192, groups of 128, rank 16, bf16, is compiled for each number of bits and each GPU; nothing is run.
Kernels of trellis weights, with windows of 16 bits and strips of 512 rows, come after them, then those of solvers. Last
come those of 128 experts of 1536 x 2048, of which a token has eight.
IDP is the byte dot product of decoding; HMMA (sm_80), HGMMA (sm_90) and UTCHMMA (sm_100) are the tensor cores; LOP3
takes codes out of their words.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.ahead import Launch, compile_launch
from benchmarks.common import save_result
from benchmarks.launches import TRELLIS, expert_launches, launches, solver_launches, trellis_launches
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
