"""Runs `tests/triton` under Triton's interpreter, which has to be switched on before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.12"), reason="torch 2.11 wraps no interpreted kernel"
)
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    files = sorted(path.name for path in (ROOT / "tests" / "triton").glob("test_*.py"))
    # The kernels take as long as all else.
    parts = [["test_kernels.py"], [name for name in files if name != "test_kernels.py"]]
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(_interpret, parts))
    assert passed[0] > 50
    assert passed[1] > 50


def _interpret(files: list[str]) -> int:
    """How many tests of some files passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/triton/{name}" for name in files)],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert passed is not None
    assert "skipped" not in done.stdout
    return int(passed[1])
