"""Rows of a packed table that an output projection multiplies with too."""
