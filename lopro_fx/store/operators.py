"""Operators that a program from a file may call without being trusted.

Allowed is what a model is computed with: operators that passes of this package write, and functions of ATen that are
core, or decompose into those, or are composed of others, with their in-place forms. What is left out has effects
elsewhere (`from_file` maps any file for writing), takes a tensor's memory away (`set_`, `resize_`), or trusts its
operands (`_sparse_*`, launches of kernels).
"""

from __future__ import annotations

import re

import torch
from torch._ops import HigherOrderOperator, OpOverload

from lopro_fx.kernels.formats.registry import OPERATORS

# Checks, and functions that are neither core nor decomposed.
_MORE = re.compile(
    r"_assert_(async|scalar|tensor_metadata)|sym_constrain_range(_for_size)?|lift_fresh_copy|detach"
    r"|sort|searchsorted|bincount|histc|median|nanmedian|mode|kthvalue|unique_(dim|consecutive|dim_consecutive)|_unique2?"
    r"|repeat_interleave|masked_select|bernoulli|multinomial|_grouped_mm|_scaled_(grouped_)?mm|_fused_rms_norm"
    r"|linalg_\w+|segment_reduce|polar|complex|view_as_(complex|real)|_cdist_forward"
    r"|(log_)?normal|cauchy|exponential|geometric|random"
    r"|_(fft|upsample|adaptive|scaled_dot_product|native|embedding|weight_norm|nested_tensor_from_mask)\w*"
)
_NEVER = re.compile(r"set|resize\w*|from_file|_sparse\w*|sparse_\w*unsafe\w*|_\w+_unsafe|data|_backward|\w*_out")
# Operators of programs beside those of formats. What launches a kernel of a GPU reads where its operands say.
_OURS = ("rotate", "project", "round_activation", "routed_linear")
_HIGHER_ORDER = frozenset({
    "cond", "while_loop", "scan", "associative_scan", "map_impl", "wrap_with_set_grad_enabled", "wrap_with_autocast",
    "invoke_subgraph", "flex_attention", "out_dtype",
})  # fmt: skip


def is_allowed(operator: OpOverload | HigherOrderOperator) -> bool:
    """Whether a program that nobody vouches for may call it."""
    if isinstance(operator, HigherOrderOperator):
        return operator.name() in _HIGHER_ORDER
    if operator.namespace == "lopro":
        return operator in OPERATORS or operator._opname in _OURS or operator._opname.endswith("_experts_loop")
    return operator.namespace in ("aten", "prims") and _computes(operator)


def _computes(operator: OpOverload) -> bool:
    from torch._decomp import decomposition_table  # takes seconds to import

    name: str = operator._opname
    if name.endswith("_") and not name.endswith("__"):
        plain = getattr(getattr(torch.ops, operator.namespace), name[:-1], None)
        return plain is not None and any(_computes(getattr(plain, each)) for each in plain.overloads())
    if operator._schema.is_mutable or _NEVER.fullmatch(name):
        return False
    if _MORE.fullmatch(name) or torch.Tag.core in operator.tags or operator in decomposition_table:
        return True
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    return bool(operator._schema.returns) and (composed or operator.namespace == "prims")
