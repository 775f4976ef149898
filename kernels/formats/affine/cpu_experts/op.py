"""Registration of `lopro::cpu_experts`, as `lopro::cpu_site` is: one node, called by its C function in packages,
compiled code in eager mode where there is any, and no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels import registry
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.cpu.reference import require_activation
from lopro_fx.kernels.formats.affine.cpu_experts import reference
from lopro_fx.kernels.formats.affine.cpu_site.reference import require_groups


def cpu_experts(
    x: Tensor, ids: Tensor, slots: int, perm: Tensor | None, signs: Tensor | None, block: int, skip: int,
    down: Tensor | None, down_scale: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, up: Tensor | None,
    up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: int, group_size: int, act_bits: int,
    act_group: int = 0,
) -> Tensor:  # fmt: skip
    """Load the compiled kernel for CPU tensors and call it; elsewhere, or without it, run `reference.cpu_experts`."""
    args = (x, ids, slots, perm, signs, block, skip, down, down_scale, codes, scales, zeros, up, up_scale, cells, core,
            bits, group_size, act_bits, act_group)  # fmt: skip
    require_activation("cpu_experts", x, act_bits, act_group)
    require_groups("cpu_experts", group_size)
    if x.device.type == "cpu" and native.load():
        return torch.ops.lopro.cpu_experts.default(*args)
    return reference.cpu_experts(*args)


def _fake(x: Tensor, ids: Tensor, *args: object) -> Tensor:
    scales = args[8]
    assert isinstance(scales, Tensor)
    return x.new_empty((ids.shape[0], scales.shape[1]))


registry.register_opaque(
    "cpu_experts(Tensor x, Tensor ids, int slots, Tensor? perm, Tensor? signs, int block, int skip, Tensor? down, "
    "Tensor? down_scale, Tensor codes, Tensor scales, Tensor zeros, Tensor? up, Tensor? up_scale, Tensor? cells, "
    "Tensor? core, int bits, int group_size, int act_bits, int act_group=0) -> Tensor",
    cpu_experts,
    _fake,
)
