"""Registration of `lopro::packed_embedding`."""

from __future__ import annotations

from lopro_fx.kernels import registry
from lopro_fx.kernels.packed_embedding.reference import packed_embedding

registry.register(
    "packed_embedding(Tensor ids, Tensor codes, Tensor scales, Tensor zeros, int bits, int group_size, "
    "int in_features, ScalarType dtype) -> Tensor",
    packed_embedding,
)
