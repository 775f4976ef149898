"""Perplexity with keys and values of 8 and 4 bits, and the cache's size: every token is decoded through the cache.

SmolLM2-135M in fp32; the first 12 windows of 512 tokens of wikitext2_test.txt, all windows as rows of one batch, by the
decode program of `export_for_generation`. KL divergence is from the same program with a cache of the model's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.common import DATA, save_result
from lopro_fx import Generator, export_for_generation
from lopro_fx.evaluation.text import read_text, token_windows
from lopro_fx.models.load import load_model

_WINDOWS, _TOKENS = 12, 512


def main() -> None:
    loaded = load_model("smollm2-135m", torch.float32)
    ids = token_windows(loaded.tokenizer, read_text(DATA / "wikitext2_test.txt"), _TOKENS, _WINDOWS)
    sizes = {"max_cache_len": _TOKENS, "batch_size": _WINDOWS}
    generators = {
        bits: Generator.from_programs(export_for_generation(loaded.model, **sizes, cache_bits=bits))
        for bits in (0, 8, 4)
    }
    loss, divergence = dict.fromkeys(generators, 0.0), dict.fromkeys(generators, 0.0)
    for place in range(_TOKENS - 1):
        wanted = None
        for bits, generator in generators.items():
            logits = generator.decode(ids[:, place : place + 1]).to(torch.float32).log_softmax(-1)
            wanted = logits if wanted is None else wanted
            loss[bits] -= logits.gather(1, ids[:, place + 1 : place + 2]).sum().item()
            divergence[bits] += (wanted.exp() * (wanted - logits)).sum().item()
        if place % 64 == 0:
            print(place, {bits: math.exp(total / (_WINDOWS * (place + 1))) for bits, total in loss.items()}, flush=True)
    tokens = _WINDOWS * (_TOKENS - 1)
    rows: list[dict[str, Any]] = [
        {
            "row": f"cache-{bits}",
            "perplexity": math.exp(loss[bits] / tokens),
            "kl": divergence[bits] / tokens,
            "bytes_per_token": generator.cache.bytes_per_token // _WINDOWS,
            "bf16_bytes_per_token": 2 * sum(heads * width for heads, width in (*generator.cache.keys,
                                                                               *generator.cache.values)),
        }
        for bits, generator in generators.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    save_result("cache", rows, text="wikitext2_test.txt, 12 x 512")


if __name__ == "__main__":
    main()
