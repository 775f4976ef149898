"""Which buffers a program writes, and that what is delivered has them clean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lopro_fx.passes.mutation import clean_constants, mutated_buffers
from tests.programs import WIDTH, Cached, decoder, export, rows, seeded


class Views(nn.Module):
    """Writes one buffer through a slice of a view, counts in a persistent one, and only reads the third."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("cache", torch.ones(2, 4, WIDTH), persistent=False)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", torch.arange(WIDTH).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache[1].view(4, WIDTH)[1:].copy_(x[1:])
        self.calls.add_(1)
        return self.linear(self.cache.sum(0) + self.table)


def test_writes_are_found_through_views() -> None:
    program = export(seeded(Views()), rows(4))
    assert mutated_buffers(program) == {"cache", "calls"}
    assert mutated_buffers(program.run_decompositions()) == {"cache", "calls"}
    assert mutated_buffers(export(seeded(Cached()), rows(4))) == {"cache"}
    assert not mutated_buffers(decoder()[1])


def test_writes_are_found_through_lists_of_views() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 4, WIDTH), persistent=False)
            self.register_buffer("other", torch.zeros(2, 4, WIDTH), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            keys, values = self.cache.unbind(0)
            values.copy_(x)
            self.other.max(0)[0].add_(1)
            return keys + values

    assert mutated_buffers(export(Halves(), rows(4))) == {"cache"}


def test_only_written_non_persistent_buffers_are_cleaned() -> None:
    program = export(seeded(Views()), rows(4))
    program.module()(rows(4))
    constants = clean_constants(program)
    assert not constants["cache"].any()
    assert not constants["cache"].requires_grad
    assert torch.equal(constants["table"], torch.arange(WIDTH).float())
    assert "calls" not in constants
