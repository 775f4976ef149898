"""`lopro-fx eval`: perplexity and bits per byte."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from lopro_fx.commands import data, output
from lopro_fx.commands.source import add_model, open_either
from lopro_fx.report.table import render


def add(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--text", metavar="FILE", help=f"text to evaluate on (default: {data.BUILT_IN})")
    data.positive(parser, "--windows", 24, "evaluation windows")
    data.positive(parser, "--seq-len", 512, "tokens in a window")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")


def run(args: Namespace) -> None:
    output.check_json_path(args.json)
    text = data.evaluation_text(args.text)
    source = open_either(args.model, args.dtype)
    windows = text.windows(source.tokenizer, args.seq_len, args.windows)
    result = data.measure("perplexity", source.program, source.tokenizer, windows)
    figures = {"model": source.name, "text": text.name, "windows": len(windows), "seq_len": args.seq_len}
    output.write_result(args.json, {**figures, **asdict(result)})
    rows = [
        ("model", source.name),
        ("text", f"{text.name}, {len(windows)} x {args.seq_len} tokens"),
        ("perplexity", f"{result.ppl:.3f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    output.say(render("evaluation", ("", ""), rows, width=120))
