"""Small modules that hold what real ones hold, and how the tests export them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from tests.helpers import generator

VOCAB, WIDTH = 50, 32


class Block(nn.Module):
    """Three Linears that read one tensor, one that reads what they make, and a gated pair."""

    def __init__(self, width: int = WIDTH, hidden: int = 48, bias: bool = False, rms: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5) if rms else nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.o = nn.Linear(width, width, bias=bias)
        self.gate, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.o(functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True))
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Ids (batch, sequence) int64 to logits (batch, sequence, vocabulary).

    `tied` shares the embedding's weight, `rms` takes RMS norms in place of layer norms.
    """

    def __init__(self, tied: bool = True, bias: bool = False, depth: int = 2, rms: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block(bias=bias, rms=rms) for _ in range(depth))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


class Twice(nn.Module):
    """One module applied to two tensors, beside one that reads the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(x)) + self.other(x))


class Nested(nn.Module):
    """Linears inside `torch.no_grad()` and inside autocast, off or on, around one that is outside."""

    def __init__(self, autocast: bool | None) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        mode = torch.no_grad() if self.autocast is None else torch.autocast("cpu", torch.bfloat16, self.autocast)
        with mode:
            y, z = torch.relu(self.inner(x)), x.sum(-1, keepdim=True)
        return self.last(y.to(x.dtype) * z)


class Cached(nn.Module):
    """Adds every call's tokens to a non-persistent buffer in place, then reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.zeros(4, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache.copy_(self.cache + self.key(x))
        return self.out(torch.tanh(self.cache))


class Scaled(nn.Module):
    """Positional, nested and keyword inputs, of which `scale` is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: tuple[Tensor, Tensor], *, mask: Tensor, bias: Tensor) -> Tensor:
        return self.linear(pair[0] * mask + pair[1]) + bias


class Product(nn.Module):
    """`aten.addmm` with a parameter, as GPT-2's Conv1D, and one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH, WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.addmm(self.bias, x, self.weight))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode, its parameters random and repeatable."""
    rng = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * (0.3 if parameter.dim() > 1 else 1.0))
    return module.eval()


def ids(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=generator(seed))


def rows(*lead: int, seed: int = 0) -> Tensor:
    return torch.randn(*lead, WIDTH, generator=generator(seed))


def export(module: nn.Module, *args: Any, dynamic: bool = False, **kwargs: Any) -> ExportedProgram:
    """Export as in inference; `dynamic` frees the first two sizes of the first input."""
    shapes = ({0: Dim("batch", min=1), 1: Dim("sequence", min=1)},) if dynamic else None
    return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


@functools.cache
def _decoder(**options: Any) -> tuple[nn.Module, ExportedProgram]:
    module = seeded(Decoder(**options))
    return module, export(module, ids(), dynamic=True)


def decoder(**options: Any) -> tuple[nn.Module, ExportedProgram]:
    """(module of the caller's own, shared program with dynamic batch and sequence, not to be changed)."""
    module, program = _decoder(**options)
    return copy.deepcopy(module), program


@functools.cache
def tiny_llama(width: int = 64, inner: int = 160) -> nn.Module:
    """A random Llama of transformers with two layers, tied embeddings and a vocabulary of 97; do not change it."""
    from transformers import LlamaConfig, LlamaForCausalLM  # not all that import this file need transformers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
