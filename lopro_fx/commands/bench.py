"""`lopro-fx bench`: tokens a second, memory and bytes read of a package, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from lopro_fx.commands import output
from lopro_fx.commands.data import positive, whole
from lopro_fx.commands.export import write_package
from lopro_fx.errors import ConfigError, ModelError
from lopro_fx.kernels.activation.delivery import ACTIVATIONS, DEFAULT
from lopro_fx.packages.package import read_manifest
from lopro_fx.report.table import render


def add(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a package (export --package), or a folder of quantize --out, compiled for this"
    )
    positive(parser, "--prompt-tokens", 32, "tokens of a prompt")
    positive(parser, "--new-tokens", 64, "decode steps after it")
    positive(parser, "--repeats", 7, "runs, of which medians are shown")
    parser.add_argument("--threads", type=whole, metavar="N", help="threads of torch (default: as torch chooses)")
    parser.add_argument("--batch-size", type=whole, metavar="N", help="with a folder: texts together (default: 1)")
    parser.add_argument(
        "--activations",
        choices=tuple(ACTIVATIONS),
        help=f"with a folder: what the CPU kernel reads (default: {DEFAULT})",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, with every run's seconds")


def run(args: Namespace) -> None:
    output.check_json_path(args.json)
    if not Path(args.model).is_dir():
        if args.batch_size is not None or args.activations is not None:
            raise ConfigError("--batch-size and --activations go with a folder; a package has them fixed")
        _bench(args, args.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        write_package(
            args.model, path, max_cache_len=args.prompt_tokens + args.new_tokens, batch_size=args.batch_size or 1,
            activations=args.activations or DEFAULT,
        )  # fmt: skip
        _bench(args, path)


def _bench(args: Namespace, package: str) -> None:
    manifest = read_manifest(Path(package))
    longest, asked = manifest["cache"]["max_cache_len"], args.prompt_tokens + args.new_tokens
    if asked > longest:
        raise ConfigError(f"{args.prompt_tokens} + {args.new_tokens} tokens don't fit the package's cache of {longest}")
    figures = _measure(args, package)
    result = {"model": args.model, "package_bytes": os.path.getsize(package), "activations": manifest["activations"]}
    result |= figures
    versions = {"lopro_fx": manifest["lopro_fx"], "torch": manifest["torch"]}
    output.deliver(args.json, {**result, **versions}, _table(result))


def _measure(args: Namespace, package: str) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeats", "threads")}
    request = json.dumps({"package": package, **settings})
    environment = dict(os.environ)
    if args.threads is not None:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    # Standard error stays: the child draws its bar there, and what kills it is told there.
    command = [sys.executable, "-m", "lopro_fx.benchmark.child", request]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if child.returncode == 2:
        raise ConfigError(child.stdout)
    if child.returncode:
        raise ModelError(f"{args.model}: the process that ran it ended with status {child.returncode}")
    return json.loads(child.stdout)


def _table(result: dict[str, Any]) -> str:
    memory = f"{result['peak_rss_bytes']:,} bytes, of which {result['rss_before_loading_bytes']:,} before loading"
    read = f"{result['weight_bytes_per_step']:,} bytes of weights, {result['cache_bytes_per_step']:,.0f} of the cache"
    rows = [
        ("model", result["model"]),
        ("package", f"{result['package_bytes']:,} bytes, {result['activations']} activations"),
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
