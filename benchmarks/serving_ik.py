"""ik_llama.cpp as an engine, through the ctypes interface of ik-llama-cpp-python, which its interpreter must have.

`python -m benchmarks.serving_ik FILE.gguf` answers on standard input and output.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import ik_llama_cpp._ctypes_api as ik
import numpy as np

from benchmarks.serving_child import serve


class IkLlama:
    """One sequence, fp16 cache, flash attention, the logits of the last token of each call."""

    def __init__(self, path: str, *, cache: int, threads: int) -> None:
        options = ik.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = ik.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise SystemExit(f"{path}: not loaded, see the output above")
        settings = ik.llama_context_default_params()
        settings.n_ctx = cache
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn = True
        self._context = ik.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"{path}: no context, see the output above")
        self._size = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self._model))
        self._batch = ik.llama_batch_init(cache, 0, 1)
        self._past = 0

    def prefill(self, ids: list[int]) -> np.ndarray:
        ik.llama_kv_cache_clear(self._context)
        self._past = 0
        return self._run(ids)

    def decode(self, token: int) -> np.ndarray:
        return self._run([token])

    def _run(self, ids: list[int]) -> np.ndarray:
        batch = self._batch
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, self._past + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place == len(ids) - 1
        status = ik.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(ids)} tokens")
        self._past += len(ids)
        return np.ctypeslib.as_array(ik.llama_get_logits_ith(self._context, len(ids) - 1), (self._size,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--cache", type=int, default=640)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ik.llama_backend_init()
    engine = IkLlama(args.path, cache=args.cache, threads=args.threads)
    serve(engine, version=version("ik-llama-cpp-python"))


if __name__ == "__main__":
    main()
