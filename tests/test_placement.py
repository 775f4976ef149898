"""Where calibration and solving run: on the device that is asked for, with weights and results where the program is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

import lopro_fx
from lopro_fx import RTN
from lopro_fx.devices import full_precision
from lopro_fx.passes.to_device import to_device
from tests.programs import decoder


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch can't define a device in Python",
)
def test_every_method_runs_on_another_device_and_gives_the_same_codes() -> None:
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.placement"],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert len([line for line in run.stdout.splitlines() if line.startswith("ok ")]) >= 7


@pytest.mark.parametrize("device", ["meta", "cuda:77", "nothing"])
def test_a_device_that_cannot_compute_is_refused_before_the_work(device: str) -> None:
    _, program = decoder()
    with pytest.raises(lopro_fx.ConfigError, match=device):
        lopro_fx.calibrate(program, None, RTN(), device=device)


def test_products_are_full_precision_inside_and_as_before_after() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_program_is_moved_with_its_ties_and_constants() -> None:
    _, program = decoder(tied=True)
    moved = to_device(program, torch.device("meta"))
    tensors = [*moved.state_dict.values(), *moved.constants.values()]
    assert {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)} == {"meta"}
    assert {tensor.device.type for tensor in program.state_dict.values()} == {"cpu"}
    assert to_device(program, torch.device("cpu")) is program
    assert all(
        node.kwargs["device"] == "meta" or torch.device(node.kwargs["device"]).type == "meta"
        for node in moved.graph.nodes
        if node.kwargs.get("device") is not None
    )
