"""What a quantised program is delivered as: a folder of safetensors and JSON, an AOTInductor package, text."""

from __future__ import annotations

from lopro_fx.deploy.aoti import AotiResult, export_aoti, size_bound
from lopro_fx.deploy.checkpoint import load, load_state, save, save_state
from lopro_fx.deploy.generate import generate

__all__ = ["AotiResult", "export_aoti", "generate", "load", "load_state", "save", "save_state", "size_bound"]
