"""The AOTInductor package of a folder that `lopro-fx quantize --out` wrote: its size, and its tokens elsewhere.

A fresh process, which asserts that it never imported lopro_fx, continues each prompt greedily from the package; so does
the program in eager mode here. Run with `--package` to check a package that exists already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import lopro_fx
from benchmarks.common import save_result
from lopro_fx.models.load import load_model
from lopro_fx.packages.aoti import export_aoti, size_bound

PROMPTS = ("The capital of France is", "In 1969, the first humans", "def fibonacci(n):")
RUN = """
import json, sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
results = []
for ids in torch.load(sys.argv[2], weights_only=True):
    for _ in range(int(sys.argv[3])):
        ids = torch.cat([ids, run(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    results.append(ids[0].tolist())
assert not any(name.startswith("lopro_fx") for name in sys.modules)
print(json.dumps(results))
"""


def continued(program: Any, ids: torch.Tensor, count: int) -> list[int]:
    """Prompt and `count` greedy tokens."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, program(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--package", help="an existing package of this folder")
    parser.add_argument("--model", default="smollm2-135m", help="where the tokenizer comes from")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    tokenizer = load_model(args.model, torch.float32).tokenizer
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    program = lopro_fx.load(args.folder)
    optimized = lopro_fx.optimize(program)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(args.package or Path(folder) / "model.pt2")
        seconds = None if args.package else export_aoti(optimized, package).seconds
        torch.save(prompts, Path(folder) / "prompts.pt")
        command = [sys.executable, "-c", RUN, str(package.resolve()), f"{folder}/prompts.pt", str(args.tokens)]
        run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        size = package.stat().st_size
    there = json.loads(run.stdout.splitlines()[-1])
    here = [continued(program.module(), ids, args.tokens) for ids in prompts]
    rows = [
        {"prompt": text, "tokens_equal": a == b, "text": tokenizer.decode(a)}
        for text, a, b in zip(PROMPTS, here, there, strict=True)
    ]
    report = lopro_fx.report(program)
    figures = {
        "package_bytes": size,
        "bound_bytes": size_bound(optimized),
        "packed_bytes": report.packed_bytes,
        "kept_bytes": report.kept_bytes,
        "compile_seconds": seconds,
    }
    print(json.dumps({**figures, "rows": rows}, indent=1))
    save_result("package", rows, model=args.model, tokens=args.tokens, **figures)


if __name__ == "__main__":
    main()
