"""lopro_fx: post-training quantisation of language models to 2-4 bits, as a pass over torch.export programs."""

from __future__ import annotations

from typing import Any

import lopro_fx.kernels.ops  # registers the lopro:: operators
from lopro_fx.__about__ import __version__
from lopro_fx.budget import Budget, Plan
from lopro_fx.errors import CalibrationError, CheckpointError, ConfigError, GraphError, LoProError, ModelError
from lopro_fx.generation.export import export_for_generation
from lopro_fx.generation.generate import generate
from lopro_fx.generation.generator import Generator
from lopro_fx.generation.programs import CacheSpec, GenerationPrograms
from lopro_fx.huggingface import pack_model, save_pretrained
from lopro_fx.methods.base import Method
from lopro_fx.methods.flrq import FLRQ
from lopro_fx.methods.gptq import GPTQ
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.lrc import LRC
from lopro_fx.methods.lrq import LRQ
from lopro_fx.methods.rtn import RTN
from lopro_fx.methods.tileq import TileQ
from lopro_fx.packages.aoti import export_aoti
from lopro_fx.packages.package import load_package, package
from lopro_fx.passes.optimize import optimize
from lopro_fx.plan import plan
from lopro_fx.quantize import apply, calibrate, quantize
from lopro_fx.report import BackendReport, Explanation, Report, backend_report, explain, report
from lopro_fx.state import QuantState
from lopro_fx.store.checkpoint import load, load_state, save, save_state

__all__ = [
    "FLRQ",
    "GPTQ",
    "LRC",
    "LRQ",
    "RTN",
    "BackendReport",
    "Budget",
    "CacheSpec",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Explanation",
    "GenerationPrograms",
    "Generator",
    "GraphError",
    "LoPRo",
    "LoProError",
    "Method",
    "ModelError",
    "Plan",
    "QuantState",
    "Report",
    "TileQ",
    "__version__",
    "apply",
    "backend_report",
    "calibrate",
    "explain",
    "export_aoti",
    "export_for_generation",
    "generate",
    "load",
    "load_package",
    "load_state",
    "optimize",
    "pack_model",
    "package",
    "plan",
    "quantize",
    "report",
    "save",
    "save_pretrained",
    "save_state",
]


def __getattr__(name: str) -> Any:
    # They derive from classes of transformers, which is imported on first access.
    if name in ("LoProConfig", "LoProQuantizer"):
        return getattr(lopro_fx.huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
