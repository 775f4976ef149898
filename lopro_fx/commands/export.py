"""`lopro-fx export`: compile a saved folder to an AOTInductor package."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lopro_fx.commands import output
from lopro_fx.commands.data import positive
from lopro_fx.commands.source import open_checkpoint
from lopro_fx.deploy.aoti import AotiResult, check_name, export_aoti
from lopro_fx.deploy.checkpoint import load
from lopro_fx.deploy.manifest import first_line
from lopro_fx.deploy.package import package
from lopro_fx.errors import CheckpointError, ModelError
from lopro_fx.models import export_for_generation, rebuild_model
from lopro_fx.models.quiet import quiet
from lopro_fx.passes.optimize import optimize
from lopro_fx.quantize import apply
from lopro_fx.state import state_of


def add(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="written by quantize --out")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--package", metavar="FILE.pt2", help="prefill and decode with a KV cache, weights and tokenizer in one file"
    )
    target.add_argument("--aoti", metavar="FILE.pt2", help="the program as it was saved, without a cache")
    positive(parser, "--max-cache-len", 1024, "tokens that prompt and text may have together")
    positive(parser, "--batch-size", 1, "texts generated together")
    parser.add_argument(
        "--activations",
        choices=("int8", "float"),
        default="int8",
        help="what the CPU kernel reads: rounded to 8 bits, or as it is (default: int8)",
    )


def run(args: Namespace) -> None:
    check_name(args.package or args.aoti)
    # Fewer nodes compute the same and compile in less time.
    result = _package(args) if args.package else export_aoti(optimize(load(args.folder)), args.aoti)
    output.say(f"{result.path}: {result.bytes:,} bytes ({result.bytes / result.bound:.2f} of what its tensors allow), "
               f"compiled in {result.seconds:.0f} s")  # fmt: skip


def _package(args: Namespace) -> AotiResult:
    source = open_checkpoint(args.folder)
    if not Path(args.folder, "config.json").is_file():
        raise CheckpointError(f"{args.folder} doesn't say which model it holds (config.json); quantise again")
    try:
        with quiet():
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(args.folder)
    except Exception as error:  # transformers raises anything on a configuration that it can't read
        raise ModelError(f"{args.folder}: its config.json can't be read: {first_line(error)}") from error
    with quiet():
        model = rebuild_model(source.program, config)
        programs = export_for_generation(model, max_cache_len=args.max_cache_len, batch_size=args.batch_size)
    state = state_of(source.program)
    programs = programs.map(lambda program: apply(program, state))
    return package(programs, args.package, source.tokenizer, activations=args.activations)
