"""Gemm of integer activations and a weight unpacked to int8, for many tokens."""
