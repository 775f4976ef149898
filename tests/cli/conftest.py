from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lopro_fx import progress
from lopro_fx.cli import main
from lopro_fx.evaluation import builtin_text

# Windows that a small model and a slow machine get through in seconds.
SMALL = ("--seq-len", "32", "--calib-samples", "8", "--eval-windows", "3")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Hugging Face folder: a random Llama of two layers and a tokenizer trained on the built-in text."""
    folder = tmp_path_factory.mktemp("model")
    text = builtin_text()[0][:50_000]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch):
    """How many there are depends on the machine's speed."""
    monkeypatch.setattr(progress, "SECONDS", 1e9)


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: arguments -> (exit code, standard output, standard error)."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def quantized_folder(model_folder, tmp_path_factory):
    """What `quantize --out` wrote for `model_folder`; not to be changed."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    assert main(["quantize", str(model_folder), *SMALL, "--rank", "4", "--out", str(folder)]) == 0
    return folder
