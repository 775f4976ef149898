"""Read a model and its tokenizer from a GGUF file, or from the parts of one, through transformers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lopro_fx.errors import ModelError

_MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)?", re.IGNORECASE | re.DOTALL)


def is_gguf(file: Path) -> bool:
    """Whether a file begins like a GGUF, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def parts_of(file: Path) -> list[Path]:
    """List all parts of the GGUF that `file` belongs to (`…-00001-of-00003.gguf`), in order.

    Raises:
        ModelError: a part is missing.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    count, suffix = match["count"], match["suffix"] or ""
    parts = [file.with_name(f"{match['stem']}-{index:05}-of-{count}{suffix}") for index in range(1, int(count) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(f"{file}: it is one of {len(parts)} parts, and {', '.join(missing)} is not beside it")
    return parts


def own_type(file: Path) -> torch.dtype:
    """Dtype of the stored matrices: float16 if any is, float32 if all are, else bfloat16, whose range fits any value.

    Vectors don't tell: llama.cpp writes them in fp32 for every model.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {
        tensor.tensor_type for part in parts_of(file) for tensor in GGUFReader(part).tensors if len(tensor.shape) > 1
    }
    if GGMLQuantizationType.F16 in kinds:
        return torch.float16
    return torch.float32 if kinds == {GGMLQuantizationType.F32} else torch.bfloat16


def read_gguf(file: str | Path, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    """Load (model with dequantised weights of `dtype`, tokenizer, transformers' loading info).

    Raises:
        ImportError: transformers or gguf is not installed.
        ModelError: a part is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    parts = parts_of(Path(file).absolute())
    with tempfile.TemporaryDirectory() as folder:
        # transformers reads one file only, and recognises it by its suffix.
        whole = Path(folder) / "model.gguf"
        if len(parts) == 1:
            whole.symlink_to(parts[0])
        else:
            _join(parts, whole)
        source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "gguf_file": whole.name}
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        config = GgufConfig(dequantize=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, trust_remote_code=False, dtype=dtype, quantization_config=config, output_loading_info=True
        )
    model, info = loaded
    return model, tokenizer, info


def _join(parts: Sequence[Path], whole: Path) -> None:
    """Write one file with the metadata of the first part and the tensors of all."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    fields = readers[0].fields
    writer = GGUFWriter(whole, fields["general.architecture"].contents())
    for name, field in fields.items():
        # The reader adds the first kind, the writer has written the second, and the third describes parts.
        if not name.startswith(("GGUF.", "general.architecture", "split.")):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
