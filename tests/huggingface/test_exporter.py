from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

import lopro_fx
from tests.helpers import TOLERANCE, assert_close
from tests.huggingface.models import CONFIG, case, token_ids

exporters = pytest.importorskip(
    "transformers.exporters.quantizers", reason="transformers is older than 5.23"
).__package__
from transformers.exporters import DynamoConfig, DynamoExporter  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    transformers_logging.set_verbosity(logging.ERROR)
    yield
    transformers_logging.set_verbosity_warning()


def _sample(seed=0, length=16):
    ids = token_ids(2, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_export_with_dynamic_sizes():
    model = case("tied").model
    quantizer = lopro_fx.LoProQuantizer(CONFIG, [_sample(0), _sample(1, 12)])
    config = DynamoConfig(dynamic=True, quantizer=quantizer)
    exported = DynamoExporter().export(model, {**_sample(), "use_cache": False}, config)
    program = exported.components["model"].program
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("lopro.packed_linear.default") == len(quantizer.states[0].layers) == 14
    packed = lopro_fx.pack_model(model, quantizer.states[0], activations="float")
    for length in (16, 5):
        inputs = _sample(3, length)
        logits = program.module()(**inputs)["logits"]
        assert_close("logits", packed(**inputs).logits, logits, TOLERANCE[torch.float32])


def test_components_of_generation_share_what_was_calibrated():
    quantizer = lopro_fx.LoProQuantizer(CONFIG, [_sample(0)])
    generation = GenerationConfig(cache_implementation="static", max_new_tokens=4, eos_token_id=None)
    exported = DynamoExporter().export_for_generation(
        case("tied").model, _sample(), DynamoConfig(quantizer=quantizer), generation_config=generation
    )
    programs = [exported.components[name].program for name in ("prefill", "decode")]
    assert len(quantizer.states) == 1
    for name, site in quantizer.states[0].layers.items():
        for program in programs:
            assert torch.equal(program.state_dict[f"{name}.codes"], site.tensors["codes"])


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match=r"LoProQuantizer.*onnx"):
        lopro_fx.LoProQuantizer(CONFIG).validate_environment("onnx")


@torch.no_grad()
def test_another_checkpoint_in_the_same_place_is_calibrated_anew():
    """Memory of a model is given to the next one, or written when it loads another checkpoint."""
    model = copy.deepcopy(case("tied").model)
    quantizer = lopro_fx.LoProQuantizer(lopro_fx.RTN(bits=4, group_size=32), [_sample(0)])

    def codes():
        exported = DynamoExporter().export(model, {**_sample(), "use_cache": False}, DynamoConfig(quantizer=quantizer))
        program = exported.components["model"].program
        return program.state_dict["model.layers.0.mlp.up_proj.codes"]

    first = codes()
    assert torch.equal(codes(), first)
    assert len(quantizer.states) == 1
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.copy_(weight.flip(0))
    assert not torch.equal(codes(), first)
    model.model.norm.weight.mul_(2)
    codes()
    assert len(quantizer.states) == 3, "what isn't quantised decides activations too"
    quantizer.config = lopro_fx.RTN(bits=3, group_size=32)
    assert codes().shape != first.shape
