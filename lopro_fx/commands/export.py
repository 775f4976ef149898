"""`lopro-fx export`: turn a saved folder into an AOTInductor package or a Hugging Face folder."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from lopro_fx.commands import output
from lopro_fx.commands.data import positive
from lopro_fx.commands.source import open_checkpoint
from lopro_fx.errors import CheckpointError, ConfigError, ModelError, first_line
from lopro_fx.generation.cache import BITS
from lopro_fx.generation.export import export_for_generation
from lopro_fx.huggingface import save_pretrained
from lopro_fx.huggingface.save import require_replaceable, shard_bytes
from lopro_fx.kernels.activation.delivery import ACTIVATIONS, DEFAULT
from lopro_fx.models import rebuild_model
from lopro_fx.models.quiet import quiet
from lopro_fx.packages.aoti import AotiResult, check_name, export_aoti
from lopro_fx.packages.package import package
from lopro_fx.passes.optimize import optimize
from lopro_fx.progress import reporting
from lopro_fx.quantize import apply
from lopro_fx.state import state_of
from lopro_fx.store.checkpoint import load


def add(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="written by quantize --out")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--package", metavar="FILE.pt2", help="prefill and decode with a KV cache, weights and tokenizer in one file"
    )
    target.add_argument("--aoti", metavar="FILE.pt2", help="the program as it was saved, without a cache")
    target.add_argument(
        "--hf", metavar="FOLDER", help="folder for transformers' from_pretrained, after import lopro_fx"
    )
    parser.add_argument(
        "--max-shard-size", type=_shard, default="5GB", metavar="SIZE", help="of weight files of --hf (default: 5GB)"
    )
    positive(parser, "--max-cache-len", 1024, "tokens that prompt and text may have together")
    positive(parser, "--batch-size", 1, "texts generated together")
    parser.add_argument(
        "--cache-bits", type=int, choices=BITS, default=0,
        help="of keys and values in a package's cache: 8, 4, or 0 to keep the model's dtype (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--activations",
        choices=tuple(ACTIVATIONS),
        default=DEFAULT,
        help="what the CPU kernel reads: rounded to 8 bits, or as it is (default: %(default)s)",
    )


def run(args: Namespace) -> None:
    if args.cache_bits and not args.package:
        raise ConfigError("--cache-bits goes with --package: only a package has a cache of its own")
    if args.hf:
        _save_for_transformers(args)
        return
    check_name(args.package or args.aoti)
    if args.package:
        options = {"max_cache_len": args.max_cache_len, "batch_size": args.batch_size,
                   "activations": args.activations, "cache_bits": args.cache_bits}  # fmt: skip
        result = write_package(args.folder, args.package, **options)
    else:
        # Fewer nodes compute the same and compile in less time.
        with reporting("compile"):
            result = export_aoti(optimize(load(args.folder)), args.aoti)
    output.say(f"{result.path}: {result.bytes:,} bytes ({result.bytes / result.bound:.2f} of what its tensors allow), "
               f"compiled in {result.seconds:.0f} s")  # fmt: skip


def _shard(text: str) -> int:
    try:
        return shard_bytes(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error


def write_package(
    folder: str, path: str, *, max_cache_len: int, batch_size: int, activations: str, cache_bits: int = 0
) -> AotiResult:
    """Compile the model of a folder that `quantize --out` wrote into one package for generation (see `package`).

    Raises:
        CheckpointError, ModelError: the folder doesn't hold a model that can be compiled.
    """
    check_name(path)
    source = open_checkpoint(folder)
    config, _ = _settings(folder)
    with reporting("export"), quiet():
        model = rebuild_model(source.program, config)
        programs = export_for_generation(
            model, max_cache_len=max_cache_len, batch_size=batch_size, cache_bits=cache_bits
        )
    state = state_of(source.program)
    programs = programs.map(lambda program: apply(program, state))
    with reporting("compile"):
        return package(programs, path, source.tokenizer, activations=activations)


def _save_for_transformers(args: Namespace) -> None:
    require_replaceable(Path(args.hf))
    source = open_checkpoint(args.folder)
    config, generation_config = _settings(args.folder)
    with quiet():
        model: Any = rebuild_model(source.program, config)
    model.generation_config = generation_config
    options = {"activations": args.activations, "max_shard_size": args.max_shard_size}
    with reporting("save"):
        save_pretrained(model, state_of(source.program), args.hf, source.tokenizer, **options)
    output.say(f"{args.hf}: import lopro_fx, then AutoModelForCausalLM.from_pretrained({args.hf!r})")


def _settings(folder: str) -> tuple[Any, Any]:
    """Read the configurations of the model and of its generation."""
    for name in ("config.json", "generation_config.json"):
        if not Path(folder, name).is_file():
            raise CheckpointError(f"{folder} doesn't say which model it holds ({name}); quantise again")
    try:
        with quiet():
            from transformers import AutoConfig, GenerationConfig

            return AutoConfig.from_pretrained(folder, trust_remote_code=False), GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises anything on a configuration that it can't read
        raise ModelError(f"{folder}: its configuration can't be read: {first_line(error)}") from error
