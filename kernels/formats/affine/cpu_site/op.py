"""Registration of `lopro::cpu_site`.

It is not composite: a program for a CPU keeps it as one node, so that AOTInductor can call the compiled kernel by its C
function (see `kernels/cpu/aoti.py`). In eager mode the first call on a CPU tensor loads the kernel, which torch's
dispatcher then calls without Python; where there is none, the definition in ATen runs. It has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels import registry
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.cpu.reference import require_activation
from lopro_fx.kernels.formats.affine.cpu_site import reference
from lopro_fx.kernels.formats.affine.cpu_site.reference import require_groups


def cpu_site(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: int, group_size: int, act_bits: int, act_group: int = 0,
) -> Tensor:  # fmt: skip
    """Load the compiled kernel for CPU tensors and call it; elsewhere, or without it, run `reference.cpu_site`."""
    args = (x, perm, signs, block, skip, down, down_scale, codes, scales, zeros, bias, up, up_scale, bits, group_size,
            act_bits, act_group)  # fmt: skip
    require_activation("cpu_site", x, act_bits, act_group)
    require_groups("cpu_site", group_size)
    if x.device.type == "cpu" and native.load():
        return torch.ops.lopro.cpu_site.default(*args)
    return reference.cpu_site(*args)


def _fake(x: Tensor, *args: object) -> Tensor:
    scales = args[7]
    assert isinstance(scales, Tensor)
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


registry.register_opaque(
    "cpu_site(Tensor x, Tensor? perm, Tensor? signs, int block, int skip, Tensor? down, Tensor? down_scale, "
    "Tensor codes, Tensor scales, Tensor zeros, Tensor? bias, Tensor? up, Tensor? up_scale, int bits, int group_size, "
    "int act_bits, int act_group=0) -> Tensor",
    cpu_site,
    _fake,
)
