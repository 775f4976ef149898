"""Packed gemm with integer activations: W4A8, W8A8, W4A4."""
