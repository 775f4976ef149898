"""Other quantisers on the protocol of benchmarks/frontier.py: same model, calibration, text and measures.

Each peer's weights are dequantised to fp32 and put into the same model; bits are those of the quantised layers, codes,
scales and zeros counted. Packages are run by an interpreter of their own (--python), llama.cpp's types are made by
`llama-quantize` (--llama-quantize) with an importance matrix of the same calibration. Rows are added to the result
file as they finish.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.accuracy import tasks
from benchmarks.common import DATA, RESULTS, ROOT, save_result
from benchmarks.peers_llama import quantised
from lopro_fx.evaluation.divergence import divergence
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.models.export import export_causal_lm, export_scorer
from lopro_fx.models.load import load_model
from lopro_fx.models.smollm2 import smollm2_folder

# Types whose fallbacks the package gguf can read.
LLAMA = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "Q2_K", "Q3_K_S", "IQ4_NL", "Q4_0")
PACKAGES = tuple(f"{name}-{bits}" for name in ("gptqmodel", "hqq", "autoround") for bits in (2, 3, 4))


def by_package(name: str, python: str, ids: Tensor, scratch: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of `name` by `peers_child`, and what it says of them."""
    torch.save(ids, scratch / "ids.pt")
    out = scratch / f"{name}.safetensors"
    command = [python, "-m", "benchmarks.peers_child", name, str(smollm2_folder()), str(scratch / "ids.pt"), str(out)]
    # Packages leave logs where they run.
    subprocess.run(command, check=True, cwd=scratch, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with safe_open(out, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["found"])  # noqa: SIM118


def _replace(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    for layer, weight in weights.items():
        # A new parameter: the old one is the model's own.
        module.get_submodule(layer).weight = torch.nn.Parameter(weight, requires_grad=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help=f"any of {', '.join((*PACKAGES, *LLAMA))}")
    parser.add_argument("--python", help="interpreter of the packages")
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--items", type=int, default=0, help="of each zero-shot task; 0 runs none")
    args = parser.parse_args()
    loaded = load_model("smollm2-135m", torch.float32)
    original = export_causal_lm(loaded.model).module()
    calibration = token_windows(loaded.tokenizer, read_text(DATA / "c4_calib.txt"), 512, 32)
    windows = token_windows(loaded.tokenizer, read_text(DATA / "wikitext2_test.txt"), 512, 24)
    module = export_causal_lm(loaded.model).module()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            row: dict[str, Any] = {"row": name}
            if name in LLAMA:
                weights, size, seconds = quantised(loaded.model, name, args.llama_quantize, Path(folder), calibration)
                row |= {"bytes": size, "seconds": seconds, "version": "ik_llama.cpp of ik-llama-cpp-python 0.1.5"}
            else:
                weights, found = by_package(name, args.python, calibration, Path(folder))
                row |= found
            _replace(module, weights)
            row["bits_per_weight"] = 8 * row["bytes"] / sum(weight.numel() for weight in weights.values())
            found = divergence(module, original, windows)
            row |= {"layers": len(weights), "perplexity": found.program.ppl, "original": found.original.ppl}
            row |= {
                "kl": found.kl_mean,
                "kl_stderr": found.kl_stderr,
                "top1": found.top1,
                "top1_stderr": found.top1_stderr,
            }
            if args.items:
                scorer = export_scorer(loaded.model).module()
                _replace(scorer, weights)
                row |= tasks(scorer, loaded.tokenizer, args.items)
            print(row, flush=True)
            # Read again at each row, so that two runs can share the file.
            path = RESULTS / "peers.json"
            done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
            save_result("peers", list({**done, name: row}.values()), calibration="32x512 c4_calib.txt")


if __name__ == "__main__":
    main()
