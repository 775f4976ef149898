"""Small programs that hold what a real one holds: ties, nested modules, constants, caches, dynamic sizes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import lopro_fx

VOCAB = 61


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, False), nn.Linear(width, width)
        # As Hugging Face's rotary frequencies: not saved, and not a cache either.
        self.register_buffer("slopes", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) * self.slopes + torch.tensor([0.25], dtype=x.dtype)
        return x + self.down(torch.sigmoid(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Token ids (B, S) to logits (B, S, vocabulary); the head is tied to the embedding."""

    def __init__(self, width: int = 32, depth: int = 2, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        # A mean over what came before makes logits depend on the whole prefix, as attention does.
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
        x = x + x.cumsum(1) / counts
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Cached(nn.Module):
    """Writes a non-persistent cache through a view, and counts its calls in another."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("cache", torch.zeros(8, width), persistent=False)
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.register_buffer("slopes", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.cache[1:].index_copy_(0, position, self.key(x) * self.slopes)
        self.calls.add_(1)
        return self.out(self.cache.sum(0)) + self.calls


def export_lm(model: nn.Module) -> ExportedProgram:
    shapes = {"input_ids": {0: Dim("batch", min=1), 1: Dim("sequence", min=1)}}
    return torch.export.export(model.eval(), (torch.zeros(2, 8, dtype=torch.int64),), dynamic_shapes=shapes)


def token_ids(batch: int, length: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))


def quantized_lm(dtype: torch.dtype = torch.float32, **sizes: int) -> ExportedProgram:
    torch.manual_seed(0)
    model = LanguageModel(**sizes).to(dtype)
    vocab = model.embed.num_embeddings
    config = lopro_fx.LoPRo(bits=3, group_size=32, rank=4, transforms=("partial",), salient=0, refits=0)
    return lopro_fx.quantize(export_lm(model), [token_ids(4, 16, vocab)], config)


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file of this process, or of one that it starts, can grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())
