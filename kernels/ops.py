"""Registers every `lopro::` operator; imported by `lopro_fx`, never by this folder's `__init__`."""

from __future__ import annotations

from lopro_fx.kernels.cpu_site import op as cpu_site
from lopro_fx.kernels.packed_embedding import op as packed_embedding
from lopro_fx.kernels.packed_int8 import op as packed_int8
from lopro_fx.kernels.packed_linear import op as packed_linear
from lopro_fx.kernels.packed_site import op as packed_site
from lopro_fx.kernels.project import op as project
from lopro_fx.kernels.rotate import op as rotate

__all__ = ["cpu_site", "packed_embedding", "packed_int8", "packed_linear", "packed_site", "project", "rotate"]
