"""Measure a program: perplexity on text, divergence from the original, accuracy on multiple-choice tasks."""

from __future__ import annotations

from lopro_fx.evaluation.divergence import DivergenceResult, divergence
from lopro_fx.evaluation.perplexity import PerplexityResult, perplexity, predicted_bytes
from lopro_fx.evaluation.text import builtin_text, read_text, token_windows
from lopro_fx.evaluation.zeroshot import Choice, Item, ZeroShotResult, read_task, score_item, zero_shot

__all__ = [
    "Choice",
    "DivergenceResult",
    "Item",
    "PerplexityResult",
    "ZeroShotResult",
    "builtin_text",
    "divergence",
    "perplexity",
    "predicted_bytes",
    "read_task",
    "read_text",
    "score_item",
    "token_windows",
    "zero_shot",
]
