"""Registers every `lopro::` operator; imported by `lopro_fx`, never by this folder's `__init__`."""

from __future__ import annotations

from lopro_fx.kernels.activation import op as round_activation
from lopro_fx.kernels.formats.affine.cpu_experts import op as cpu_experts
from lopro_fx.kernels.formats.affine.cpu_site import op as cpu_site
from lopro_fx.kernels.formats.affine.format import Affine
from lopro_fx.kernels.formats.affine.packed_int8 import op as packed_int8
from lopro_fx.kernels.formats.registry import register_format
from lopro_fx.kernels.formats.trellis.cpu import op as trellis_cpu
from lopro_fx.kernels.formats.trellis.cpu_experts import op as trellis_cpu_experts
from lopro_fx.kernels.formats.trellis.format import Trellis
from lopro_fx.kernels.project import op as project
from lopro_fx.kernels.rotate import op as rotate
from lopro_fx.kernels.routed import op as routed_linear

register_format(Affine())
register_format(Trellis())

__all__ = [
    "cpu_experts", "cpu_site", "packed_int8", "project", "rotate", "round_activation", "routed_linear", "trellis_cpu",
    "trellis_cpu_experts",
]  # fmt: skip
