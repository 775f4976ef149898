"""transformers' implementation of experts called "lopro": one product of tokens and experts for each weight.

It reads what transformers' own functions read of a module of experts (`transformers/integrations/moe.py`), gathers no
weights, and can be exported on any device and in any dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "lopro"
# Implementations of transformers that compute the same; another may compute anything.
_SAME = (None, "eager", "batched_mm", "grouped_mm")


def routed_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run tokens through the experts that they are routed to.

    Args:
        self: the module of experts.
        hidden_states: (tokens, width).
        top_k_index: int64 or int32 (tokens, slots), in [0, experts): all experts lie in this process.
        top_k_weights: (tokens, slots).

    Returns:
        (tokens, width) of the dtype of `hidden_states`.
    """
    slots, ids = top_k_index.shape[-1], top_k_index.reshape(-1)
    if self.has_gate:
        y = self._apply_gate(_product(self, "gate_up_proj", hidden_states, ids, slots))
    else:
        y = self.act_fn(_product(self, "up_proj", hidden_states, ids, slots))
    y = _product(self, "down_proj", y, ids, 1)
    # transformers 5.17 has no such norm.
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1).unsqueeze(-1)
    return y.view(hidden_states.shape[0], slots, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _product(experts: Any, key: str, x: Tensor, ids: Tensor, slots: int) -> Tensor:
    """Multiply by a parameter, or by the packed module in its place; (tokens * slots, out_features)."""
    weight = getattr(experts, key)
    if isinstance(weight, Tensor):
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        x = x if x.dtype == weight.dtype else x.to(weight.dtype)
        y = torch.ops.lopro.routed_linear(x, ids, weight, slots)
    else:
        y = weight(x, ids, slots)
    return y + getattr(experts, f"{key}_bias")[ids] if experts.has_bias else y


def register() -> None:
    """Let `experts_implementation="lopro"` choose it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, routed_experts_forward)


def dispatches(module: nn.Module) -> bool:
    """Whether a module is one of experts, whose function transformers looks up by the configuration."""
    forward: Any = type(module).forward
    names = forward.__code__.co_freevars if hasattr(forward, "__code__") else ()
    if "experts_interface" not in names:
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return forward.__closure__[names.index("experts_interface")].cell_contents is ALL_EXPERTS_FUNCTIONS


@contextmanager
def routed_experts_in(model: nn.Module) -> Iterator[None]:
    """Choose it for the model's experts inside the block, in place of transformers' own implementations."""
    found: dict[int, Any] = {id(module.config): module.config for module in model.modules() if dispatches(module)}
    before = [(config, config._experts_implementation) for config in found.values()]
    before = [(config, name) for config, name in before if name in _SAME]
    if before:
        register()
    try:
        for config, _ in before:
            # As a dict, it leaves the configurations inside this one.
            config._experts_implementation = {"": NAME}
        yield
    finally:
        for config, name in before:
            config._experts_implementation = {"": name}
