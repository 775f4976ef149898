"""Rebuild the model that a program was exported from, for another export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from lopro_fx.errors import ModelError


def rebuild_model(program: ExportedProgram, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Make a transformers model that holds the program's tensors.

    Weights that the program holds packed are left unset: the model is for another export, after which `lopro_fx.apply`
    replaces them.

    Args:
        program: quantised, from `quantize`, `apply` or `load`; exported with `export_causal_lm`.
        config: the model's `PreTrainedConfig`.
        dtype: of the model, except what its family keeps in float32; by default that of the program's tensors.

    Raises:
        ModelError: transformers is missing, or the program isn't of such a model.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise ModelError("a model for generation needs transformers: pip install 'lopro_fx[hf]'") from error
    with torch.device("meta"):
        blank: Any = AutoModelForCausalLM.from_config(config)
    own = blank.state_dict()
    kept = {name: tensor for name, tensor in program.state_dict.items() if name in own}
    if not kept or any(own[name].shape != tensor.shape for name, tensor in kept.items()):
        raise ModelError(f"the program was not exported from a model of this configuration ({config.model_type})")
    if dtype is not None:
        wide = [*(blank._keep_in_fp32_modules or ()), *(blank._keep_in_fp32_modules_strict or ())]
        kept = {name: tensor.to(dtype) if tensor.is_floating_point() and not any(part in name for part in wide)
                else tensor for name, tensor in kept.items()}  # fmt: skip
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or next(iter(kept.values())).dtype)
    model.load_state_dict(kept, strict=False, assign=True)
    model.tie_weights()
    return model.eval()
