"""lopro_fx: quantises language models to 2-4 bits after training, as a pass over torch.export programs."""

from __future__ import annotations

import lopro_fx.kernels.ops  # noqa: F401  registers the lopro:: operators
from lopro_fx.__about__ import __version__
from lopro_fx.config import GPTQ, RTN, LoPRo, Method
from lopro_fx.deploy import export_aoti, generate, load, load_state, save, save_state
from lopro_fx.errors import CalibrationError, CheckpointError, ConfigError, GraphError, LoProError, ModelError
from lopro_fx.passes.optimize import optimize
from lopro_fx.quantize import apply, calibrate, quantize
from lopro_fx.report import BackendReport, Explanation, Report, backend_report, explain, report
from lopro_fx.state import QuantState

__all__ = [
    "GPTQ",
    "RTN",
    "BackendReport",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Explanation",
    "GraphError",
    "LoPRo",
    "LoProError",
    "Method",
    "ModelError",
    "QuantState",
    "Report",
    "__version__",
    "apply",
    "backend_report",
    "calibrate",
    "explain",
    "export_aoti",
    "generate",
    "load",
    "load_state",
    "optimize",
    "quantize",
    "report",
    "save",
    "save_state",
]
