"""A decoder of any size with a static KV cache, and random packed contents for its Linears."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from lopro_fx import LoPRo, QuantState
from lopro_fx.kernels.formats.affine.packing.format import group_count, pack, packed_words
from lopro_fx.kernels.formats.affine.rounded import affine
from lopro_fx.layer import Factor, Input, Layer, Transform
from lopro_fx.methods.rotation import as_index, largest_block, random_signs
from lopro_fx.passes.sites import find_sites

GROUP, BLOCK = 128, 256


class Size(NamedTuple):
    """Shape of a decoder; `length` is that of its cache."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocab: int
    length: int


SIZES = {"llama-2-7b": Size(32, 4096, 11008, 32, 32000, 256), "tiny": Size(2, 128, 256, 4, 512, 32)}


class Block(nn.Module):
    """Attention and a gated feed-forward part, one token at a time."""

    keys: Tensor
    values: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.before, self.after = nn.RMSNorm(size.width, eps=1e-5), nn.RMSNorm(size.width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (linear(y).view(x.shape[0], 1, self.size.heads, -1).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))  # fmt: skip
        self.keys.index_copy_(2, position, turned(k, cos, sin))
        self.values.index_copy_(2, position, v)
        z = functional.scaled_dot_product_attention(turned(q, cos, sin), self.keys, self.values, attn_mask=mask)
        x = x + self.o(z.transpose(1, 2).reshape(x.shape))
        y = self.after(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Ids (batch, 1) int64 and their position (1,) int64 to logits (batch, 1, vocabulary)."""

    cos: Tensor
    sin: Tensor
    places: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.vocab, size.width)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.lm_head = nn.Linear(size.width, size.vocab, bias=False)
        half = size.width // size.heads // 2
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(size.length, dtype=torch.float32), frequencies).repeat(1, 2)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(self.embed.weight.dtype), persistent=False)
        self.register_buffer("places", torch.arange(size.length), persistent=False)

    def allocate(self, batch: int) -> None:
        """Give every layer an empty cache for `batch` sequences."""
        size, weight = self.size, self.embed.weight
        shape = (batch, size.heads, size.length, size.width // size.heads)
        for layer in self.layers:
            for name in ("keys", "values"):
                layer.register_buffer(name, torch.zeros(shape, dtype=weight.dtype, device=weight.device), False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        mask = (self.places <= position).view(1, 1, 1, -1)
        for layer in self.layers:
            x = layer(x, position, cos, sin, mask)
        return self.lm_head(self.norm(x))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, heads, 1, dimension)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def random_state(program: ExportedProgram, bits: int, rank: int, device: torch.device) -> QuantState:
    """Random packed tensors for every Linear but the output projection; rank 0 leaves the rotation out too.

    Codes keep the spread of the weights that they replace, so activations stay in range.
    """
    inputs, layers, rng = {}, {}, torch.Generator().manual_seed(0)
    for group in find_sites(program).groups:
        width, transform, down = group.in_features, Transform(), None
        if rank:
            perm, signs = as_index(torch.randperm(width, generator=rng)), random_signs(width, rng)
            transform = Transform(perm.to(device), signs.to(device), largest_block(width, BLOCK))
            scale = torch.full((rank,), width**-0.5 / 73, dtype=torch.float16, device=device)
            down = Factor(_factor(rank, width, device), scale, 0)
        readers = tuple(site.name for site in group.sites)
        inputs[group.name] = Input(group.name, readers, width, transform, down)
        for site in group.sites:
            rows, count = site.out_features, group_count(width, GROUP)
            middle = torch.full((rows * count,), (1 << bits - 1) - 1, dtype=torch.int32, device=device)
            words = (rows, packed_words(width, bits))
            weight = affine(
                torch.randint(-(1 << 31), 1 << 31, words, dtype=torch.int32, device=device),
                torch.full((rows, count), width**-0.5 / (1 << bits - 1), dtype=torch.float16, device=device),
                pack(middle, bits), bits, GROUP, width,
            )  # fmt: skip
            up = None
            if rank:
                scale = torch.full((rank,), 1e-3, dtype=torch.float16, device=device)
                up = Factor(_factor(rows, rank, device), scale, 1)
            metrics = {"shape": [rows, width], "bits": bits, "rank": rank}
            layers[site.name] = Layer(site.name, group.name, weight, up, metrics)
    config = LoPRo(bits=bits, group_size=GROUP, rank=rank, transforms=("full" if rank else "identity",))
    return QuantState(config.to_dict(), inputs, layers, info={"random": True})


def _factor(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
