from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from lopro_fx.errors import ModelError
from lopro_fx.models import export_causal_lm, export_scorer
from tests.families import VOCAB, causal_lm
from tests.helpers import assert_close, generator
from tests.models.positioned import make


@pytest.fixture(scope="module")
def program(model):
    return export_causal_lm(model)


@pytest.fixture(scope="module")
def scorer(model):
    return export_scorer(model)


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=generator(length))


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (5, 7), (1, 512), (5, 512), (1, 1), (3, 1)])
def test_program_takes_every_batch_and_length(model, program, batch, length):
    ids = _ids(batch, length)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = program.module()(ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_names_are_the_models_own(model, program, scorer):
    names = list(model.state_dict())
    assert list(program.state_dict) == names
    assert list(scorer.state_dict) == names
    linear = next(iter(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    name, _ = list(linear.meta["nn_module_stack"].values())[-1]
    assert f"{name}.weight" in names


def test_program_has_one_input_and_one_output(program):
    assert len(program.graph_signature.user_inputs) == 1
    assert len(program.graph_signature.user_outputs) == 1


def test_weights_are_not_copied(model, program):
    parameters = dict(model.named_parameters())
    assert all(program.state_dict[name].data_ptr() == tensor.data_ptr() for name, tensor in parameters.items())


def test_export_leaves_the_model_as_it_was(model, program):
    ids = _ids(2, 9)
    with torch.no_grad():
        output = model(ids)
    assert output.past_key_values is not None
    assert output.logits.shape == (2, 9, VOCAB)


@pytest.mark.parametrize(("length", "keep"), [(2, [0]), (7, [3, 4, 6]), (8, [0, 0, 7])])
def test_scorer_with_a_causal_mask_is_the_model(model, scorer, length, keep):
    ids = _ids(1, length)
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((1, 1, length, length), lowest).triu(1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0, keep]
        got = scorer.module()(ids, torch.arange(length)[None], mask, torch.tensor(keep))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_scorer_obeys_mask_and_positions(llama):
    """Two branches behind one shared token: the second must not notice what the first holds."""
    scorer = export_scorer(llama).module()
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    mask = torch.zeros(1, 1, 3, 3).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 1]])
    with torch.no_grad():
        one = scorer(torch.tensor([[5, 6, 7]]), positions, mask, torch.tensor([2]))
        other = scorer(torch.tensor([[5, 60, 7]]), positions, mask, torch.tensor([2]))
        alone = llama(torch.tensor([[5, 7]]), use_cache=False).logits[0, 1:]
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt_neo", "bert", "bart", "roberta", "falcon with alibi"])
def test_length_of_a_table_of_positions_bounds_the_sequence(name):
    model = make(name)
    program = export_causal_lm(model)
    longest = {"falcon with alibi": 80, "roberta": 62, "gpt_neo": 63}.get(name, 64)
    for ids in (_ids(1, 1), _ids(2, 9), torch.randint(3, VOCAB, (1, longest), generator=generator())):
        with torch.no_grad():
            assert_close("logits", model(input_ids=ids, use_cache=False).logits, program.module()(ids), 1e-5)
    upper = [size.upper for size in program.range_constraints.values()]
    assert (longest in upper) == (name != "falcon with alibi")


@pytest.mark.parametrize("name", ["falcon", "gpt_neo", "bart", "roberta"])
def test_scorer_gives_its_positions_and_mask_to_every_family(name):
    model = make(name)
    scorer = export_scorer(model).module()
    ids = torch.randint(3, VOCAB, (1, 6), generator=generator())
    mask = torch.full((1, 1, 6, 6), torch.finfo(torch.float32).min).triu(1)
    mask[..., 4:, 2:4] = torch.finfo(torch.float32).min
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    with torch.no_grad():
        got = scorer(ids, positions, mask, torch.tensor([3, 5]))
        one = model(input_ids=ids[:, :4], use_cache=False).logits[0, -1]
        other = model(input_ids=ids[:, [0, 1, 4, 5]], use_cache=False).logits[0, -1]
    assert_close("logits", torch.stack([one, other]), got, 1e-5)


def test_window_that_the_scorer_can_not_replace_bounds_the_sequence():
    scorer = export_scorer(make("gpt_neo")).module()
    ids, mask = torch.ones(1, 7, dtype=torch.int64), torch.zeros(1, 1, 7, 7)
    arguments = torch.arange(7)[None], mask, torch.tensor([0])
    with pytest.raises((AssertionError, RuntimeError), match=r"(<=|< |to be) ?6\b"):
        scorer(ids, *arguments)
    scorer(ids[:, :6], arguments[0][:, :6], mask[..., :6, :6], arguments[2])


def test_range_that_the_model_needs_is_found():
    """BigBird has another attention for long texts; no setting names the length where it begins."""
    config = transformers.BigBirdConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, block_size=8, is_decoder=True,
    )  # fmt: skip
    program = export_causal_lm(transformers.BigBirdForCausalLM(config).eval())
    assert 88 in [size.upper for size in program.range_constraints.values()]


def test_half_precision_model():
    half = causal_lm("llama", torch.bfloat16)
    ids = _ids(2, 6)
    with torch.no_grad():
        assert torch.equal(export_causal_lm(half).module()(ids), half(ids, use_cache=False).logits)
        mask = torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16)
        logits = export_scorer(half).module()(ids[:1], torch.arange(6)[None], mask, torch.tensor([5]))
    assert logits.dtype == torch.bfloat16


def test_model_that_cannot_be_traced():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def forward(self, input_ids, use_cache):
            return self.embed(input_ids) if self.embed(input_ids).sum() > 0 else None

    with pytest.raises(ModelError, match="Branching") as caught:
        export_causal_lm(Branching())
    assert "\n" not in str(caught.value)


def test_reason_of_torch_is_quoted():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(8, 4))

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.table[: input_ids.shape[1]] + self.table)

    with pytest.raises(ModelError, match=r"sequence.*8"):
        export_causal_lm(Fixed())
