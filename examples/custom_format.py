"""A format and a method of one's own: weights that are powers of two, in 4 bits, with a scale a row."""

from dataclasses import dataclass

import torch
from torch import nn

import lopro_fx
from lopro_fx.kernels.formats.base import Format, Packed
from lopro_fx.kernels.formats.registry import register_format
from lopro_fx.layer import Layer
from lopro_fx.methods.base import Method, Solved
from lopro_fx.methods.registry import register_method


class Powers(Format):
    """weight = scale * sign * 2^-exponent. Two codes a byte, each 3 bits of exponent and, above them, the sign."""

    name = "powers"

    def empty(self, shape, spec):
        codes = torch.empty(shape[0], -(-shape[1] // 2), dtype=torch.uint8, device="meta")
        return Packed(self.name, shape, spec, {"codes": codes, "scale": torch.empty(shape[0], device="meta")})

    def dequantize(self, packed, dtype):
        pairs, scale = packed.tensors["codes"], packed.tensors["scale"]
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)[:, : packed.shape[1]]
        return ((1.0 - 2.0 * (codes >> 3)) * torch.exp2(-(codes & 7).float()) * scale.unsqueeze(1)).to(dtype)


@register_method
@dataclass(frozen=True, kw_only=True)
class NearestPower(Method):
    """Rounds each weight's logarithm. Without observers it needs no calibration."""

    name = "nearest-power"

    def solve(self, unit, seen, context):  # noqa: ARG002
        layers = []
        for name, weight in zip(unit.names, unit.weights, strict=True):
            scale = weight.abs().amax(1).float().clamp_min(1e-20)
            exponents = (scale.unsqueeze(1) / weight.abs()).log2().round().clamp(0, 7).to(torch.uint8)
            codes = nn.functional.pad(exponents | (weight < 0).to(torch.uint8) << 3, (0, weight.shape[1] % 2))
            tensors = {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale}
            layers.append(Layer(name, unit.name, Packed("powers", tuple(weight.shape), {}, tensors)))
        return Solved(unit.input(), tuple(layers))


if __name__ == "__main__":
    register_format(Powers())
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 10)).eval(), torch.randn(16, 256)
    program = torch.export.export(model, (x,))
    quantized = lopro_fx.quantize(program, None, NearestPower(act_bits=8))
    print(lopro_fx.report(quantized))
    lopro_fx.save(quantized, "powers")  # a process that loads it registers the format first
    exact, approximate = program.module()(x), lopro_fx.load("powers").module()(x)
    print(f"relative error {((exact - approximate).norm() / exact.norm()).item():.3f}")
