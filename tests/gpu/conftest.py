"""Tests that need a CUDA device; each is skipped where there is none."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: a device may be gone before the summary."""
    if report.failed:
        sys.stderr.write(f"\n{report.nodeid}: {report.longreprtext[-4000:]}\n")
