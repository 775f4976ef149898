"""Viterbi search that rounds columns to the trellis code."""
