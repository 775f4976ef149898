"""Quantise a Hugging Face causal language model to 3 bits, compile it, and write an AOTInductor package.

python examples/quantize_and_compile.py [MODEL]      MODEL: a Hugging Face name, a folder, or smollm2-135m
"""

from __future__ import annotations

import sys

import torch

import lopro_fx
from lopro_fx.evaluation.text import builtin_text, token_windows
from lopro_fx.models.export import export_causal_lm
from lopro_fx.models.load import load_model
from lopro_fx.packages.aoti import export_aoti


def main() -> None:
    loaded = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", torch.float32)
    program = export_causal_lm(loaded.model)
    print(lopro_fx.explain(program))

    text, _ = builtin_text()
    batches = token_windows(loaded.tokenizer, text, seq_len=512, max_windows=32).split(1)
    quantized = lopro_fx.quantize(program, batches, lopro_fx.LoPRo(bits=3, importance="gradient"))
    print(lopro_fx.report(quantized))
    lopro_fx.save(quantized, "quantized")

    compiled = torch.compile(quantized.module(), fullgraph=True, dynamic=True)
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        next_token = compiled(prompt)[0, -1].argmax()
    print(loaded.tokenizer.decode(next_token))

    print(export_aoti(lopro_fx.optimize(quantized), "quantized.pt2"))


if __name__ == "__main__":
    main()
