"""`lopro-fx report`: list the layers of a saved folder and how each was quantised, or the kernels that they run."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

import lopro_fx
from lopro_fx.commands import output
from lopro_fx.commands.data import above_zero
from lopro_fx.errors import ConfigError
from lopro_fx.store.checkpoint import load

_PROGRAM = "program"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="written by quantize --out")
    parser.add_argument("--backend", choices=("cuda", "cpu"), help="list kernels, bytes and FLOPs on that device")
    parser.add_argument("--tokens", type=_tokens, metavar="N", help="with --backend: tokens of a call (default: 1), or "
                        "'program' for what the program says, which may be any number")  # fmt: skip
    parser.add_argument(
        "--bandwidth", type=above_zero, metavar="GB/s", help="with --backend: add the time at that limit"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def run(args: Namespace) -> None:
    output.check_json_path(args.json)
    if args.backend is None and (args.tokens is not None or args.bandwidth is not None):
        raise ConfigError("--tokens and --bandwidth go with --backend")
    program = load(args.folder)
    if args.backend is None:
        report = lopro_fx.report(program)
    else:
        tokens = None if args.tokens == _PROGRAM else args.tokens or 1
        bandwidth = None if args.bandwidth is None else 1e9 * args.bandwidth
        report = lopro_fx.backend_report(program, tokens=tokens, device=args.backend, bandwidth=bandwidth)
    output.deliver(args.json, report.to_dict(), report)


def _tokens(text: str) -> int | str:
    if text == _PROGRAM:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is neither a number from 1 on nor '{_PROGRAM}'")
    return int(text)
