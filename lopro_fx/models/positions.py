"""Positions of a transformers model: how many it has, and how to give tokens theirs."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

_LIMITS = (
    "max_position_embeddings", "max_target_positions", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len",
)  # fmt: skip
_LOOK_UPS = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, torch.ops.aten.linear.default)
_VIEWS = (torch.ops.aten.unsqueeze.default, torch.ops.aten.slice.Tensor, torch.ops.aten.expand.default)
_SPARE = 8  # rows that a table may have beyond the positions of the configuration


def configured_limit(model: Any) -> int | None:
    """Most positions according to the configuration, or None if it names no number."""
    config = model.config.get_text_config(decoder=True)
    values = (getattr(config, name, None) for name in _LIMITS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def table_limit(model: Any) -> int | None:
    """Most tokens that tables of positions and of causal masks have room for, or None where there are no tables."""
    if not hasattr(model, "config") or (limit := configured_limit(model)) is None:
        return None
    tables = [module.num_embeddings for module in _tables(model)]
    # torch.export would specialise on a read of the whole mask, so only parts are allowed.
    limits = [mask.shape[-1] - 1 for mask in _own_masks(model)]
    limits += [limit for size in tables if limit <= size <= limit + _SPARE]
    return max(min(limits) - first_position(model), 2) if limits else None


def own_window(model: nn.Module) -> int | None:
    """Tokens of the narrowest of the model's own masks, which a caller's mask can't widen; None without any."""
    return min((int(mask[..., -1, :].sum()) for mask in _own_masks(model)), default=None)


def first_position(model: nn.Module) -> int:
    """Position of the first token: RoBERTa and its kin count from the row after the one for padding."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if hasattr(module, "create_position_ids_from_input_ids") and isinstance(table, nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


@contextmanager
def positions_given(
    model: Any, parameters: Collection[str], positions: Tensor, in_tables: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Yield keyword arguments that give a forward with these parameters its tokens' positions, int64 (B, S).

    A forward without `position_ids`, as in decoders of encoder-decoder models, counts from the length of the cache.
    With `in_tables`, the model's tables then look up these positions inside the block.
    """
    if "position_ids" in parameters:
        yield {"position_ids": positions + first_position(model)}
        return

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The tables expect one dimension.
        return args, {**kwargs, "position_ids": positions.flatten()}

    def reshape(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.reshape(*positions.shape, -1)

    with ExitStack() as stack:
        for module in _tables(model) if in_tables else ():
            if "position_ids" in inspect.signature(module.forward).parameters:
                stack.callback(module.register_forward_pre_hook(replace, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(reshape).remove)
        yield {}


def table_of_slots(program: ExportedProgram) -> str | None:
    """Name a look-up in a table by a token's slot in the cache, padding included; None if there is none.

    Rows used as factors only don't count: those of a rotary embedding encode distances.

    Args:
        program: with inputs `position` and `padding`, as in `GenerationPrograms`.
    """
    slots: set[Node] = set()
    for node in program.graph.nodes:
        operands = [operand for operand in node.all_input_nodes if operand in slots]
        if node.op == "placeholder" and node.name == "position":
            slots.add(node)
        elif not operands or any(operand.name == "padding" for operand in _origins(node)):
            continue
        elif node.target in _LOOK_UPS and node.args[0] not in slots:
            if not _only_factors(node):
                return node.name
        elif _counts(node.meta.get("val")):
            slots.add(node)
    return None


def _only_factors(node: Node) -> bool:
    return all(
        user.target is torch.ops.aten.mul.Tensor or (user.target not in _SUMS and _only_factors(user))
        for user in node.users
    )


def _origins(node: Node) -> Iterator[Node]:
    """Yield the tensors that the operands are views of."""
    for operand in node.all_input_nodes:
        origin: Any = operand
        while origin.op == "call_function" and origin.target in _VIEWS:
            origin = origin.args[0]
        yield origin


def _counts(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.dtype.is_floating_point and value.dtype != torch.bool
    return isinstance(value, torch.SymInt)


def _own_masks(model: nn.Module) -> Iterator[Tensor]:
    for buffer in model.buffers():
        if buffer.dtype == torch.bool and buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2] > 2:
            yield buffer.flatten(0, -3)[0] if buffer.ndim > 2 else buffer


def _tables(model: nn.Module) -> Iterator[nn.Embedding]:
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in own or own == "wpe"):
            yield module
