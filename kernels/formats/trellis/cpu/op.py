"""Registration of `lopro::trellis_cpu`, as `lopro::cpu_site` of the affine format is: one node, called by its C
function in packages, compiled code in eager mode where there is any, and no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels import registry
from lopro_fx.kernels.cpu import native
from lopro_fx.kernels.cpu.reference import require_activation
from lopro_fx.kernels.formats.trellis.cpu import reference


def trellis_cpu(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, scales: Tensor, codes: Tensor, bias: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: float, columns: int, window: int, strip: int, act_bits: int, act_group: int = 0,
) -> Tensor:  # fmt: skip
    """Load the compiled kernel for CPU tensors and call it; elsewhere, or without it, run `reference.trellis_cpu`."""
    args = (x, perm, signs, block, skip, down, down_scale, scales, codes, bias, up, up_scale, bits, columns, window,
            strip, act_bits, act_group)  # fmt: skip
    require_activation("trellis_cpu", x, act_bits, act_group)
    if x.device.type == "cpu" and native.load():
        return torch.ops.lopro.trellis_cpu.default(*args)
    return reference.trellis_cpu(*args)


def _fake(x: Tensor, *args: object) -> Tensor:
    scales = args[6]
    assert isinstance(scales, Tensor)
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


registry.register_opaque(
    "trellis_cpu(Tensor x, Tensor? perm, Tensor? signs, int block, int skip, Tensor? down, Tensor? down_scale, "
    "Tensor scales, Tensor codes, Tensor? bias, Tensor? up, Tensor? up_scale, float bits, int columns, int window, "
    "int strip, int act_bits, int act_group=0) -> Tensor",
    trellis_cpu,
    _fake,
)
