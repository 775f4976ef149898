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

# Functions that are neither core nor decomposed.
_MORE = re.compile(
    r"sym_constrain_range(_for_size)?|lift_fresh_copy|detach|view|scatter|angle|addbmm|b?mm"
    r"|sort|searchsorted|bincount|histc|median|nanmedian|mode|kthvalue|unique_(dim|consecutive|dim_consecutive)"
    r"|max|min|aminmax|cummax|cummin|logcumsumexp|index_reduce|nonzero_static"
    r"|repeat_interleave|masked_select|bernoulli|multinomial|rand(n|int)?(_like)?"
    r"|linalg_\w+|fft_\w+|polar|complex|view_as_(complex|real)|triangular_solve|cholesky_solve|polygamma"
    r"|(log_)?normal|cauchy|exponential|geometric|random|poisson|\w+_window"
)
# Names with an underscore are torch's own, and check less: of those, only what models and their decompositions call.
_PRIVATE = re.compile(
    r"_assert_(async|scalar|tensor_metadata)|_to_copy|_(log_)?softmax|_unsafe_(view|index|index_put)|_conj(_physical)?"
    r"|_neg_view|_local_scalar_dense|_shape_as_tensor|_unique2?|_weight_norm(_interface)?|_adaptive_avg_pool[23]d"
    r"|_upsample_\w+|_grouped_mm|_scaled_(grouped_)?mm|_fused_rms_norm|_cdist_forward"
    r"|_native_multi_head_attention|_nested_tensor_from_mask\w*|__(l|r)shift__|__(and|or|xor)__"
)
# What has effects elsewhere, or believes indices, strides or lengths that it is given.
_NEVER = re.compile(
    r"set|resize\w*|from_file|\w*sparse\w*|\w+_unsafe|data|\w*_backward|\w*_out|segment_reduce|as_strided_\w+"
    r"|(native|cudnn|miopen)_batch_norm"
)
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
    if name.startswith("_"):
        return _PRIVATE.fullmatch(name) is not None
    if _MORE.fullmatch(name) or torch.Tag.core in operator.tags or operator in decomposition_table:
        return True
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")
    return bool(operator._schema.returns) and (composed or operator.namespace == "prims")
