"""Language models to quantise: load by name, export with dynamic shapes."""

from __future__ import annotations

from lopro_fx.models.export import export_causal_lm, export_scorer
from lopro_fx.models.load import LoadedModel, load_model
from lopro_fx.models.rebuild import rebuild_model

__all__ = [
    "LoadedModel",
    "export_causal_lm",
    "export_scorer",
    "load_model",
    "rebuild_model",
]
