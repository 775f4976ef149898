"""How much a token's error at the output of a Linear matters to the result of the whole program.

The second-order effect of an error e in an output y on the loss is E[(gᵀe)²], with g the gradient of the log-likelihood
(the empirical Fisher matrix). A Gram whose tokens are weighted by |g|² is its best scalar-per-token form (GuidedQuant,
2505.07004, with one group of outputs).

Labels are the next tokens where an integer input has the shape of the logits' positions, as in a language model.
Elsewhere they are drawn from the program's own predictions; that measured worse on a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.errors import CalibrationError
from lopro_fx.passes.sites import Group
from lopro_fx.progress import Progress, silent

# The weight is |g|: with |g|² a few attention-sink tokens are most of some layers' Grams, which generalises worse.
_POWER = 0.5
# Part of the mean below which no token's |g|² falls, so that every direction that was seen stays in the Gram.
_FLOOR = 1e-3


def token_importance(
    program: ExportedProgram,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    seed: int,
    progress: Progress = silent,
) -> dict[str, list[Tensor]]:
    """Weight of every token at every group, from one forward and one backward run of each batch.

    Args:
        program: unquantised; its first floating-point output is taken as logits over its last dimension.
        groups: what to weigh; a group's sites count the same.
        batches: flattened user inputs.
        seed: of the predictions that are drawn where there are no labels.
        progress: called as (batches done, batches, label).

    Returns:
        For each group's name, fp32 (tokens,) for each batch; the mean over all tokens is 1.

    Raises:
        CalibrationError: no output depends on a group, or a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    squared: dict[Node, list[Tensor]] = {site.nodes[0]: [] for group in groups for site in group.sites}
    for index, batch in enumerate(batches):
        for node, gradient in _squared_gradients(program, set(squared), batch, generator).items():
            squared[node].append(gradient)
        progress(index + 1, len(batches), "importance of tokens")
    return {group.name: _weights(group, [squared[site.nodes[0]] for site in group.sites]) for group in groups}


class _Recorder(LockstepRunner):
    """Runs one batch with gradients, and keeps the squared norm of the gradient of every row of the watched outputs."""

    def __init__(self, program: ExportedProgram, batch: Sequence[Any], watched: set[Node]) -> None:
        super().__init__(program, [batch])
        self.found: dict[Node, Tensor] = {}
        self._watched = watched
        # Added to an output, it starts the graph there and leaves the output free for writes in place.
        self._start = torch.zeros((), requires_grad=True)

    def _run(self, node: Node) -> None:
        super()._run(node)
        if node in self._watched:
            values = self._shared if node in self._shared else self._values[0]
            y = values[node] + self._start.to(values[node].dtype)
            self.found[node] = torch.zeros(y.numel() // y.shape[-1])
            # The hook holds the sum alone: with the runner in it, the graph of every batch would live on in a cycle.
            y.register_hook(partial(_add_squared, self.found[node]))
            values[node] = y


def _add_squared(total: Tensor, gradient: Tensor) -> None:
    total += gradient.reshape(-1, gradient.shape[-1]).to(torch.float32).square().sum(-1)


@torch.enable_grad()
def _squared_gradients(
    program: ExportedProgram, watched: set[Node], batch: Sequence[Any], generator: torch.Generator
) -> dict[Node, Tensor]:
    recorder = _Recorder(program, batch, watched)
    (outputs,) = recorder.outputs()
    floating = [
        value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not floating or not floating[0].requires_grad:
        raise CalibrationError(
            "importance='gradient' needs a program whose first floating-point output depends on its Linears; use "
            "importance='none'"
        )
    logits = floating[0].reshape(-1, floating[0].shape[-1]).to(torch.float32)
    # The gradient of the summed cross-entropy, written down: softmax minus one-hot. Logits are large; this is one copy.
    gradient = logits.detach().softmax(-1)
    labels = _next_tokens(batch, floating[0])
    if labels is None:
        labels = torch.multinomial(gradient, 1, generator=generator)
    gradient.scatter_add_(1, labels.clamp_min(0), torch.full(labels.shape, -1.0)).mul_(labels >= 0)
    del outputs, floating
    logits.backward(gradient)
    # One block instead of hundreds of small ones, which would lie in the holes that the next batch needs whole.
    compact = torch.cat(list(recorder.found.values())).split([len(total) for total in recorder.found.values()])
    return dict(zip(recorder.found, compact, strict=True))


def _next_tokens(batch: Sequence[Any], logits: Tensor) -> Tensor | None:
    """Labels (positions, 1) int64, -1 for the last position of a sequence; None where no input can be the tokens."""
    inputs = [value for value in batch if isinstance(value, Tensor) and not value.is_floating_point()]
    tokens = next((value for value in inputs if value.dtype != torch.bool and value.shape == logits.shape[:-1]), None)
    if tokens is None or tokens.dim() < 2 or tokens.shape[-1] < 2 or tokens.max() >= logits.shape[-1]:
        return None
    return torch.nn.functional.pad(tokens[..., 1:].to(torch.int64), (0, 1), value=-1).reshape(-1, 1)


def _weights(group: Group, squared: list[list[Tensor]]) -> list[Tensor]:
    """`squared` holds, for each site, the squared gradient norms (tokens,) of each batch."""
    sizes = [len(batch) for batch in squared[0]]
    total = torch.zeros(sum(sizes))
    for site in squared:
        every = torch.cat(site)
        if not torch.isfinite(every).all():
            raise CalibrationError(f"the gradient at '{group.name}' is not finite; use importance='none' or float32")
        mean = every.mean()
        total += every / mean if mean > 0 else 1.0
    weight = (total / total.mean()).clamp_min(_FLOOR).pow(_POWER)
    return list((weight / weight.mean()).split(sizes))
