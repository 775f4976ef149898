"""Maps the top-level folders `passes/` and `kernels/` into `lopro_fx`, each with every sub-package it holds."""

from __future__ import annotations

from setuptools import find_packages, setup

FOLDERS = {"lopro_fx": "lopro_fx", "lopro_fx.passes": "passes", "lopro_fx.kernels": "kernels"}

packages = [f"{root}.{name}" for root, folder in FOLDERS.items() for name in find_packages(folder)]
setup(packages=[*FOLDERS, *packages], package_dir=FOLDERS)
