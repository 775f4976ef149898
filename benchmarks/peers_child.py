"""Quantises a folder of transformers with another package; run by an interpreter that has it, without lopro_fx.

`python -m benchmarks.peers_child NAME FOLDER IDS OUT`: IDS is a file of token ids (W, S) of the calibration; OUT gets
the dequantised weights of the decoder's Linears, and in its metadata the bytes that they are stored in and the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_GROUP = 64
Weights = dict[str, Tensor]


def hqq(model: nn.Module, ids: Tensor, bits: int) -> tuple[Weights, int]:  # noqa: ARG001
    """Half-quadratic quantisation, scales and zeros of groups of 64 in 16 bits; without calibration."""
    from hqq.core.quantize import Quantizer

    weights, size = {}, 0
    for name, linear in _linears(model).items():
        packed, meta = Quantizer.quantize(
            linear.weight.data, nbits=bits, channel_wise=True, group_size=_GROUP, optimize=True, axis=1, device="cpu",
            compute_dtype=torch.float32,
        )  # fmt: skip
        weights[name] = Quantizer.dequantize(packed, meta).to(torch.float32).reshape(linear.weight.shape).contiguous()
        # What the bits are worth: 3 bits are stored ten to a word of 32.
        size += linear.weight.numel() * bits // 8 + 2 * (meta["scale"].numel() + meta["zero"].numel())
    return weights, size


def autoround(model: nn.Module, ids: Tensor, bits: int, iters: int = 200) -> tuple[Weights, int]:
    """AutoRound's default recipe but for the calibration, in groups of 64."""
    from auto_round import AutoRound

    texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    rounder = AutoRound(
        model, None, bits=bits, group_size=_GROUP, sym=False, iters=iters, dataset=texts, nsamples=len(ids),
        seqlen=ids.shape[1], amp=False, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    model, _ = rounder.quantize()
    return _dense(model), _affine_bytes(model, bits)


def gptqmodel(folder: str, ids: Tensor, bits: int) -> tuple[Weights, int]:
    """GPTQ of GPTQModel with its defaults, in groups of 64 with zeros."""
    # Its pool of threads refuses to start with one worker, which is what it takes on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    # Offloaded weights can't be read back, and the zeros of its first format are one less until a file is loaded.
    config = QuantizeConfig(bits=bits, group_size=_GROUP, sym=False, offload_to_disk=False, format="gptq_v2")
    model = GPTQModel.load(folder, config, device="cpu", backend=BACKEND.TORCH)
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    weights, size = {}, 0
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            weights[name] = module.dequantize_weight().T.to(torch.float32).contiguous()
            count = weights[name].numel()
            size += count * bits // 8 + count // _GROUP * (16 + bits) // 8
    return weights, size


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def _dense(model: nn.Module) -> Weights:
    return {name: linear.weight.data.to(torch.float32).contiguous() for name, linear in _linears(model).items()}


def _affine_bytes(model: nn.Module, bits: int) -> int:
    """Codes, a scale of 16 bits and a zero of `bits` for each group."""
    count = sum(linear.weight.numel() for linear in _linears(model).values())
    return count * bits // 8 + count // _GROUP * (16 + bits) // 8


def main() -> None:
    name, folder, ids, out = sys.argv[1:]
    method, bits, *rest = name.split("-")
    tokens = torch.load(ids, weights_only=True)
    started = time.perf_counter()
    if method == "gptqmodel":
        weights, size = gptqmodel(folder, tokens, int(bits))
    else:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        weights, size = (
            hqq(model, tokens, int(bits)) if method == "hqq" else autoround(model, tokens, int(bits), *map(int, rest))
        )
    package = {"autoround": "auto-round"}.get(method, method)
    found = {"bytes": size, "seconds": time.perf_counter() - started, "version": f"{package} {version(package)}"}
    save_file(weights, out, {"found": json.dumps(found)})


if __name__ == "__main__":
    main()
