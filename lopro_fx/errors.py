"""The errors a user meets, defined on the ground floor because passes raise them too."""

from __future__ import annotations

from lopro_fx.kernels.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    GraphError,
    LoProError,
    ModelError,
)

__all__ = ["CalibrationError", "CheckpointError", "ConfigError", "GraphError", "LoProError", "ModelError"]
