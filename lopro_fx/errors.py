"""The errors a user meets, defined on the ground floor because passes raise them too, and how others are quoted."""

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
    """The first line of an error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
