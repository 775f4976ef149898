"""`lopro-fx explain`: list the Linears that quantize would take, and why it would skip others."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import lopro_fx
from lopro_fx.commands import output
from lopro_fx.commands.source import add_model, open_model
from lopro_fx.methods.lopro import LoPRo


def add(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--include", action="append", metavar="PATTERN", help="Linears to take (repeatable)")
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="Linears to leave alone (repeatable)")
    parser.add_argument("--head-bits", type=int, default=8, metavar="N", help="as for quantize (default: 8)")


def run(args: Namespace) -> None:
    config = LoPRo(include=tuple(args.include or ("*",)), exclude=tuple(args.exclude or ()), head_bits=args.head_bits)
    output.say(lopro_fx.explain(open_model(args.model, args.dtype).program, config))
