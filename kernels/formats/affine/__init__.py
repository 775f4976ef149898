"""Codes of 2, 3, 4 or 8 bits, with a scale and a zero for each group of input columns."""
