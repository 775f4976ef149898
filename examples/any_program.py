"""Quantise a program that is no language model: a small vision-style MLP, with patterns that choose the Linears."""

from __future__ import annotations

import torch
from torch import nn

import lopro_fx


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)).eval()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (torch.randn(4, 256),), dynamic_shapes=({0: batch},))

    # The last layer (module "4") keeps its weights.
    config = lopro_fx.LoPRo(bits=4, rank=8, exclude=("4",))
    print(lopro_fx.explain(program, config))
    quantized = lopro_fx.quantize(program, [torch.randn(64, 256) for _ in range(8)], config)
    print(lopro_fx.report(quantized))

    x = torch.randn(16, 256)
    exact, approximate = program.module()(x), quantized.module()(x)
    print(f"relative error {((exact - approximate).norm() / exact.norm()).item():.4f}")


if __name__ == "__main__":
    main()
