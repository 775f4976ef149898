"""`head_bits`: the output projection and a tied embedding on the same codes, through everything that a program goes."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

import lopro_fx
from lopro_fx import GPTQ, RTN, GraphError, LoPRo, QuantState
from lopro_fx.layer import dense_weight, stored_bytes
from lopro_fx.models import export_causal_lm, export_scorer
from lopro_fx.passes.operands import operands
from lopro_fx.passes.record import META
from tests.families import VOCAB, as_stored, causal_lm, family
from tests.helpers import assert_close, generator
from tests.programs import WIDTH, decoder, export, ids, seeded

EMBEDDING, LINEAR = torch.ops.aten.embedding.default, torch.ops.aten.linear.default
LOOKUP, PACKED = torch.ops.lopro.packed_embedding.default, torch.ops.lopro.packed_linear.default
HEAD, TABLE = "lm_head", "model.embed_tokens"
CONFIG = LoPRo(bits=4, group_size=32, rank=2, clip_steps=4, refits=0, head_bits=8)


def _tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=generator(seed))


@functools.cache
def _model(tied: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama of one layer; not to be changed."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@functools.cache
def _case(tied: bool, head_bits: int = 8, dtype: torch.dtype = torch.float32) -> tuple[ExportedProgram, QuantState]:
    """(program, state); shared, not to be changed."""
    program = export_causal_lm(_model(tied, dtype))
    config = LoPRo(**{**vars(CONFIG), "head_bits": head_bits})
    return program, lopro_fx.calibrate(program, [_tokens(2, 16)], config)


def _fake_quantised(model: nn.Module, state: QuantState, family_name: str = "llama") -> nn.Module:
    """The model with every packed weight as a dense one; a tied embedding stays tied."""
    twin = copy.deepcopy(model)
    for name, site in state.layers.items():
        weight = twin.get_parameter(f"{name}.weight")
        weight.data = as_stored(family_name, name, dense_weight(state.inputs[site.input], site)).to(weight.dtype)
    return twin


@torch.no_grad()
def _run(program: ExportedProgram, *args: Any) -> Tensor:
    return program.module()(*args)


def _calls(program: ExportedProgram, target: Any) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("head_bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_fake_quantised_model(tied: bool, head_bits: int) -> None:
    program, state = _case(tied, head_bits)
    result, twin = lopro_fx.apply(program, state), _fake_quantised(_model(tied), state)
    assert (twin.get_submodule(TABLE).weight is twin.get_submodule(HEAD).weight) is tied
    for shape in ((1, 1), (2, 9), (3, 31)):
        with torch.no_grad():
            expected = twin(_tokens(*shape), use_cache=False).logits
        assert_close(f"logits {shape}", expected, _run(result, _tokens(*shape)), 1e-5)


def test_no_name_of_a_tied_table_is_left() -> None:
    program, state = _case(tied=True)
    result = lopro_fx.apply(program, state)
    assert {f"{HEAD}.weight", f"{TABLE}.weight"} <= set(program.state_dict)
    assert not _calls(result, LINEAR)
    assert not _calls(result, EMBEDDING)
    table = (VOCAB, 48)
    assert not [name for name, tensor in result.state_dict.items() if tuple(tensor.shape) == table]
    assert {f"{HEAD}.codes", f"{HEAD}.scales", f"{HEAD}.zeros"} <= set(result.state_dict)
    (lookup,) = _calls(result, LOOKUP)
    (head,) = (node for node in _calls(result, PACKED) if node.meta[META]["site"] == HEAD)
    assert operands(lookup).weights == operands(head).weights, "embedding and projection read different tensors"
    assert lookup.meta[META] == head.meta[META] == {"site": HEAD, "group": HEAD}
    (embedding,) = _calls(program, EMBEDDING)
    for key in ("nn_module_stack", "stack_trace"):
        assert lookup.meta[key] == embedding.meta[key]


def test_an_untied_embedding_stays_as_it_is() -> None:
    program, state = _case(tied=False)
    result = lopro_fx.apply(program, state)
    assert not _calls(result, LINEAR)
    assert len(_calls(result, EMBEDDING)) == 1
    assert not _calls(result, LOOKUP)
    assert torch.equal(result.state_dict[f"{TABLE}.weight"], program.state_dict[f"{TABLE}.weight"])
    assert f"{HEAD}.weight" not in result.state_dict


def test_other_layers_are_as_without_it() -> None:
    (_, state), (_, plain) = _case(tied=True), _case(tied=True, head_bits=0)
    assert set(state.layers) - set(plain.layers) == {HEAD}
    ((name, reason),) = plain.skipped
    assert name == HEAD
    assert "tied" in reason
    assert state.skipped == []
    for name, site in plain.layers.items():
        assert all(torch.equal(state.layers[name].tensors[key], tensor) for key, tensor in site.tensors.items())


def test_the_report_counts_it_once() -> None:
    program, state = _case(tied=True)
    result = lopro_fx.apply(program, state)
    report = lopro_fx.report(result)
    row = report.rows[-1]
    # Codes of 48 columns are padded to 64; 2 groups have a scale of 16 bits and a zero of 8.
    words = -(-VOCAB * 2 // 32) * 8
    assert row["bits_per_weight"] == 8 * (VOCAB * (64 + 2 * 2) + 4 * words) / (VOCAB * 48)
    assert (row["name"], row["method"], row["bits"], row["rank"], row["transform"]) == (HEAD, "rtn", 8, 0, "identity")
    assert 0 < row["relative_loss"] < 1e-4
    assert report.weights == state.weights == sum(math.prod(site.weight.shape) for site in state.layers.values())
    assert report.packed_bytes == state.packed_bytes
    assert report.packed_bytes + report.kept_bytes == stored_bytes(result.state_dict.values())
    explanation = lopro_fx.explain(program, CONFIG)
    assert [line.name for line in explanation.taken] == [row["name"] for row in report.rows]
    rows = lopro_fx.backend_report(result, device="cpu").rows
    assert (rows[-1]["layers"], rows[-1]["shape"], rows[-1]["bits"]) == ([HEAD], [VOCAB, 48], 8)


@pytest.mark.parametrize("tied", [True, False])
def test_state_and_program_survive_a_folder(tied: bool, tmp_path: Path) -> None:
    program, state = _case(tied)
    result = lopro_fx.apply(program, state)
    lopro_fx.save_state(state, tmp_path / "state")
    lopro_fx.save(result, tmp_path / "program")
    again = lopro_fx.apply(program, lopro_fx.load_state(tmp_path / "state"))
    loaded = lopro_fx.load(tmp_path / "program")
    for other in (again, loaded):
        assert torch.equal(_run(other, _tokens(2, 7)), _run(result, _tokens(2, 7)))
        assert lopro_fx.report(other).packed_bytes == lopro_fx.report(result).packed_bytes
        assert len(_calls(other, LOOKUP)) == int(tied)
    with safe_open(tmp_path / "program" / "tensors.safetensors", "pt") as file:
        tables = {name for name in file.keys() if file.get_slice(name).get_shape() == [VOCAB, 48]}  # noqa: SIM118
    assert tables == (set() if tied else {f"{TABLE}.weight"})


def test_a_state_fits_a_program_with_another_head() -> None:
    """The scorer reads chosen positions alone, and has inputs of its own."""
    program, state = _case(tied=True)
    scorer = lopro_fx.apply(export_scorer(_model(tied=True)), state)
    assert not _calls(scorer, EMBEDDING)
    size = 6
    mask = torch.full((size, size), float("-inf")).triu(1)[None, None]
    got = _run(scorer, _tokens(1, size), torch.arange(size)[None], mask, torch.tensor([size - 1]))
    assert_close("last", _run(lopro_fx.apply(program, state), _tokens(1, size))[0, -1:], got, 1e-5)


def test_generation_programs_read_the_same_codes() -> None:
    program, state = _case(tied=True)
    programs = lopro_fx.export_for_generation(_model(tied=True), max_cache_len=12)
    logits = _run(lopro_fx.apply(program, state), _tokens(1, 6))
    keys, values = programs.cache.allocate()
    padding, slots = torch.zeros(1, dtype=torch.int64), torch.arange(6)
    for original, start, stop in ((programs.prefill, 0, 5), (programs.decode, 5, 6)):
        result = lopro_fx.apply(original, state)
        assert len(_calls(result, LOOKUP)) == 1
        assert not _calls(result, EMBEDDING) + _calls(result, LINEAR)
        got = _run(result, _tokens(1, 6)[:, start:stop], torch.tensor([start]), padding, slots, keys, values)
        assert_close(f"token {stop}", logits[:, stop - 1], got, 1e-5)


def test_a_run_continues_from_its_folder(tmp_path: Path) -> None:
    program, state = _case(tied=True)
    for _ in range(2):
        again = lopro_fx.calibrate(program, [_tokens(2, 16)], CONFIG, resume=tmp_path)
        assert list(again.layers) == list(state.layers)
        assert again.layers[HEAD].embedding
        for key, tensor in state.layers[HEAD].tensors.items():
            assert torch.equal(again.layers[HEAD].tensors[key], tensor)
    assert (tmp_path / f"{HEAD}.safetensors").is_file()


def test_passes_keep_it() -> None:
    program, state = _case(tied=True)
    result = lopro_fx.apply(program, state)
    optimised = lopro_fx.optimize(result)
    assert_close("optimised", _run(result, _tokens(2, 7)), _run(optimised, _tokens(2, 7)), 1e-5)
    assert len(_calls(optimised, LOOKUP)) == 1
    notes = {note["what"][0]: note.get("reason") for note in optimised.graph_module.meta[META]["optimized"]
             if note["pass"] == "fuse_site"}  # fmt: skip
    assert all(word in notes[HEAD] for word in ("rotation", "low-rank"))
    decomposed = result.run_decompositions()
    assert not [node for node in decomposed.graph.nodes if "lopro" in str(node.target) and node.op == "call_function"]
    assert_close("decomposed", _run(result, _tokens(2, 7)), _run(decomposed, _tokens(2, 7)), 1e-6)
    with torch.no_grad():
        assert torch.equal(torch.export.unflatten(result)(_tokens(2, 7)), _run(result, _tokens(2, 7)))


def test_one_compiled_graph_serves_every_length() -> None:
    program, state = _case(tied=True)
    module = lopro_fx.optimize(lopro_fx.apply(program, state)).module()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((2, 12), (3, 5)):
            assert_close(str(shape), module(_tokens(*shape)), compiled(_tokens(*shape)), 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_stay_narrow(dtype: torch.dtype) -> None:
    program, state = _case(True, 8, dtype)
    result = lopro_fx.apply(program, state)
    (lookup,) = _calls(result, LOOKUP)
    assert lookup.meta["val"].dtype == dtype
    expected = _fake_quantised(_model(True, dtype), state).double()(_tokens(2, 7), use_cache=False).logits
    got = _run(result, _tokens(2, 7))
    assert got.dtype == dtype
    assert_close("logits", expected, got, 3e-2 if dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("name", ["gemma3", "opt", "gpt2", "falcon"])
def test_other_families(name: str) -> None:
    """Gemma scales what it looked up, OPT has a second embedding; GPT-2 and Falcon have Linears of their own kind."""
    chosen = family(name)
    config = RTN(bits=8, head_bits=8, group_size=32, clip_steps=0)
    state = lopro_fx.calibrate(chosen.program, None, config)
    result = lopro_fx.apply(chosen.program, state)
    assert state.layers[HEAD].embedding
    assert len(_calls(result, LOOKUP)) == 1
    inputs = chosen.inputs(9, 3)
    with torch.no_grad():
        twin = _fake_quantised(causal_lm(name), state, name)
        expected = twin(*inputs, use_cache=False).logits
    assert_close(name, expected, _run(result, *inputs), 2e-5)


def test_nothing_but_the_head() -> None:
    program, _ = _case(tied=True)
    for config in (RTN(include=(), head_bits=8), GPTQ(include=(), head_bits=8)):
        state = lopro_fx.calibrate(program, [_tokens(2, 16)], config)
        assert list(state.layers) == [HEAD]
        assert state.layers[HEAD].weight.spec["group_size"] == 64


def test_exclude_wins() -> None:
    program, _ = _case(tied=True)
    result = lopro_fx.quantize(program, None, RTN(exclude=(HEAD,), head_bits=8))
    assert not _calls(result, LOOKUP)
    assert "excluded" in dict(lopro_fx.report(result).skipped)[HEAD]
    assert f"{HEAD}.weight" in result.state_dict


def test_an_include_that_names_it_wins() -> None:
    program, _ = _case(tied=True)
    state = lopro_fx.calibrate(program, None, RTN(bits=4, include=("*", HEAD), head_bits=8))
    assert (state.layers[HEAD].weight.spec["bits"], state.layers[HEAD].embedding) == (4, False)
    assert len(_calls(lopro_fx.apply(program, state), EMBEDDING)) == 1


def test_a_table_that_a_third_node_reads_is_left() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.lm_head = nn.Linear(WIDTH, 50, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.inner(self.embed(tokens))) / self.embed.weight.norm(dim=1)

    program = export(seeded(Normed()), ids())
    result = lopro_fx.quantize(program, None, RTN(bits=4, head_bits=8))
    (reason,) = (reason for name, reason in lopro_fx.report(result).skipped if name == HEAD)
    assert "'linalg_vector_norm'" in reason
    assert not _calls(result, LOOKUP)
    assert torch.isfinite(_run(result, ids())).all()
    # A state from a program without that reader still fits: the reader keeps the dense table.
    state = lopro_fx.calibrate(program, None, RTN(bits=4))
    ((name, reason),) = state.skipped
    assert name == HEAD
    assert "tied" in reason


def test_a_table_of_which_the_projection_is_a_part_is_left() -> None:
    class Padded(nn.Module):
        table: Tensor
        weight: Tensor

        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(64, WIDTH, generator=generator())
            self.register_buffer("table", whole)
            self.register_buffer("weight", whole[:50])
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, tokens: Tensor) -> Tensor:
            return functional.linear(self.inner(functional.embedding(tokens, self.table)), self.weight)

    result = lopro_fx.quantize(export(Padded(), ids()), None, RTN(bits=4, head_bits=8))
    (reason,) = (reason for _, reason in lopro_fx.report(result).skipped)
    assert "'table'" in reason


@pytest.mark.parametrize("shape", [(2, 5), (1, 1)])
def test_a_head_with_a_bias_and_two_embeddings_of_one_table(shape: tuple[int, int]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(50, WIDTH, padding_idx=0), nn.Linear(WIDTH, WIDTH)
            self.lm_head = nn.Linear(WIDTH, 50)
            self.lm_head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm_head(self.inner(self.embed(tokens)) + self.embed(tokens.flip(1)))

    module = seeded(Twice())
    program = export(module, ids(), dynamic=True)
    state = lopro_fx.calibrate(program, None, RTN(bits=8, head_bits=4))
    result = lopro_fx.apply(program, state)
    assert len(_calls(result, LOOKUP)) == 2
    assert not [name for name in result.state_dict if name in ("embed.weight", "lm_head.weight")]
    with torch.no_grad():
        expected = _fake_quantised(module, state)(ids(*shape))
    assert_close("output", expected, _run(result, ids(*shape)), 1e-5)


def test_nothing_to_take_is_still_an_error() -> None:
    program = decoder(tied=False)[1]
    with pytest.raises(GraphError, match="nothing to quantise"):
        lopro_fx.quantize(program, None, RTN(include=(), exclude=("lm_head",), head_bits=8))
