"""Gather by a permutation, random signs, block Hadamard: the input side of a rewritten Linear."""
