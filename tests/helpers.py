"""What several tests need: one way to compare tensors, random problems, and where shared files lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Relative RMS error that one rounding to the type, and the accumulation of a few hundred terms in it, may cause.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_rms(reference: Tensor, got: Tensor) -> float:
    """||got - reference|| / ||reference|| in fp64; 0 for two zeros."""
    wide, error = reference.detach().to(torch.float64), 0.0
    error = (got.detach().to(torch.float64) - wide).norm().item()
    return error / wide.norm().item() if wide.norm() > 0 else error


def assert_close(name: str, reference: Tensor, got: Tensor, ratio: float) -> None:
    """Fail unless shapes agree, everything is finite, and the relative RMS error is at most `ratio`."""
    assert got.shape == reference.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    error = relative_rms(reference, got)
    rms = [value.detach().to(torch.float64).square().mean().sqrt().item() for value in (reference, got)]
    assert error <= ratio, f"{name}: relative RMS error {error:.3e} > {ratio:.1e}; RMS {rms[0]:.6g} and {rms[1]:.6g}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(tokens: int, width: int, seed: int = 0) -> Tensor:
    """fp32 (tokens, width) activations with correlated columns, a few of them 20 times larger."""
    rng = generator(seed)
    mixed = torch.randn(tokens, width, generator=rng) @ torch.randn(width, width, generator=rng) / width**0.5
    mixed += torch.randn(tokens, width, generator=rng)
    mixed[:, torch.randperm(width, generator=rng)[: max(1, width // 40)]] *= 20
    return mixed


def gram_of(rows: Tensor) -> Tensor:
    """fp32 (n, n) E[x xᵀ]."""
    return rows.T @ rows / rows.shape[0]


def damped(gram: Tensor, part: float) -> Tensor:
    """The Gram with a part of its mean diagonal added to its diagonal."""
    return gram + part * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def package_error(folder: Path, ids: Tensor, want: Tensor) -> float:
    """Relative error of the package `model.pt2` of `folder` on `ids`, in a process that doesn't import lopro_fx."""
    torch.save((ids, want), folder / "case.pt")
    script = (
        "import sys, torch\n"
        "model = torch._inductor.aoti_load_package('model.pt2')\n"
        "ids, want = torch.load('case.pt')\n"
        "got = model(ids)\n"
        "got = got[0] if isinstance(got, (tuple, list)) else got\n"
        "assert 'lopro_fx' not in sys.modules\n"
        "print((got - want).norm().item() / want.norm().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
