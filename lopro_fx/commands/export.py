"""`lopro-fx export`: compile a saved folder to an AOTInductor package."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lopro_fx.commands import output
from lopro_fx.deploy.aoti import check_name, export_aoti
from lopro_fx.deploy.checkpoint import load
from lopro_fx.passes.optimize import optimize


def add(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="written by quantize --out")
    parser.add_argument("--aoti", metavar="FILE.pt2", required=True, help="package to write; needs a C++ compiler")


def run(args: Namespace) -> None:
    check_name(args.aoti)
    # Fewer nodes compute the same and compile in less time.
    result = export_aoti(optimize(load(args.folder)), args.aoti)
    output.say(f"{result.path}: {result.bytes:,} bytes ({result.bytes / result.bound:.2f} of what its tensors allow), "
               f"compiled in {result.seconds:.0f} s")  # fmt: skip
