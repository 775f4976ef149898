"""Packed low-bit matrix product with the low-rank up-projection and the bias in its epilogue."""
