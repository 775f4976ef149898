"""Importance of an error at a Linear's output to the result of the whole program, by token and by output feature.

The second-order effect of an error e in an output y on the loss is E[(gᵀe)²], with g the gradient of the log-likelihood
(the empirical Fisher matrix). Weights of |g|² on the Gram's tokens, and on the rows of the weights that compete for one
low-rank branch, are its diagonal forms (GuidedQuant, 2505.07004, with one group of outputs).

Labels are the next tokens where an integer input has the shape of the logits' positions, as in a language model.
Elsewhere they are drawn from the program's own predictions; that measured worse on a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from lopro_fx.calibration.padding import Padding, kept
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.errors import CalibrationError
from lopro_fx.methods.base import Method
from lopro_fx.passes.experts import ROUTED
from lopro_fx.passes.sites import Group, Selection
from lopro_fx.progress import Progress, silent

# The weight is |g|: with |g|² a few attention-sink tokens are most of some layers' Grams, which generalises worse.
_POWER = 0.5
# Floor of a token's |g|², as a part of the mean: without it, directions that were seen would drop out of the Gram.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Importance:
    """Weights with mean 1: `tokens`, fp32 (tokens,) for each batch, and `rows`, fp32 (out_features of all layers,)."""

    tokens: list[Tensor]
    rows: Tensor


def importance_of(
    program: ExportedProgram,
    selection: Selection,
    batches: Sequence[Sequence[Any]] | None,
    config: Method,
    progress: Progress,
    device: torch.device,
) -> dict[str, Importance] | None:
    """Measure what `config` asks for; None where that is nothing, or there are no batches or groups."""
    if not batches or not selection.groups or config.importance != "gradient":
        return None
    return measure_importance(program, selection.groups, batches, config.seed, progress, device)


def measure_importance(
    program: ExportedProgram,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    seed: int,
    progress: Progress = silent,
    device: torch.device | None = None,
) -> dict[str, Importance]:
    """Measure the weight of every token and output feature of every group, by one forward and backward run a batch.

    Args:
        program: unquantised; its first floating-point output is taken as logits over its last dimension.
        groups: Linears to weigh; those of a group count the same.
        batches: flattened user inputs, on `device`.
        seed: seed of the labels drawn from predictions where there are none.
        progress: called as (batches done, batches, label).
        device: where to run; by default where the program's tensors lie.

    Returns:
        `Importance` by the group's name.

    Raises:
        CalibrationError: no output depends on a group, or an output or a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    squared: dict[Node, list[Tensor]] = {site.nodes[0]: [] for group in groups for site in group.sites}
    for index, batch in enumerate(batches):
        for node, gradient in _squared_gradients(program, set(squared), batch, index, generator, device).items():
            squared[node].append(gradient)
        progress(index + 1, len(batches), "importance of tokens")
    return {group.name: _weights(group, [squared[site.nodes[0]] for site in group.sites]) for group in groups}


class _Recorder(LockstepRunner):
    """Run of one batch with gradients that keeps sums of the squared gradient (tokens, features) of watched outputs.

    `found` holds, for each, fp32 (tokens + features,): sums over features, then sums over tokens.
    """

    def __init__(
        self, program: ExportedProgram, batch: Sequence[Any], watched: set[Node], device: torch.device | None
    ) -> None:
        super().__init__(program, [batch], device)
        self.allow_gradients()
        self.found: dict[Node, Tensor] = {}
        self.leads: dict[Node, torch.Size] = {}
        self._watched = watched
        # Added to an output, it starts autograd's graph there; as a leaf, the output could not be written in place.
        self._start = torch.zeros((), requires_grad=True, dtype=torch.float32, device=self.device)

    def _run(self, node: Node) -> None:
        super()._run(node)
        if node in self._watched:
            values = self._shared if node in self._shared else self._values[0]
            y = values[node] + self._start.to(values[node].dtype)
            self.leads[node] = y.shape[:-1]
            self.found[node] = torch.zeros(y.numel() // y.shape[-1] + y.shape[-1], dtype=torch.float32, device=y.device)
            # The hook holds the sum alone: with the runner in it, the graph of every batch would live on in a cycle.
            y.register_hook(partial(_add_squared, self.found[node]))
            values[node] = y


def _add_squared(total: Tensor, gradient: Tensor) -> None:
    squared = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32).square()
    total += torch.cat((squared.sum(1), squared.sum(0)))


@torch.enable_grad()
def _squared_gradients(
    program: ExportedProgram,
    watched: set[Node],
    batch: Sequence[Any],
    index: int,
    generator: torch.Generator,
    device: torch.device | None,
) -> dict[Node, Tensor]:
    recorder = _Recorder(program, batch, watched, device)
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
    # Gradient of the summed cross-entropy in closed form, softmax minus one-hot: one copy of the logits, no more.
    gradient = logits.detach().softmax(-1)
    if not torch.isfinite(gradient).all():
        raise CalibrationError(
            f"the predictions on calibration batch {index} are not finite; look for an overflow (try float32) or a "
            "damaged weight"
        )
    padding = Padding(program, batch)
    visible = padding.visible(floating[0].shape[:-1])
    labels = _next_tokens(batch, floating[0], visible)
    if labels is None:
        # Drawn on the CPU, so that every device draws the same.
        labels = torch.multinomial(gradient.cpu(), 1, generator=generator).to(gradient.device)
    if visible is not None:
        labels = torch.where(visible.unsqueeze(1), labels, -1)
    gradient.scatter_add_(
        1, labels.clamp_min(0), torch.full(labels.shape, -1.0, dtype=torch.float32, device=labels.device)
    ).mul_(labels >= 0)
    del outputs, floating
    logits.backward(gradient)
    parts = [
        _of_text(total, padding.of_pairs(lead[0]) if node.target is ROUTED else padding.visible(lead))
        for (node, total), lead in zip(recorder.found.items(), recorder.leads.values(), strict=True)
    ]
    # One block: hundreds of small ones would fragment the memory that the next batch needs whole.
    return dict(zip(recorder.found, torch.cat(parts).split([len(part) for part in parts]), strict=True))


def _of_text(total: Tensor, visible: Tensor | None) -> Tensor:
    """Drop the sums of hidden tokens. Sums over tokens hold no gradient of those, unless others attend to them."""
    if visible is None:
        return total
    tokens, features = total[: len(visible)], total[len(visible) :]
    return torch.cat((kept(tokens, visible), features))


def _next_tokens(batch: Sequence[Any], logits: Tensor, visible: Tensor | None) -> Tensor | None:
    """Labels (positions, 1) int64, -1 for the last position of a text; None where no input can be the tokens."""
    inputs = [value for value in batch if isinstance(value, Tensor) and not value.is_floating_point()]
    tokens = next((value for value in inputs if value.dtype != torch.bool and value.shape == logits.shape[:-1]), None)
    if tokens is None or tokens.dim() < 2 or tokens.shape[-1] < 2 or tokens.max() >= logits.shape[-1]:
        return None
    labels = torch.nn.functional.pad(tokens[..., 1:].to(torch.int64), (0, 1), value=-1)
    if visible is not None:
        following = torch.nn.functional.pad(visible.view(labels.shape)[..., 1:], (0, 1), value=False)
        labels = torch.where(following, labels, -1)
    return labels.reshape(-1, 1)


def _weights(group: Group, squared: list[list[Tensor]]) -> Importance:
    """Combine `squared`, for each Linear `_Recorder`'s sums of each batch, to weights."""
    widths = [site.out_features for site in group.sites]
    sizes = [len(batch) - widths[0] for batch in squared[0]]
    tokens, rows = squared[0][0].new_zeros(sum(sizes)), []
    for site, width in zip(squared, widths, strict=True):
        every = torch.cat([batch[:-width] for batch in site])
        if not torch.isfinite(every).all():
            raise CalibrationError(f"the gradient at '{group.name}' is not finite; use importance='none' or float32")
        mean = every.mean()
        tokens += every / mean if mean > 0 else 1.0
        rows.append(torch.stack([batch[-width:] for batch in site]).sum(0))
    return Importance(list(_tempered(tokens).split(sizes)), _tempered(torch.cat(rows)))


def _tempered(squared: Tensor) -> Tensor:
    """Turn squared gradients into weights with mean 1."""
    mean = squared.mean()
    weight = (squared / mean if mean > 0 else torch.ones_like(squared)).clamp_min(_FLOOR).pow(_POWER)
    return weight / weight.mean()
