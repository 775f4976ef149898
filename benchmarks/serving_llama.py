"""llama.cpp as an engine, through the low-level interface of llama-cpp-python, which its interpreter must have.

`python -m benchmarks.serving_llama serve FILE.gguf` answers on standard input and output;
`python -m benchmarks.serving_llama quantize FROM.gguf TO.gguf Q4_0` runs llama.cpp's own quantiser.
"""

from __future__ import annotations

import argparse
import ctypes
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.serving_child import serve

_log: list[str] = []


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, data: Any) -> None:  # noqa: ARG001
    _log.append(text.decode(errors="replace"))


class LlamaCpp:
    """One sequence, fp16 cache, the logits of the last token of each call."""

    def __init__(self, path: str, *, cache: int, threads: int, flash: bool, repack: bool) -> None:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise SystemExit("".join(_log[-20:]))
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = cache
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = int(flash)
        settings.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit("".join(_log[-20:]))
        self._size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._one = (llama_cpp.llama_token * 1)()

    def prefill(self, ids: list[int]) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        return self._run((llama_cpp.llama_token * len(ids))(*ids), len(ids))

    def decode(self, token: int) -> np.ndarray:
        self._one[0] = token
        return self._run(self._one, 1)

    def _run(self, ids: Any, count: int) -> np.ndarray:
        # A batch of this form follows on what the sequence holds and asks for the logits of its last token only.
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, count))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {count} tokens")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._size,))


def quantize(source: str, target: str, kind: str) -> None:
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)):
        raise SystemExit("".join(_log[-20:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("serve")
    run.add_argument("path")
    run.add_argument("--cache", type=int, default=640)
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--flash", action="store_true")
    run.add_argument("--no-repack", action="store_true")
    make = commands.add_parser("quantize")
    for name in ("source", "target", "kind"):
        make.add_argument(name)
    args = parser.parse_args()
    llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if args.command == "quantize":
        quantize(args.source, args.target, args.kind)
        return
    engine = LlamaCpp(args.path, cache=args.cache, threads=args.threads, flash=args.flash, repack=not args.no_repack)
    serve(
        engine,
        version=llama_cpp.__version__,
        system=llama_cpp.llama_print_system_info().decode().strip(),
        buffers=[line.strip() for line in _log if "buffer size" in line],
    )


if __name__ == "__main__":
    main()
