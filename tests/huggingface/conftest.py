"""Folders that `save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import lopro_fx
from tests.huggingface.models import VOCAB, case


@pytest.fixture(scope="session", params=["tied", "biased"])
def chosen(request):
    return case(request.param)


@pytest.fixture(scope="session")
def folder(chosen, tmp_path_factory) -> Path:
    """What `save_pretrained` wrote for `chosen`, in several shards; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "model"
    lopro_fx.save_pretrained(chosen.model, chosen.state, path, max_shard_size="8KB", activations="float")
    return path


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory) -> Path:
    """The "tied" case in one shard, with a tokenizer; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "tied"
    chosen = case("tied")
    lopro_fx.save_pretrained(chosen.model, chosen.state, path, _tokenizer(), activations="float")
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<unk>": 0, **{f"w{index}": index for index in range(1, VOCAB)}}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
