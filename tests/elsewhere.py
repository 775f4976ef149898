"""A second device for machines that have none: it computes on the CPU, and refuses what an accelerator would.

Importing this registers the device type for the whole process, so tests use it in processes of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("elsewhere")
ELSEWHERE = torch.device("elsewhere:0")
_CPU = torch.device("cpu")


class _Away(Tensor):
    """A tensor on ELSEWHERE; its data lies in `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> _Away:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=ELSEWHERE,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    away = [value for value in tensors if isinstance(value, _Away)]
    name = func._schema.name
    # As on any accelerator: a tensor of no dimension may come from the CPU, and copies go from one to the other.
    mixed = away and any(value.dim() for value in tensors if not isinstance(value, _Away))
    if mixed and name not in ("aten::_to_copy", "aten::copy_"):
        raise RuntimeError(f"{func}: tensors on two devices")
    generator = kwargs.get("generator")
    device = kwargs.get("device")
    made_away = (ELSEWHERE if away else _CPU) if device is None else torch.device(device)
    if generator is not None and generator.device != made_away:
        raise RuntimeError(f"{func}: a generator on {generator.device} for a tensor on {made_away}")
    inner = {**kwargs, "device": _CPU} if device is not None and made_away.type == ELSEWHERE.type else kwargs
    plain_args, plain_kwargs = tree_map_only(_Away, lambda value: value.held, (args, inner))
    result = func(*plain_args, **plain_kwargs)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # the shape of the tensor itself
            func(*args, **kwargs)
    if made_away.type != ELSEWHERE.type:
        return result
    known = {id(value.held): value for value in away}
    return tree_map_only(Tensor, lambda value: known[id(value)] if id(value) in known else _Away(value), result)


class Placement(TorchDispatchMode):
    """Inside, ELSEWHERE can be used.

    `on_cpu` counts calls that made more than one element on the CPU, by operator; `reads` counts single values that the
    host read from ELSEWHERE, for each of which an accelerator has to finish first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _run(func, args, kwargs or {})
        name = func._schema.name.partition("::")[2]
        self.reads += name == "_local_scalar_dense" and isinstance(args[0], _Away)
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        away = any(isinstance(value, _Away) for value in (*made, *tree_leaves((args, kwargs))))
        if not away and any(value.numel() > 1 and value.device.type == "cpu" for value in made):
            self.on_cpu[name] += 1
        return result


def placed(work: Callable[[], Any]) -> tuple[Any, Placement]:
    """What `work` returns, and where it ran."""
    with Placement() as placement:
        return work(), placement
