"""Products with one or a few tokens: activations as 16-bit block fixed point, weights left packed."""
