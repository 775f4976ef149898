"""Gemv with one token: activations in 16-bit block fixed point, weights left as bit strings."""
