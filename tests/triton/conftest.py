"""Tests of the Triton kernels, on a GPU or, with TRITON_INTERPRET=1 in the environment, by interpretation on the CPU.

The variable has to be there before Triton is imported, so `tests/kernels/test_interpreted.py` runs this folder in a
process of its own.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
