"""Compiled kernels for CPUs: what those of all formats share, and how they are built, loaded and packaged."""
