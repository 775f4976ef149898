"""The unquantised model in bf16 as an engine: transformers with a static cache under torch.compile, or eager."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from benchmarks.serving_child import serve

# Inductor's modes, and "freezing": weights become constants, packed for oneDNN.
MODES = ("eager", "default", "freezing", "max-autotune-no-cudagraphs")


class Bf16:
    """Eager with a growing cache, or the decoding step compiled with a static one, as in transformers' `generate`."""

    def __init__(self, path: str, *, cache: int, mode: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        if mode == "eager":
            self._fresh: Any = lambda: DynamicCache(config=self._model.config)
            self._step: Any = self._logits
            return
        inductor.freezing = mode != "default"
        static = StaticCache(config=self._model.config, max_cache_len=cache)

        def fresh() -> StaticCache:
            static.reset()
            return static

        self._fresh = fresh
        options = mode if mode.startswith("max") else "default"
        self._step = torch.compile(self._logits, mode=options, fullgraph=True, dynamic=False)

    def _logits(self, ids: Tensor, cache: Any) -> Tensor:
        return self._model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()

    def prefill(self, ids: list[int]) -> Any:
        self._cache = self._fresh()
        return self._run(self._logits, ids)

    def decode(self, token: int) -> Any:
        return self._run(self._step, [token])

    def _run(self, step: Any, ids: list[int]) -> Any:
        with torch.no_grad():
            return step(torch.tensor([ids]), self._cache).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--cache", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, default="freezing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(Bf16(args.path, cache=args.cache, mode=args.mode), version=torch.__version__, mode=args.mode)


if __name__ == "__main__":
    main()
