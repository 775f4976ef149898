"""Load a package in a process of its own and print its measurements, so that memory counts nothing else.

python -m lopro_fx.benchmark.child '{"package": "model.pt2", "prompt_tokens": 32, …}'
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from lopro_fx.benchmark.bandwidth import read_bandwidth
from lopro_fx.benchmark.memory import peak_rss
from lopro_fx.benchmark.speed import measure_speed
from lopro_fx.errors import LoProError
from lopro_fx.packages.package import load_package
from lopro_fx.progress import reporting


def run(package: str, prompt_tokens: int, new_tokens: int, repeats: int, threads: int | None) -> dict[str, Any]:
    """Load the package, measure it, then the machine's memory.

    Returns:
        JSON: medians and every repeat's seconds, bytes, bytes a second.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    bare, started = peak_rss(), time.perf_counter()
    generator = load_package(package)
    loaded = time.perf_counter() - started
    with reporting("bench") as progress:
        speed = measure_speed(
            generator,
            vocabulary=generator.cache.vocabulary,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            progress=progress,
        )
    peak = peak_rss()
    steps = speed.decode_tokens_per_second / speed.batch
    weights = generator.info["decode_bytes"]
    # Of the cache, each step reads what is in use, its own token included.
    cached = generator.cache.bytes_per_token * (prompt_tokens + (new_tokens + 1) / 2)
    figures = {
        "device": generator.info["device"],
        "threads": torch.get_num_threads(),
        "batch": speed.batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "load_seconds": loaded,
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "first_token_seconds": speed.first_token,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "seconds": {
            "prefill": speed.prefill_seconds,
            "first_token": speed.first_token_seconds,
            "decode": speed.decode_seconds,
        },
        "peak_rss_bytes": peak,
        "rss_before_loading_bytes": bare,
        "weight_bytes_per_step": weights,
        "cache_bytes_per_step": cached,
    }
    if generator.info["device"] != "cpu":
        return figures
    del generator
    limit = read_bandwidth()
    moved = (weights + cached) * steps
    return {**figures, "read_bytes_per_second": moved, "memory_limit_bytes_per_second": limit,
            "share_of_memory_limit": moved / limit}  # fmt: skip


def main() -> int:
    """Print the figures as JSON and return 0; after an error of the user's, print its text and return 2."""
    try:
        sys.stdout.write(json.dumps(run(**json.loads(sys.argv[1]))))
    except LoProError as error:
        sys.stdout.write(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
