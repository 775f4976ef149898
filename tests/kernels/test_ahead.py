"""Every kernel compiles for GPUs that aren't here, and keeps its values in registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")

from lopro_fx.kernels.ahead import compile_launch
from lopro_fx.kernels.launches import launches


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("bits", [3, 4])
def test_no_kernel_spills(capability: int, bits: int) -> None:
    for name, launch in launches(bits):
        resources = compile_launch(launch, capability)
        assert resources.spill_bytes == 0, (name, resources)
        # Decoding hides latency by having at least two programs on a multiprocessor, which has 65,536 registers.
        programs = 65536 // (resources.registers * 32 * launch.options.get("num_warps", 4))
        assert programs >= (2 if "decode" in name else 1), (name, resources)
        assert resources.shared_bytes <= 160 * 1024, (name, resources)


@pytest.mark.parametrize(("name", "bits", "most"), [
    ("decode, product", 2, 1.5), ("decode, product", 3, 2.2), ("decode, product", 4, 1.8),
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


def test_decode_uses_the_byte_dot_product() -> None:
    launch = dict(launches(2))["decode, product"]
    resources = compile_launch(launch, 90)
    # Two of them for each four of the 256 weights that a thread reads at a time.
    assert resources.instructions["IDP"] == 128


def test_prefill_uses_tensor_cores() -> None:
    kernels = dict(launches(4))
    assert compile_launch(kernels["matmul, many tokens"], 90).instructions.get("HGMMA", 0) > 0
    assert compile_launch(kernels["int8, matmul, many tokens"], 90).instructions.get("IGMMA", 0) > 0
    assert compile_launch(kernels["matmul, 16 tokens"], 80).instructions.get("HMMA", 0) > 0
