from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lopro_fx
from lopro_fx.models import export_causal_lm
from lopro_fx.report.traffic import weight_bytes

_ARGUMENTS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


class Model(nn.Module):
    def __init__(self, words: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.zeros(1000))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float64))
        self.shift = torch.ones(width)

    def forward(self, ids):
        return self.head((self.embed(ids) * self.scale).float() + self.shift)


@given(words=st.integers(2, 40), width=st.integers(1, 30), tokens=st.integers(1, 5), tied=st.booleans())
def test_rows_of_a_table_and_all_of_a_matrix(words, width, tokens, tied):
    program = torch.export.export(Model(words, width, tied), (torch.zeros(1, tokens, dtype=torch.int64),))
    rest = 4 * words * width + 8 * width + 4 * width  # head, buffer, constant
    looked_up = 0 if tied else min(tokens, words) * 4 * width
    assert weight_bytes(program) == rest + looked_up


def test_number_of_rows_that_is_not_known_counts_the_table():
    shapes = {"ids": {1: torch.export.Dim("tokens", min=2, max=64)}}
    program = torch.export.export(Model(9, 4, False), (torch.zeros(1, 3, dtype=torch.int64),), dynamic_shapes=shapes)
    assert weight_bytes(program) == 2 * 4 * 9 * 4 + 12 * 4


def _quantized(head_bits: int):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, tie_word_embeddings=True, **_ARGUMENTS)).eval()
    config = lopro_fx.RTN(bits=4, group_size=32, head_bits=head_bits)
    return lopro_fx.quantize(export_causal_lm(model), None, config)


def test_a_quantised_program_reads_all_that_it_holds():
    for head_bits in (0, 4):
        program = _quantized(head_bits)
        report = lopro_fx.report(program)
        frequencies = 4 * 8  # of the rotary embedding: a constant, which the report doesn't list
        assert weight_bytes(program) == report.packed_bytes + report.kept_bytes + frequencies
        assert weight_bytes(lopro_fx.optimize(program)) <= weight_bytes(program)
