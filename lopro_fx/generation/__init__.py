"""Text: programs with a KV cache, samplers, and what runs them."""
