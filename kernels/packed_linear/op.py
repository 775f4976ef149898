"""Registration of `lopro::packed_linear`."""

from __future__ import annotations

from lopro_fx.kernels import registry
from lopro_fx.kernels.packed_linear.reference import packed_linear

registry.register(
    "packed_linear(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, Tensor? latent, Tensor? up, "
    "Tensor? up_scale, int bits, int group_size) -> Tensor",
    packed_linear,
)
