"""Activations of the CPU kernel's packed gemm: the choices, and the default of every function that has the choice."""

from __future__ import annotations

# Bits of an activation's code by the name of the choice; 0 rounds nothing.
ACTIVATIONS = {"int8": 8, "float": 0}
# Two to four times faster than "float" with many tokens or few bits, for 0.05 to 0.2 % of perplexity.
DEFAULT = "int8"
