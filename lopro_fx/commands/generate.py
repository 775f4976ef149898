"""`lopro-fx generate`: continue a prompt."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from lopro_fx.commands import output
from lopro_fx.commands.data import positive
from lopro_fx.commands.source import add_device, add_model, device_of, open_either
from lopro_fx.errors import CheckpointError, ConfigError
from lopro_fx.generation.generate import generate
from lopro_fx.generation.sampling import Sampler
from lopro_fx.packages.package import load_package
from lopro_fx.passes.to_device import to_device


def add(parser: ArgumentParser) -> None:
    add_model(parser, help="smollm2-135m, a Hugging Face folder or hub name, DIR of quantize --out, or a package .pt2")
    add_device(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    positive(parser, "--max-new-tokens", 64, "most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="draw among the N likeliest (default: 0, all)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among those that together have P (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def run(args: Namespace) -> None:
    if not args.prompt:
        raise ConfigError("the prompt is empty: give at least one character to continue")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is no text in the encoding of this locale: set LC_ALL to a UTF-8 one") from error
    Sampler(args.temperature, args.top_k, args.top_p, args.seed)  # refuses what is out of range before models are read
    model, tokenizer = _open(args)
    output.show(args.prompt)
    generate(
        model,
        tokenizer,
        args.prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stream=output.show,
    )
    output.show("\n")


def _open(args: Namespace) -> tuple[Any, Any]:
    """Open the model to generate with, and its tokenizer."""
    if Path(args.model).suffix != ".pt2":
        source = open_either(args.model, args.dtype)
        return to_device(source.program, device_of(args)), source.tokenizer
    generator = load_package(args.model)
    if generator.tokenizer is None:
        raise CheckpointError(f"{args.model} has no tokenizer, or transformers is missing to read it")
    return generator, generator.tokenizer
