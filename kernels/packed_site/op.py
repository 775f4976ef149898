"""Registration of `lopro::packed_site`."""

from __future__ import annotations

from lopro_fx.kernels import registry
from lopro_fx.kernels.packed_site.reference import packed_site

registry.register(
    "packed_site(Tensor x, Tensor? perm, Tensor? signs, int block, int skip, Tensor? down, Tensor? down_scale, "
    "Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, Tensor? up, Tensor? up_scale, int bits, int group_size) "
    "-> Tensor",
    packed_site,
)
