"""Recognise the modules of transformers that are Linears, whatever their class."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lopro_fx.huggingface.products import PackedLinear


def as_linear(module: nn.Module) -> nn.Linear | None:
    """View the module as an nn.Linear over the same tensors; None if it computes anything else.

    A `Conv1D` of transformers, whose weight is stored as (in_features, out_features), is one over the transpose.
    """
    if _is_conv1d(module):
        linear = nn.Linear(module.nx, module.nf, bias=False, device="meta")  # pyright: ignore[reportArgumentType]
        linear.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)  # pyright: ignore[reportCallIssue]
        linear.register_parameter("bias", module.bias)  # pyright: ignore[reportArgumentType]
        return linear
    return module if isinstance(module, nn.Linear) and _is_plain(module) else None


def stand_in(packed: PackedLinear, module: nn.Module) -> PackedLinear:
    """Return `packed`, which replaces `module`, with a note of how that one stores its weight."""
    packed.transposed = _is_conv1d(module)
    return packed


def restored(packed: PackedLinear, linear: nn.Linear) -> nn.Module:
    """Rebuild the module that `packed` replaced, with the weight and bias of `linear`."""
    if not packed.transposed:
        return linear
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module = Conv1D(linear.out_features, linear.in_features)
    module.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
    module.register_parameter("bias", linear.bias)
    return module


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward


def _is_plain(module: nn.Linear) -> bool:
    """Whether the forward of the module's class is that of nn.Linear, perhaps in other words (`x @ W.T + b`)."""
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    # Tested on a twin with a small weight, since the module's own may be large or not loaded yet.
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__, in_features=2, out_features=3)
    values = torch.linspace(-1, 2, 11, dtype=torch.float32, device="cpu").sin()
    weight, bias, x = values[:6].view(3, 2), None if module.bias is None else values[6:9], values[9:].view(1, 1, 2)
    twin.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight),
        "bias": None if bias is None else nn.Parameter(bias),
    }
    try:
        with torch.no_grad():
            made = kind.forward(twin, x)
    except Exception:  # a forward that needs more than a weight and a bias
        return False
    expected = functional.linear(x, weight, bias)
    return isinstance(made, torch.Tensor) and made.shape == expected.shape and torch.allclose(made, expected)
