"""Perplexity and zero-shot accuracy of SmolLM2-135M at 2 and 3 bits: the table of the README.

Protocol: dequantised fp32 model; calibration on the first 32 x 512 tokens of c4_calib.txt; perplexity of the first 24
windows of 512 tokens of wikitext2_test.txt, no BOS, no overlap, computed by the rewritten program on packed weights;
zero-shot `acc` on the first 400 items of HellaSwag, PIQA, ARC-easy and WinoGrande. Bits per weight count everything
that replaced the weights. "perplexity_int8" is that of the CPU's kernels, which round activations to int8. Rows are
added to the result file as they finish; run with names of rows to redo only those.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

from benchmarks.common import DATA, RESULTS, save_result
from lopro_fx import GPTQ, RTN, LoPRo, Method, QuantState, apply, calibrate, optimize
from lopro_fx.evaluation.perplexity import perplexity
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.evaluation.zeroshot import read_task, zero_shot
from lopro_fx.layer import dense_weight
from lopro_fx.models.export import export_causal_lm, export_scorer
from lopro_fx.models.load import load_model

_LOPRO = LoPRo(rank=19, importance="gradient")
TRELLIS = LoPRo(format="trellis", rank=0, importance="gradient")
ROWS: dict[str, Method] = {
    "rtn-3-g64": RTN(bits=3),
    "gptq-3-g64": GPTQ(bits=3),
    "gptq-3-g64-column": GPTQ(bits=3, act_order="column"),
    "hadamard-3-g32": LoPRo(group_size=32, rank=0, sweeps=0, asymmetry=0),
    "lopro-3-g64": _LOPRO,
    "lopro-3-g64-unweighted": replace(_LOPRO, importance="none"),
    "lopro-3-g64-partial": replace(_LOPRO, transforms=("partial",)),
    "hadamard-2-g32": LoPRo(bits=2, group_size=32, rank=0, sweeps=0, asymmetry=0),
    "lopro-2-g64": replace(_LOPRO, bits=2),
    "lopro-2-g64-unweighted": replace(_LOPRO, bits=2, importance="none"),
    "lopro-3-g64-guard": replace(_LOPRO, transforms=("act_order", "partial", "full")),
    "lopro-2-g64-partial": replace(_LOPRO, bits=2, transforms=("partial",)),
    "trellis-4": replace(TRELLIS, bits=4),
    "trellis-3": TRELLIS,
    "trellis-3-rank16": replace(TRELLIS, rank=16),
    "trellis-2": replace(TRELLIS, bits=2),
    "trellis-2-rank16": replace(TRELLIS, bits=2, rank=16),
    "trellis-2.5": replace(TRELLIS, bits=2.5),
    "trellis-1.5": replace(TRELLIS, bits=1.5),
    "lopro-paper-3-g64": LoPRo.paper(bits=3, group_size=64),
}
# Rounding to nearest by torchao, 3 bits in groups of 64 with 16-bit scales and zeros of 3 bits: what both store.
TORCHAO = "torchao-rtn-3-g64"
TASKS = {
    "hellaswag": "hellaswag_val",
    "piqa": "piqa_valid",
    "arc_easy": "arc_easy_test",
    "winogrande": "winogrande_dev",
}


def dense_program(program: ExportedProgram, state: QuantState) -> Callable[..., Any]:
    """`program` with each weight replaced by the matrix that the packed operators compute with."""
    module = program.module()
    for name, site in state.layers.items():
        # A new parameter, not a copy into the old one: that is the program's own.
        weight = torch.nn.Parameter(dense_weight(state.inputs[site.input], site), requires_grad=False)
        module.get_submodule(name).weight = weight
    return module


def torchao_rounded(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """A copy of the model whose Linears but the output projection hold torchao's 3-bit weights."""
    copied = copy.deepcopy(model)
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int3, granularity=PerGroup(64), mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
    )  # fmt: skip
    quantize_(copied, config, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    return lambda ids: copied(ids, use_cache=False).logits


def tasks(scorer: Callable[..., Any], tokenizer: Any, items: int) -> dict[str, float]:
    """Accuracy and its standard error by task."""
    results = {}
    for name, file in TASKS.items():
        found = zero_shot(scorer, tokenizer, read_task(DATA / f"{file}.jsonl", items))
        results |= {name: found.acc, f"{name}_stderr": found.acc_stderr}
        print(f"  {name}: {found.acc:.4f}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"any of fp32, {TORCHAO}, {', '.join(ROWS)}; default all")
    parser.add_argument(
        "--tasks", nargs="*", default=("fp32", "gptq-3-g64", "lopro-3-g64"), help="rows to run tasks on"
    )
    parser.add_argument("--items", type=int, default=400)
    args = parser.parse_args()

    loaded = load_model("smollm2-135m", torch.float32)
    program = export_causal_lm(loaded.model)
    scorer = export_scorer(loaded.model)
    calibration = token_windows(loaded.tokenizer, read_text(DATA / "c4_calib.txt"), 512, 32)
    windows = token_windows(loaded.tokenizer, read_text(DATA / "wikitext2_test.txt"), 512, 24)

    for name in args.rows or ("fp32", TORCHAO, *ROWS):
        row: dict[str, Any] = {"row": name}
        started = time.perf_counter()
        state = None
        if name == TORCHAO:
            row |= {"bits_per_weight": 3 + (16 + 3) / 64}
            row["perplexity"] = perplexity(torchao_rounded(loaded.model), windows).ppl
        elif name == "fp32":
            row |= {"bits_per_weight": 32.0, "perplexity": perplexity(program.module(), windows).ppl}
        else:
            state = calibrate(program, list(calibration.split(1)), ROWS[name])
            row |= {"config": state.config, "seconds": time.perf_counter() - started}
            row |= {"bits_per_weight": state.bits_per_weight, "packed_bytes": state.packed_bytes}
            quantised = apply(program, state)
            row["perplexity"] = perplexity(quantised.module(), windows).ppl
            rounding = optimize(quantised, target="cpu", activations="int8")
            row["perplexity_int8"] = perplexity(rounding.module(), windows).ppl
        row["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print({key: value for key, value in row.items() if key != "config"}, flush=True)
        if name in args.tasks and name != TORCHAO:
            module = dense_program(scorer, state) if state else scorer.module()
            row |= tasks(module, loaded.tokenizer, args.items)
        # Read again at each row, so that two runs can share the file.
        path = RESULTS / "accuracy.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        save_result("accuracy", list({**done, name: row}.values()), calibration="32x512 c4_calib.txt", items=args.items)


if __name__ == "__main__":
    main()
