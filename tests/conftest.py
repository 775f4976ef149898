"""Settings and fixtures of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.helpers import SHARED

# The deterministic algorithms of `poisoned_memory` need it on a GPU, before cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Several threads that share few cores cost more than they bring at these sizes.
torch.set_num_threads(1)

# The suite runs the same examples each time; `pytest --hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, max_examples=30, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN (the largest value for integers), so that a read before a write shows."""
    algorithms, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of the 260 k-parameter story model."""
    folder = SHARED / "models" / "stories260k"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} is absent")
    return folder
