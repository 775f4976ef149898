"""Every kernel compiles for GPUs that aren't here, and keeps its values in registers."""

from __future__ import annotations

from itertools import islice

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

from benchmarks.ahead import compile_launch
from benchmarks.kernel_resources import weights_per_thread
from benchmarks.launches import launches, solver_launches, trellis_launches


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_kernel_spills(capability: int, bits: int) -> None:
    for name, launch in launches(bits, capability=capability):
        resources = compile_launch(launch, capability)
        assert resources.spill_bytes == 0, (name, resources)
        # Decoding hides latency by having at least two programs on a multiprocessor, which has 65,536 registers.
        programs = 65536 // (resources.registers * 32 * launch.options.get("num_warps", 4))
        assert programs >= (2 if "decode" in name else 1), (name, resources)
        assert resources.shared_bytes <= 160 * 1024, (name, resources)


@pytest.mark.parametrize(("name", "bits", "most"), [
    ("decode, product", 2, 1.6), ("decode, product", 3, 2.6), ("decode, product", 4, 2),
    ("matmul, 16 tokens", 2, 5), ("matmul, 16 tokens", 3, 6.5), ("matmul, 16 tokens", 4, 5),
    ("matmul, many tokens", 4, 6.5), ("int8, matmul, 16 tokens", 4, 4.5), ("int8, matmul, many tokens", 4, 7.5),
])  # fmt: skip
def test_few_instructions_a_weight(name: str, bits: int, most: float) -> None:
    # While an H100 reads a weight of 4 bits it has time for four instructions, and for two with 2 bits.
    launch = dict(launches(bits))[name]
    resources = compile_launch(launch, 90)
    options = launch.options
    columns = options["BLOCK_K"] if "BLOCK_K" in options else options["BLOCK_W"] * 32 // options["WIDTH"]
    weights = options["BLOCK_N"] * columns // (32 * options["num_warps"])
    assert 0 < resources.loop <= most * weights


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", ["16", "64", "many"])
def test_codes_reach_tensor_cores_through_registers(tokens: str, bits: int, group_size: int) -> None:
    resources = compile_launch(dict(launches(bits, group_size))[f"matmul, {tokens} tokens"], 90)
    # A detour through shared memory would take 8 or more of either in each step; these are the epilogue's.
    assert resources.instructions.get("LDSM", 0) <= 1, resources
    assert resources.instructions.get("STS", 0) <= 8, resources


def test_the_dense_int8_product_scales_and_little_else() -> None:
    launch = dict(launches(4))["int8, dense matmul"]
    resources, options = compile_launch(launch, 90), launch.options
    outputs = options["HALVES"] * options["BLOCK_M"] * options["BLOCK_N"] // (32 * options["num_warps"])
    # Each sum of a group is converted and added with its scale: two instructions of at most four.
    assert 2 * outputs < resources.loop <= 4 * outputs


def test_decode_uses_the_byte_dot_product() -> None:
    launch = dict(launches(2))["decode, product"]
    resources = compile_launch(launch, 90)
    # Two of them for each four of the 512 weights that a thread reads at a time.
    assert resources.instructions["IDP"] == 256


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_memory_is_read_ahead_of_the_decode_product(capability: int, bits: int) -> None:
    launch = dict(launches(bits))["decode, product"]
    resources = compile_launch(launch, capability)
    options = launch.options
    copies = options["BLOCK_N"] * options["BLOCK_W"] * 4 // (32 * options["num_warps"] * 16)
    # Before the loop for each step that is ahead, and once in it.
    assert resources.instructions["LDGSTS"] >= copies * options["STAGES"]
    step = options["BLOCK_N"] * options["BLOCK_W"] * 4
    assert resources.shared_bytes >= (options["STAGES"] - 1) * step
    # Bytes on their way on a multiprocessor; an H200 needs about 32 KiB at 4.3 TB/s and a latency of 1 microsecond.
    programs = min(65536 // (resources.registers * 32 * options["num_warps"]), (160 << 10) // resources.shared_bytes)
    assert programs * (options["STAGES"] - 1) * step >= 64 << 10


def test_prefill_uses_tensor_cores() -> None:
    kernels = dict(launches(4))
    assert compile_launch(kernels["matmul, many tokens"], 90).instructions.get("HGMMA", 0) > 0
    assert compile_launch(kernels["int8, matmul, many tokens"], 90).instructions.get("IGMMA", 0) > 0
    assert compile_launch(kernels["int8, dense matmul"], 90).instructions.get("IGMMA", 0) > 0
    assert compile_launch(kernels["matmul, 16 tokens"], 80).instructions.get("HMMA", 0) > 0


@pytest.mark.parametrize(
    ("capability", "bits", "columns", "most"), [(80, 1.5, 2, 4.5), (90, 2.0, 2, 4.5), (100, 3.0, 1, 8.5)]
)
def test_trellis_kernels(capability: int, bits: float, columns: int, most: float) -> None:
    # Each takes seconds to compile; `benchmarks/kernel_resources.py` has every number of bits for every GPU.
    for name, launch in trellis_launches(bits, columns):
        resources = compile_launch(launch, capability)
        assert resources.spill_bytes == 0, (name, resources)
        assert resources.shared_bytes <= 40 * 1024, (name, resources)
        if "decode" not in name:
            continue
        # Registers of eight programs of four warps on a multiprocessor: they hide the latency of each other's loads.
        assert resources.registers <= 64, (name, resources)
        weights = weights_per_thread(launch)
        assert 0 < resources.loop <= most * weights
        # Two byte dot products for each state, and two for the sum of each word of four columns.
        assert resources.instructions["IDP"] == 2 * weights // columns + 2 * launch.options["UNROLL"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_solver_kernels_keep_their_columns_in_registers(capability: int) -> None:
    # A third of them for each GPU: they take seconds to compile.
    for name, launch in islice(solver_launches(), (80, 90, 100).index(capability), None, 3):
        resources = compile_launch(launch, capability)
        assert resources.spill_bytes <= 8, (name, resources)
        assert resources.shared_bytes <= 16 * 1024, (name, resources)
