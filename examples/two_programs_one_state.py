"""Calibrate on one export of a model and apply the state to another: here a dynamic batch, and a batch of one row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lopro_fx


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(128), Block(128)).eval()

    # Layers are found by the names of their weights, so any export of the model will do.
    batch = torch.export.Dim("batch", min=1)
    dynamic = torch.export.export(model, (torch.randn(4, 128),), dynamic_shapes=({0: batch},))
    fixed = torch.export.export(model, (torch.randn(1, 128),))

    batches = [torch.randn(64, 128) for _ in range(16)]
    state = lopro_fx.calibrate(dynamic, batches, lopro_fx.LoPRo(bits=3, rank=8))
    print(f"{len(state.layers)} layers, {len(state.inputs)} inputs, {state.bits_per_weight:.2f} bits per weight")
    lopro_fx.save_state(state, "state")

    # A later process, or another program: calibration is not repeated.
    state = lopro_fx.load_state("state")
    many = lopro_fx.apply(dynamic, state).module()
    one = lopro_fx.apply(fixed, state).module()
    with torch.no_grad():
        x = torch.randn(16, 128)
        difference = (many(x)[:1] - one(x[:1])).abs().max().item()
    print(f"largest difference between the two programs {difference:.1e}")


if __name__ == "__main__":
    main()
