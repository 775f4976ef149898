from __future__ import annotations

import pytest
import torch
import transformers

import lopro_fx
from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.models import export_causal_lm
from tests.families import VOCAB, causal_lm
from tests.helpers import assert_close, generator

NEW = 11


def greedy(run: lopro_fx.Generator, ids: torch.Tensor, padding: torch.Tensor | None, count: int) -> torch.Tensor:
    run.reset()
    tokens = [run.prefill(ids, padding).argmax(-1)]
    while len(tokens) < count:
        tokens.append(run.decode(tokens[-1][:, None]).argmax(-1))
    return torch.stack(tokens, 1)


@pytest.fixture(scope="module")
def programs(model):
    return lopro_fx.export_for_generation(model, max_cache_len=24, batch_size=2)


def test_batch_with_left_padding_gives_the_tokens_of_transformers(model, programs):
    ids = torch.randint(3, VOCAB, (2, 6), generator=generator())
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, ids.shape[1] :]
    got = greedy(lopro_fx.Generator.from_programs(programs), ids, (mask == 0).sum(1), NEW)
    assert got.tolist() == expected.tolist()


def test_programs_hold_the_weights_of_the_model(model, programs):
    weights = dict(model.named_parameters(remove_duplicate=False))
    for program in (programs.prefill, programs.decode):
        assert program.state_dict.keys() == weights.keys()
        assert all(tensor.data_ptr() == weights[name].data_ptr() for name, tensor in program.state_dict.items())
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_text_in_two_pieces_is_the_text_in_one(llama):
    run = lopro_fx.Generator.from_programs(lopro_fx.export_for_generation(llama, max_cache_len=16))
    ids = torch.randint(3, VOCAB, (1, 9), generator=generator())
    whole = run.prefill(ids)
    run.reset()
    run.prefill(ids[:, :4])
    pieces = run.prefill(ids[:, 4:])
    assert_close("logits", whole, pieces, 1e-5)
    run.reset()
    run.prefill(ids[:, :8])
    assert_close("logits", whole, run.decode(ids[:, 8:]), 1e-5)
    assert run.tokens == 9


def test_a_long_cache_changes_nothing(llama):
    ids = torch.randint(3, VOCAB, (1, 5), generator=generator())
    short, long = (
        greedy(
            lopro_fx.Generator.from_programs(lopro_fx.export_for_generation(llama, max_cache_len=length)), ids, None, 4
        )
        for length in (8, 200)
    )
    assert short.tolist() == long.tolist()


def test_one_state_fits_both_programs_and_its_tensors_are_shared(llama):
    ids = torch.randint(3, VOCAB, (2, 16), generator=generator(1))
    program = export_causal_lm(llama)
    state = lopro_fx.calibrate(program, [(ids,)], lopro_fx.LoPRo(bits=4, group_size=32, rank=2, refits=0))
    programs = lopro_fx.export_for_generation(llama, max_cache_len=24).map(
        lambda program: lopro_fx.optimize(lopro_fx.apply(program, state))
    )
    for name, tensor in programs.decode.state_dict.items():
        assert tensor is programs.prefill.state_dict[name]
    whole = lopro_fx.apply(program, state).module()
    run = lopro_fx.Generator.from_programs(programs)
    assert_close("prefill", whole(ids[:1, :9])[:, -1], run.prefill(ids[:1, :9]), 1e-5)
    assert_close("decode", whole(ids[:1, :10])[:, -1], run.decode(ids[:1, 9:10]), 1e-5)


def test_bfloat16_keeps_its_type():
    programs = lopro_fx.export_for_generation(causal_lm("llama", torch.bfloat16), max_cache_len=8)
    assert programs.cache.dtype == "bfloat16"
    assert lopro_fx.Generator.from_programs(programs).prefill(torch.tensor([[5, 6]])).dtype == torch.bfloat16


def test_spec_round_trip(llama):
    spec = lopro_fx.export_for_generation(llama, max_cache_len=8).cache
    assert lopro_fx.CacheSpec.from_dict(spec.to_dict()) == spec
    keys, values = spec.allocate()
    assert [tuple(tensor.shape) for tensor in (*keys, *values)] == [(1, 2, 9, 8)] * 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_cache_len": 1}, "max_cache_len=1"),
        ({"max_cache_len": 8, "batch_size": 0}, "batch_size=0"),
        ({"max_cache_len": 10**6}, r"\b1,?000,?000\b"),
    ],
)
def test_refused_sizes(llama, sizes, message):
    with pytest.raises(ConfigError, match=message):
        lopro_fx.export_for_generation(llama, **sizes)


def test_recurrent_layers_are_refused():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="KV cache"):
        lopro_fx.export_for_generation(transformers.MambaForCausalLM(config).eval(), max_cache_len=8)


def test_an_attention_without_masks_is_refused():
    model = causal_lm("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match=r"'flex_attention'.*'sdpa'"):
        lopro_fx.export_for_generation(model, max_cache_len=8)


def test_misuse_of_the_cache_is_an_error(llama):
    run = lopro_fx.Generator.from_programs(lopro_fx.export_for_generation(llama, max_cache_len=6))
    with pytest.raises(ConfigError, match=r"\b7 tokens\b.*cache of 6\b"):
        run.prefill(torch.ones(1, 7, dtype=torch.int64))
    run.prefill(torch.ones(1, 6, dtype=torch.int64))
    with pytest.raises(ConfigError, match="7 tokens"):
        run.decode(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match="padding"):
        run.prefill(torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"\b2 rows\b.*batch size 1\b"):
        run.decode(torch.ones(2, 1, dtype=torch.int64))
