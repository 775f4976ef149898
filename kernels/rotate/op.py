"""Registration of `lopro::rotate`."""

from __future__ import annotations

from lopro_fx.kernels import registry
from lopro_fx.kernels.rotate.reference import rotate

registry.register("rotate(Tensor x, Tensor? perm, Tensor? signs, int block, int skip) -> Tensor", rotate)
