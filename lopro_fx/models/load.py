"""Load a causal language model and its tokenizer by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopro_fx.errors import ModelError, first_line
from lopro_fx.models import smollm2
from lopro_fx.models.gguf import is_gguf, own_type, parts_of, read_gguf
from lopro_fx.models.quiet import quiet

SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class LoadedModel:
    """Causal language model in eval mode, its Hugging Face tokenizer, its name and where it came from.

    `stored` is the dtype of the weights in its files if that is bfloat16 or float16, else float32; `file_bytes` is the
    size of those files, None if unknown.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    source: str
    stored: torch.dtype = torch.float32
    file_bytes: int | None = None


def load_model(name: str, dtype: torch.dtype) -> LoadedModel:
    """Load `smollm2-135m`, a folder in the Hugging Face layout, a GGUF file, or a model of the Hugging Face hub.

    Weights are mapped from the file where `dtype` is the stored one, so they cost no memory until they are read.

    Args:
        name: `smollm2-135m`, the path of a folder with `config.json` or of a GGUF file, or `owner/name` on the hub.
        dtype: floating-point type of the weights.

    Raises: ModelError if the name is unknown, the model can't be fetched or read, weights are missing from its files,
        or a package that it needs is not installed.
    """
    try:
        with quiet():
            import transformers  # noqa: F401
    except ImportError as error:
        extra = "demo" if name == SMOLLM2 else "hf"
        raise ModelError(f"{name}: loading it needs transformers: pip install 'lopro_fx[{extra}]'") from error
    source, location = _locate(name)
    path = Path(location)
    try:
        with quiet():
            model, tokenizer, info = (read_gguf if path.is_file() else _read)(location, dtype)
            stored = smollm2.DTYPE if name == SMOLLM2 else own_type(path) if path.is_file() else _stored(location)
    except ModelError:
        raise
    except Exception as error:  # the libraries below raise anything from KeyError to SafetensorError here
        raise ModelError(f"{name}: model or tokenizer can't be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{name}: its files lack {len(missing)} weights, first {missing[0]}: save the model again")
    return LoadedModel(model.eval(), tokenizer, name, source, stored, _file_bytes(name, path))


def _locate(name: str) -> tuple[str, str]:
    """Return (description of the source, location for transformers)."""
    if name == SMOLLM2:
        return f"GGUF Q4_1 of the package {smollm2.REQUIREMENT}, dequantised", str(smollm2.smollm2_folder())
    folder = Path(name).expanduser()
    if folder.is_file():
        try:
            known = is_gguf(folder)
        except OSError as error:
            raise ModelError(f"{name} can't be read: {error.strerror}") from error
        if not known:
            raise ModelError(f"{name}: the file is no GGUF: give one, or the folder that the model is in")
        return f"GGUF {folder.resolve()}, dequantised", str(folder)
    if folder.suffix.lower() == ".gguf":
        raise ModelError(f"{name}: no such file")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: the folder holds no config.json: save the model with save_pretrained")
        return f"folder {folder.resolve()}", str(folder)
    _require_on_hub(name)
    return f"Hugging Face hub, {name}", name


def _read(location: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        location, trust_remote_code=False, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    return model, tokenizer, info


def _stored(location: str) -> torch.dtype:
    """Return the dtype that the configuration names, float32 if it isn't a 16-bit one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return named if named in (torch.bfloat16, torch.float16) else torch.float32


def _file_bytes(name: str, path: Path) -> int | None:
    """Bytes of a model's files; where a folder holds its weights in several forms, those of one."""
    if name == SMOLLM2:
        return smollm2.GGUF_BYTES
    if path.is_file():
        return sum(part.stat().st_size for part in parts_of(path))
    if not path.is_dir():
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
        if not isinstance(found, str):
            return None
        path = Path(found).parent
    files = [file for file in path.iterdir() if file.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix not in (".bin", ".h5", ".msgpack", ".pth", ".gguf", ".onnx")]
    return sum(file.stat().st_size for file in files)


def _require_on_hub(name: str) -> None:
    """Ask the hub once: from_pretrained would retry a misspelt name for half a minute."""
    import huggingface_hub

    choices = f"give {SMOLLM2}, a folder, a GGUF file, or owner/name on the hub"
    try:
        with quiet():
            if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
                huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.HFValidationError as error:
        raise ModelError(f"{name}: neither a folder nor a name that the hub allows: {choices}") from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name}: neither a folder nor a model of the Hugging Face hub: {choices}") from error
    except Exception as error:  # no network: the class depends on the HTTP library of the installed hub client
        raise ModelError(
            f"{name}: not a folder, and the Hugging Face hub can't be asked ({first_line(error)}): {choices}"
        ) from error
