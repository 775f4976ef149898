"""Gemv with one or a few tokens: activations in 16-bit block fixed point, weights left packed."""
