"""Calibration by running the exported graph itself; no model-specific code."""
