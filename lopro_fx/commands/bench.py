"""`lopro-fx bench`: tokens a second, memory and bytes read of a package, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from lopro_fx.commands import output
from lopro_fx.commands.data import positive, whole
from lopro_fx.deploy.package import read_manifest
from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.report.table import render


def add(parser: ArgumentParser) -> None:
    parser.add_argument("package", metavar="FILE.pt2", help="written by lopro_fx.package")
    positive(parser, "--prompt-tokens", 32, "tokens of a prompt")
    positive(parser, "--new-tokens", 64, "decode steps after it")
    positive(parser, "--repeats", 7, "runs, of which medians are shown")
    parser.add_argument("--threads", type=whole, metavar="N", help="threads of torch (default: as torch chooses)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, with every run's seconds")


def run(args: Namespace) -> None:
    output.check_json_path(args.json)
    if Path(args.package).is_dir():
        raise ConfigError(f"{args.package} is a folder: compile it to a package first (lopro_fx.package)")
    manifest = read_manifest(Path(args.package))
    longest, asked = manifest["cache"]["max_cache_len"], args.prompt_tokens + args.new_tokens
    if asked > longest:
        raise ConfigError(f"{args.prompt_tokens} + {args.new_tokens} tokens don't fit the package's cache of {longest}")
    figures = _measure(args)
    result = {"package": args.package, "package_bytes": os.path.getsize(args.package), **figures}
    output.write_result(args.json, {**result, "lopro_fx": manifest["lopro_fx"], "torch": manifest["torch"]})
    output.say(_table(result))


def _measure(args: Namespace) -> dict[str, Any]:
    names = ("package", "prompt_tokens", "new_tokens", "repeats", "threads")
    request = json.dumps({name: getattr(args, name) for name in names})
    environment = dict(os.environ)
    if args.threads is not None:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    # Standard error stays: the child draws its bar there, and what kills it is told there.
    command = [sys.executable, "-m", "lopro_fx.benchmark.child", request]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if child.returncode == 2:
        raise ConfigError(child.stdout)
    if child.returncode:
        raise ModelError(f"{args.package}: the process that ran it ended with status {child.returncode}")
    return json.loads(child.stdout)


def _table(result: dict[str, Any]) -> str:
    memory = f"{result['peak_rss_bytes']:,} bytes, of which {result['rss_before_loading_bytes']:,} before loading"
    read = f"{result['weight_bytes_per_step']:,} bytes of weights, {result['cache_bytes_per_step']:,.0f} of the cache"
    rows = [
        ("package", f"{result['package']}, {result['package_bytes']:,} bytes"),
        ("on", f"{result['device']}, {result['threads']} threads, {result['batch']} rows a step"),
        (f"prefill of {result['prompt_tokens']}", f"{result['prefill_tokens_per_second']:.1f} tokens/s"),
        ("first token after", f"{1e3 * result['first_token_seconds']:.1f} ms"),
        (f"decode of {result['new_tokens']}", f"{result['decode_tokens_per_second']:.1f} tokens/s"),
        ("peak memory", memory),
        ("loaded in", f"{result['load_seconds']:.1f} s"),
        ("read a step", read),
    ]
    if "share_of_memory_limit" in result:
        limit = 1e-9 * result["memory_limit_bytes_per_second"]
        share = f"{limit:.2f} GB/s, of which that is {100 * result['share_of_memory_limit']:.0f} %"
        rows += [("read a second", f"{1e-9 * result['read_bytes_per_second']:.2f} GB"), ("memory limit", share)]
    return render(f"medians of {result['repeats']} runs", ("", ""), rows, width=120)
