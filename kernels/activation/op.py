"""Registration of `lopro::round_activation`, which passes fuse into an integer gemm."""

from __future__ import annotations

from lopro_fx.kernels import registry
from lopro_fx.kernels.activation.reference import round_activation

registry.register("round_activation(Tensor x, int bits, int group) -> Tensor", round_activation)
