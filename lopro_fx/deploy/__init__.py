"""What a quantised program is delivered as: a folder of safetensors and JSON, AOTInductor packages, text."""

from __future__ import annotations

from lopro_fx.deploy.aoti import AotiResult, export_aoti, size_bound
from lopro_fx.deploy.checkpoint import load, load_state, save, save_state
from lopro_fx.deploy.generate import generate
from lopro_fx.deploy.generator import Generator
from lopro_fx.deploy.package import load_package, package
from lopro_fx.deploy.programs import CacheSpec, GenerationPrograms

__all__ = [
    "AotiResult",
    "CacheSpec",
    "GenerationPrograms",
    "Generator",
    "export_aoti",
    "generate",
    "load",
    "load_package",
    "load_state",
    "package",
    "save",
    "save_state",
    "size_bound",
]
