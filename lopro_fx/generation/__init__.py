"""Generation of text: programs with a KV cache, the sampler and the generator."""
