"""Product of integer activations with a weight that was written out as int8, for many tokens."""
