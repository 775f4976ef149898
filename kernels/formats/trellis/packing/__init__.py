"""Trellis codes to dense weights."""
