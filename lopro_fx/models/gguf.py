"""Reads a model and its tokenizer from a GGUF file, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_gguf(file: str | Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """(model with dequantised weights of `dtype`, tokenizer, transformers' loading info).

    Raises:
        ImportError: transformers or gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = Path(file)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    config = GgufConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source, dtype=dtype, quantization_config=config, output_loading_info=True
    )
    model, info = loaded
    return model, tokenizer, info
