"""Packed formats and their operators; installed as `lopro_fx.kernels`. Importing this does nothing."""
