"""Packed low-bit gemm with the low-rank up factor and the bias in its epilogue."""
