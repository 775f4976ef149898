"""Left padding, windows and positions: the programs that generate give the logits of the model without cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

import lopro_fx
from lopro_fx.errors import ModelError
from lopro_fx.models.masks import Form, Misuse, check_masks
from tests.families import VOCAB
from tests.helpers import assert_close, generator
from tests.models.positioned import BART, MODELS, make

LENGTHS, STEPS = (5, 9), 4


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


def greedy_without_cache(model: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (1, STEPS) and logits (STEPS, vocabulary)."""
    ids = prompt
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, prompt.shape[1] - 1 :]
        # Ids below 3 mean something to some models.
        ids = torch.cat([ids, logits[:, -1:, 3:].argmax(-1) + 3], 1)
    return ids[:, prompt.shape[1] :], logits[0]


def test_padded_batch_gives_the_logits_of_single_prompts(model):
    runner = lopro_fx.Generator.from_programs(lopro_fx.export_for_generation(model, max_cache_len=24, batch_size=2))
    prompts = [torch.randint(3, VOCAB, (1, length), generator=generator(length)) for length in LENGTHS]
    expected = [greedy_without_cache(model, prompt) for prompt in prompts]
    tokens = torch.cat([tokens for tokens, _ in expected])
    ids = torch.cat([nn.functional.pad(prompt, (max(LENGTHS) - prompt.shape[1], 0), value=1) for prompt in prompts])
    got = [runner.prefill(ids, torch.tensor([max(LENGTHS) - length for length in LENGTHS]))]
    got += [runner.decode(tokens[:, step : step + 1]) for step in range(STEPS - 1)]
    for row, (_, logits) in enumerate(expected):
        assert_close(f"row {row}", logits, torch.stack([step[row] for step in got]), 1e-5)


def test_attention_of_the_process_is_as_before_the_export():
    before = transformers.AttentionInterface()["sdpa"]
    model = make("falcon")
    lopro_fx.export_for_generation(model, max_cache_len=8)
    assert transformers.AttentionInterface()["sdpa"] is before
    assert model.config._attn_implementation == "sdpa"


def _attend(score: Tensor, mask: Tensor, use: str) -> Tensor:
    least = torch.finfo(score.dtype).min
    visible = mask if mask.dtype == torch.bool else mask == 0
    uses = {
        "added": lambda: score + mask,
        "filled": lambda: score.masked_fill(~visible, least),
        "filled where it is visible": lambda: score.masked_fill(visible, least),
        "chosen": lambda: torch.where(visible, score, least),
        "made a number": lambda: score + (1.0 - visible.to(score.dtype)) * least,
        "made a number the wrong way": lambda: score + visible.to(score.dtype) * least,
        "made a boolean": lambda: score.masked_fill(mask.bool(), least),
        "capped later": lambda: 30 * torch.tanh((score + mask) / 30),
        "clamped": lambda: torch.clamp(score + mask, min=least),
        "left out": lambda: score,
    }
    return torch.softmax(uses[use](), -1)


class _Attention(nn.Module):
    """Scores under a mask that is made of `padding`, boolean (True where a query may look) or to be added."""

    def __init__(self, boolean: bool, use: str) -> None:
        super().__init__()
        self.boolean, self.use = boolean, use

    def forward(self, score: Tensor, padding: Tensor) -> Tensor:
        visible = torch.arange(score.shape[-1])[None] >= padding[:, None]
        least = torch.finfo(score.dtype).min
        mask = visible if self.boolean else torch.zeros_like(score).masked_fill(~visible, least)
        return _attend(score, mask, self.use)


CASES = [
    (True, "added", False), (False, "added", True), (True, "filled", True), (False, "filled", True),
    (True, "filled where it is visible", False), (True, "chosen", True), (True, "made a number", True),
    (True, "made a number the wrong way", False), (True, "made a boolean", False), (False, "made a boolean", True),
    (False, "capped later", False), (False, "clamped", True), (True, "left out", False),
]  # fmt: skip


@pytest.mark.parametrize(("boolean", "use", "right"), CASES)
def test_what_becomes_of_a_mask_is_known_from_the_graph(boolean, use, right):
    inputs = (torch.randn(2, 6, generator=generator()), torch.tensor([0, 3]))
    module = _Attention(boolean, use)
    program = torch.export.export(module, inputs, dynamic_shapes=({1: Dim("keys")}, None), strict=False)
    # Right means that nothing is given to the keys that are hidden, and something to the others.
    weights = program.module()(*inputs)
    hides = bool((weights[1, :3] == 0).all() and (weights[1, 3:] > 0).all() and (weights[0] > 0).all())
    assert hides == right
    if right:
        check_masks(program, "padding", Form.VISIBLE, 1)
    else:
        with pytest.raises(Misuse):
            check_masks(program, "padding", Form.VISIBLE, 1)


def test_table_that_counts_padding_is_refused_for_several_rows():
    config = transformers.TrOCRConfig(
        **{**BART, "activation_function": "gelu"}, use_learned_position_embeddings=False, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.TrOCRForCausalLM(config).eval()
    with pytest.raises(ModelError, match="batch_size=1"):
        lopro_fx.export_for_generation(model, max_cache_len=16, batch_size=2)
