"""Product with a trellis weight, low-rank branch and bias."""
