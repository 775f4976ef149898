"""Errors that a user can act on. Each message names the layer or value at fault and the fix, in one line."""

from __future__ import annotations


class LoProError(Exception):
    """Base of errors that lopro_fx raises on purpose; the command line prints them without a traceback."""


class ConfigError(LoProError, ValueError):
    """A configuration value is out of its range."""


class CalibrationError(LoProError, ValueError):
    """Calibration batches don't fit the program, or an activation is not finite."""


class GraphError(LoProError, ValueError):
    """The program holds nothing to quantise, or a pass would break it."""


class CheckpointError(LoProError, RuntimeError):
    """A saved folder is damaged, foreign, or could not be written."""


class ModelError(LoProError, ValueError):
    """A model could not be found, fetched or exported."""


class BuildError(RuntimeError):
    """A compiled kernel could not be built; says why and what helps."""
