"""`lopro-fx generate`: continue a prompt."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from lopro_fx.commands.data import positive
from lopro_fx.commands.source import add_model, open_either
from lopro_fx.deploy.generate import generate
from lopro_fx.errors import ConfigError


def add(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    positive(parser, "--max-new-tokens", 64, "most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def run(args: Namespace) -> None:
    if not args.prompt:
        raise ConfigError("the prompt is empty: give at least one character to continue")
    source = open_either(args.model, args.dtype)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    show(args.prompt)
    generate(
        source.program,
        source.tokenizer,
        args.prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        stream=show,
    )
    show("\n")
