"""The types of llama.cpp by its own quantiser with an importance matrix, and their weights dequantised.

Types of blocks of 256 columns fit down_proj alone of SmolLM2-135M (576 and 1536 columns). Its quantiser takes other,
larger types for the rest, which the bits count.
"""

from __future__ import annotations

import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.serving_gguf import LINEARS, write_gguf


def importance_matrix(model: Any, ids: Tensor, path: Path) -> None:
    """Writes the mean squared inputs of every Linear on the windows `ids` (W, S), in llama.cpp's legacy layout."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Module) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            sums[name] = sums.get(name, 0) + inputs[0].detach().flatten(0, -2).double().square().sum(0)

        return linear.register_forward_pre_hook(add)

    hooks = [
        watch(f"blk.{index}.{short}.weight", layer.get_submodule(name))
        for index, layer in enumerate(model.model.layers)
        for name, short in LINEARS.items()
    ]
    with torch.no_grad():
        for window in ids:
            model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(sums)))
        for name, values in sums.items():
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", 1, len(values)) + (values / ids.numel()).numpy().astype(np.float32).tobytes())


def quantised(
    model: Any, kind: str, quantizer: Path, scratch: Path, ids: Tensor
) -> tuple[dict[str, Tensor], int, float]:
    """Weights by the names of transformers, the bytes that they are stored in, and the quantiser's seconds."""
    source, target, matrix = scratch / "f32.gguf", scratch / f"{kind}.gguf", scratch / "importance.dat"
    if not source.exists():
        write_gguf(model, source)
        importance_matrix(model, ids, matrix)
    started = time.perf_counter()
    command = [quantizer, "--imatrix", matrix, source, target, kind, str(torch.get_num_threads())]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    weights, size = {}, 0
    for index, layer in enumerate(model.model.layers):
        for name, short in LINEARS.items():
            tensor = tensors[f"blk.{index}.{short}.weight"]
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            weight = weight.reshape(layer.get_submodule(name).weight.shape)
            if short in ("attn_q", "attn_k"):
                # Undo `serving_gguf._interleaved`.
                weight = weight.unflatten(0, (-1, model.config.head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)
            weights[f"model.layers.{index}.{name}"] = weight.contiguous()
            size += int(tensor.n_bytes)
    return weights, size, seconds
