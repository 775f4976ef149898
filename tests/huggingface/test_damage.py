"""A folder whose files are damaged is refused, by the tensor or the file; one that was edited or saved again loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
)

import lopro_fx
from lopro_fx import LoProConfig
from lopro_fx.errors import CheckpointError
from lopro_fx.huggingface.listing import REPORT
from lopro_fx.models.export import export_view
from lopro_fx.store.manifest import sha256
from tests.huggingface.mixtures import OWN_FORM, exported, rounded
from tests.huggingface.models import CONFIG, case, token_ids

UP = "model.layers.0.mlp.up_proj"
STORED = Path(__file__).parents[1] / "stored" / "folder"


@pytest.fixture
def copied(tied_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tied_folder, tmp_path / "copy")


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def _edit(folder: Path, edit: Callable[[dict[str, Any]], object], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def _refused(folder: Path | None, *words: str, kind: Any = AutoModelForCausalLM, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, words))):
        kind.from_pretrained(folder, **options)


def _logits(folder: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options)(token_ids(2, 7)).logits


def test_the_report_lists_every_other_file(tied_folder: Path) -> None:
    files = json.loads((tied_folder / REPORT).read_text())["files"]
    assert files.keys() == {path.name for path in tied_folder.iterdir()} - {REPORT}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    for name, entry in files.items():
        path = tied_folder / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_codes_of_another_dtype(copied: Path, dtype: torch.dtype) -> None:
    _edit(copied, lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].to(dtype)}))
    _refused(copied, f"'{UP}.weight'", "model.safetensors", str(dtype), "torch.int32", "save the model again")


@pytest.mark.parametrize("key", ["scales", "up_scale", "up", "zeros"])
def test_other_tensors_of_another_dtype(copied: Path, key: str) -> None:
    _edit(copied, lambda tensors: tensors.update({f"{UP}.{key}": tensors[f"{UP}.{key}"].float()}))
    _refused(copied, f"'{UP}.{key}'", "torch.float32")


@pytest.mark.parametrize("shape", [lambda codes: codes[:-1], lambda codes: codes.T, lambda codes: codes[0, 0]])
def test_codes_of_another_shape(copied: Path, shape: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"] = shape(tensors[f"{UP}.weight"]).contiguous().clone()

    _edit(copied, edit)
    _refused(copied, f"'{UP}.weight'", "model.safetensors", "not torch.int32 (48, 3)", ignore_mismatched_sizes=True)


def test_tensors_of_a_base_model_are_compared_too(copied: Path) -> None:
    _edit(copied, lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].float()}))
    _refused(copied, f"'{UP}.weight'", "torch.float32", kind=AutoModel)


def test_codes_of_experts_of_another_dtype(tmp_path: Path) -> None:
    lopro_fx.save_pretrained(exported(OWN_FORM)[0], rounded(OWN_FORM), tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    _edit(tmp_path / "model", lambda tensors: tensors.update({name: tensors[name].float()}))
    _refused(tmp_path / "model", f"'{name}'", "torch.float32", "torch.int32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0])
@pytest.mark.parametrize("key", [f"{UP}.scales", f"{UP}.up_scale", "model.layers.0.mlp.gate_proj.input.down_scale"])
def test_scales_that_are_none(copied: Path, key: str, value: float) -> None:
    _edit(copied, lambda tensors: tensors[key].view(-1)[-1].fill_(value))
    _refused(copied, f"'{key}'", str(value))


def test_rows_of_zeros_have_scales_of_zero(copied: Path) -> None:
    _edit(copied, lambda tensors: tensors[f"{UP}.scales"][5].zero_())
    assert torch.isfinite(_logits(copied)).all()


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{UP}.scales", "model.layers.0.mlp.gate_proj.input.perm"])
def test_a_missing_packed_tensor(copied: Path, name: str) -> None:
    _edit(copied, lambda tensors: tensors.pop(name))
    _refused(copied, str(copied), f"'{name}'", "save the model again")
    _refused(copied, f"'{name}'", kind=AutoModelForSequenceClassification)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_norm(copied: Path, name: str, kind: Any) -> None:
    _edit(copied, lambda tensors: tensors.pop(name))
    _refused(copied, f"'{name.removeprefix('model.') if kind is AutoModel else name}'", kind=kind)


def test_a_missing_embedding_is_no_tied_one(copied: Path) -> None:
    _edit(copied, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    _refused(copied, "'lm_head.weight' and 1 more")


def test_a_missing_norm_of_an_offloaded_model(copied: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    _edit(copied, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu")
    options = {"device_map": {**places, "lm_head": "cpu", "model.layers.1": "disk"}, "offload_folder": tmp_path / "off"}
    _refused(copied, "'model.layers.1.input_layernorm.weight'", **options)


def test_a_new_head_is_initialised(copied: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(copied)
    causal = AutoModelForCausalLM.from_pretrained(copied)
    ids = token_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model.model(ids).last_hidden_state, causal.model(ids).last_hidden_state)
    assert torch.isfinite(model.score.weight).all()
    # The head is part of what is saved then.
    model.save_pretrained(copied / "again")
    _edit(copied / "again", lambda tensors: tensors.pop("score.weight"))
    _refused(copied / "again", "'score.weight'", kind=AutoModelForSequenceClassification)


def test_a_new_pooler_is_initialised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = BertForMaskedLM(BertConfig(vocab_size=97, **sizes)).eval()
    plain = type(model).forward
    program = export_view(
        model, lambda self, input_ids: plain(self, input_ids=input_ids).logits, (token_ids(2, 7),), {"input_ids": None}
    )
    state = lopro_fx.calibrate(program, None, lopro_fx.RTN(bits=8, group_size=32))
    lopro_fx.save_pretrained(model, state, tmp_path / "model")
    assert AutoModel.from_pretrained(tmp_path / "model").pooler is not None
    name = "bert.embeddings.LayerNorm.weight"
    _edit(tmp_path / "model", lambda tensors: tensors.pop(name))
    _refused(tmp_path / "model", f"'{name.removeprefix('bert.')}'", kind=AutoModel)


def test_a_state_dict_in_place_of_files(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    ids = token_ids(2, 7)

    def options() -> dict[str, Any]:
        return {"config": AutoConfig.from_pretrained(copied), "state_dict": tensors}

    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(None, **options())(ids).logits, _logits(copied))
    zeros = tensors.pop(f"{UP}.zeros")
    _refused(None, f"'{UP}.zeros'", kind=LlamaForCausalLM, **options())
    tensors[f"{UP}.zeros"] = zeros.long()
    _refused(None, f"'{UP}.zeros'", "torch.int64", kind=LlamaForCausalLM, **options())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _shard(folder: Path, index: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[index]


def test_a_flipped_bit(sharded: Path) -> None:
    assert torch.isfinite(_logits(sharded, quantization_config=LoProConfig(verify=True))).all()
    _flip(_shard(sharded))
    _refused(sharded, _shard(sharded).name, "SHA-256", quantization_config=LoProConfig(verify=True))
    # Other kinds are found without it; this one isn't worth reading every file twice.
    AutoModelForCausalLM.from_pretrained(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    path = _shard(sharded)
    path.write_bytes(path.read_bytes()[:-7])
    _refused(sharded, path.name)


def test_a_shard_in_the_place_of_another(sharded: Path) -> None:
    shutil.copyfile(_shard(sharded, 0), _shard(sharded, 1))
    _refused(sharded, "lack the tensor")


def test_a_shard_of_another_model(tied_folder: Path, copied: Path, tmp_path: Path) -> None:
    chosen = case("tied")
    state = lopro_fx.calibrate(
        chosen.program, [token_ids(2, 16, seed=7)], lopro_fx.LoPRo(**{**vars(CONFIG), "seed": 1})
    )
    lopro_fx.save_pretrained(chosen.model, state, tmp_path / "other", activations="float")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", copied / "model.safetensors")
    assert not torch.equal(_logits(copied), _logits(tied_folder))
    _refused(copied, "model.safetensors", quantization_config=LoProConfig(verify=True))


def test_a_file_of_another_size(copied: Path) -> None:
    _edit(copied, lambda tensors: tensors.update(more=torch.zeros(3)))
    _refused(copied, "model.safetensors", "bytes", quantization_config=LoProConfig(verify=True))


def test_other_files_may_be_edited(copied: Path, tied_folder: Path) -> None:
    (copied / "README.md").write_text("mine")
    (copied / "tokenizer_config.json").unlink()
    for name in ("config.json", "generation_config.json"):
        edited = {**json.loads((copied / name).read_text()), "mine": 1}
        (copied / name).write_text(json.dumps(edited))
    assert torch.equal(_logits(copied, quantization_config=LoProConfig(verify=True)), _logits(tied_folder))


def test_verifying_changes_nothing_that_is_saved(copied: Path, tied_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied, quantization_config=LoProConfig(verify=True))
    assert model.config.quantization_config.activations == "float"
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tied_folder / "config.json").read_bytes()


def test_what_transformers_saved_again_loads(copied: Path, tied_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(tmp_path / "again"), _logits(tied_folder))
    _refused(tmp_path / "again", REPORT, "verify", quantization_config=LoProConfig(verify=True))
    # In the place of what was loaded, beside the report of that.
    model.to(torch.bfloat16).save_pretrained(copied)
    with safe_open(copied / "model.safetensors", "pt") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    assert _logits(copied).dtype == torch.bfloat16
    _refused(copied, "model.safetensors", "bytes", quantization_config=LoProConfig(verify=True))


def test_a_folder_without_hashes_loads() -> None:
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(STORED)(torch.tensor([[1, 2]])).logits).all()
    _refused(STORED, REPORT, "verify", quantization_config=LoProConfig(verify=True))


@pytest.mark.parametrize("report", ["{", "[]", '{"files": 3}', '{"files": {"model.safetensors": {"bytes": 1}}}'])
def test_a_damaged_report_matters_to_verifying_alone(copied: Path, report: str) -> None:
    (copied / REPORT).write_text(report)
    AutoModelForCausalLM.from_pretrained(copied)
    _refused(copied, REPORT, quantization_config=LoProConfig(verify=True))
