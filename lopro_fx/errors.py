"""Errors that a user meets, defined in `kernels` because passes raise them too, and the quoting of others."""

from __future__ import annotations

from lopro_fx.kernels.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    GraphError,
    LoProError,
    ModelError,
)

__all__ = ["CalibrationError", "CheckpointError", "ConfigError", "GraphError", "LoProError", "ModelError", "first_line"]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
