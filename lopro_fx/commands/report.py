"""`lopro-fx report`: what was done to each layer of a saved folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import lopro_fx
from lopro_fx.commands import output
from lopro_fx.deploy.checkpoint import load


def add(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="written by quantize --out")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def run(args: Namespace) -> None:
    output.check_json_path(args.json)
    report = lopro_fx.report(load(args.folder))
    output.write_result(args.json, report.to_dict())
    output.say(report)
