"""Inductor lowers a site to our kernels and compiles them; no device is needed to see that."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by Triton")


CASES = [("site", 1, 3), ("site", 16, 4), ("site", 600, 2), ("feed_forward", 1, 4), ("feed_forward", 16, 4),
         ("experts", 1, 3), ("experts", 40, 4)]  # fmt: skip
Case = tuple[str, int, int]


@pytest.fixture(scope="module")
def generated() -> dict[Case, list[dict[str, Any]]]:
    """The kernels of all programs: each is a process of its own, and most of it is Python's start and compiling."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda case: _kernels(*case), CASES), strict=True))


def _kernels(program: str, tokens: int, bits: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.kernels.inductor_cuda", program, str(tokens), str(bits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert not any(kernel.get("spill_bytes") for kernel in kernels)
    return kernels


@pytest.mark.parametrize(
    ("tokens", "bits", "expected"),
    [
        (1, 3, {"prepare_kernel": 4, "product_kernel": 4}),
        (16, 4, {"rotate_kernel": 4, "matmul_kernel": 4}),
        (600, 2, {"dequantize_kernel": 4}),
    ],
)
def test_a_site_becomes_few_launches(
    generated: dict[Case, list[dict[str, Any]]], tokens: int, bits: int, expected: dict[str, int]
) -> None:
    kernels = generated["site", tokens, bits]
    warps = {kernel["name"]: kernel.get("warps") for kernel in kernels}
    assert warps.items() >= expected.items()
    # What comes before writes the site's input once, although kernels have arguments that they don't read.
    assert kernels[0]["name"].startswith("triton_poi")
    assert kernels[0]["stores"] == 1
    if tokens <= 16:
        # Residual and activation are one launch more, and nothing else is.
        assert len(kernels) == 4
        assert kernels[-1]["name"].startswith("triton_poi")
    else:
        assert {"mm", "addmm"} & set(warps)


@pytest.mark.parametrize(
    ("tokens", "pair"), [(1, ["prepare_kernel", "product_kernel"]), (16, ["rotate_kernel", "matmul_kernel"])]
)
def test_norm_gate_and_residual_take_no_launch(
    generated: dict[Case, list[dict[str, Any]]], tokens: int, pair: list[str]
) -> None:
    names = [kernel["name"] for kernel in generated["feed_forward", tokens, 4]]
    first, *ours, last = names
    # The sum of the parts of 28672 columns goes along with the activation behind it.
    assert ours == 2 * pair
    assert first.startswith("triton_poi")
    assert last.startswith("triton_poi")


def test_experts_become_few_launches(generated: dict[Case, list[dict[str, Any]]]) -> None:
    names = [kernel["name"] for kernel in generated["experts", 1, 3]]
    pair = ["experts_prepare_kernel", "experts_product_kernel"]
    assert [name for name in names if not name.startswith("triton_")] == 2 * pair
    assert len(names) <= 7
    many = [kernel["name"] for kernel in generated["experts", 40, 4]]
    assert many.count("experts_matmul_kernel") == many.count("own_kernel") == many.count("rotate_kernel") == 2
