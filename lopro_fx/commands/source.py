"""Source that a command works on: a model by name, or a folder that lopro_fx wrote."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lopro_fx.devices import available
from lopro_fx.errors import CheckpointError, ConfigError, ModelError, first_line
from lopro_fx.models import LoadedModel, export_causal_lm, load_model
from lopro_fx.models.quiet import quiet
from lopro_fx.progress import reporting
from lopro_fx.store.checkpoint import load
from lopro_fx.store.manifest import MANIFEST

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Program from `input_ids` to logits, its tokenizer, and where both came from.

    `settings` are the model's own configurations, each with `save_pretrained`, where there was a model.
    """

    program: ExportedProgram
    tokenizer: Any
    name: str
    origin: str
    settings: tuple[Any, ...] = ()


def add_model(parser: ArgumentParser, **options: Any) -> None:
    """Add the arguments that `open_model` reads."""
    add_name(parser, **options)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")


def add_name(parser: ArgumentParser, **options: Any) -> None:
    """Add the argument that `load_model` reads."""
    options.setdefault("help", "smollm2-135m, a Hugging Face folder, a GGUF file or a hub name")
    parser.add_argument("model", metavar="MODEL", **options)


def add_device(parser: ArgumentParser) -> None:
    """Add the argument that `device_of` reads."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda|cuda:N",
        help="where to compute; auto takes a CUDA device where there is one (default: auto)",
    )


def device_of(args: Namespace) -> torch.device:
    """Resolve the device given on the command line.

    Raises:
        ConfigError: torch can't compute there.
    """
    try:
        return available(args.device)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


def device_name(device: torch.device) -> str:
    """Name the device and, of a GPU, its model."""
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def open_model(name: str, dtype: str) -> Source:
    """Load and export a model; the model object is dropped, so that its weights are held once.

    Raises:
        ModelError: it can't be loaded or exported.
    """
    with reporting("load the model"):
        loaded = load_model(name, DTYPES[dtype])
    return export(loaded)


def export(loaded: LoadedModel) -> Source:
    """Export a loaded model.

    Raises:
        ModelError: it can't be exported.
    """
    model: Any = loaded.model
    settings = (model.config, model.generation_config)
    with reporting("export"):
        program = export_causal_lm(model)
    return Source(program, loaded.tokenizer, loaded.name, loaded.source, settings)


def is_checkpoint(name: str) -> bool:
    """Whether `name` is a folder that lopro_fx wrote."""
    return (Path(name) / MANIFEST).is_file()


def open_checkpoint(name: str) -> Source:
    """Load a folder that `lopro-fx quantize --out` wrote.

    Raises:
        CheckpointError: it is missing, foreign or damaged, or has no tokenizer.
        ModelError: transformers is not installed.
    """
    with reporting(f"load {name}"):
        program = load(name)
    try:
        with quiet():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ImportError as error:
        raise ModelError(f"{name}: its tokenizer needs transformers: pip install 'lopro_fx[hf]'") from error
    except Exception as error:  # transformers raises anything on a folder without a tokenizer
        raise CheckpointError(f"{name} has no tokenizer that can be read ({first_line(error)})") from error
    return Source(program, tokenizer, name, f"folder {Path(name).resolve()}")


def open_either(name: str, dtype: str) -> Source:
    """Open a folder that lopro_fx wrote, or else a model."""
    return open_checkpoint(name) if is_checkpoint(name) else open_model(name, dtype)
