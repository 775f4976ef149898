"""What every benchmark shares: where text and results lie, and the record of machine and versions."""

from __future__ import annotations

import json
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = Path(__file__).resolve().parent / "results"


def solver(device: str | None) -> str:
    """Name of the device that weights are solved on, for a row's `solved_on`."""
    return torch.cuda.get_device_name(device) if device and torch.device(device).type == "cuda" else "CPU"


def save_result(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write `benchmarks/results/<name>.json` with date, device and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    record = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "device": f"{device}, {torch.get_num_threads()} threads",
        "versions": {key: _version(key) for key in ("lopro_fx", "torch", "triton", "transformers", "torchao")},
        "settings": settings,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # Triton exists on some platforms only
        return None
