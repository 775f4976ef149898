"""Budget of a whole model, in size or divergence, and its best division among Linears.

A Linear has a few options, each with bytes and a predicted loss. On the lower convex hull of its options, each step to
more bytes lowers the loss by less per byte. The steps of all Linears, taken by falling gain a byte until the
budget is spent, have the least sum of all choices of their size (Shoham and Gersho 1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import pairwise
from typing import Any

from lopro_fx.errors import ConfigError
from lopro_fx.methods.base import Method
from lopro_fx.report.table import render

# Bits of a weight that no format has.
MOST_BITS = 64


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Size that the packed tensors of all quantised Linears may have, or divergence that they may cause; give one.

    Args:
        bits_per_weight: everything counted, as in `QuantState.bits_per_weight`.
        max_bytes: as in `QuantState.packed_bytes`.
        max_kl: predicted KL divergence from the unquantised model's predictions, in nats a token; the size is then the
            least that has it. Output projections are not in the prediction.

    Raises:
        ConfigError: not one of them is given, or a value is out of range.
    """

    bits_per_weight: float | None = None
    max_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError("Budget: give bits_per_weight, max_bytes or max_kl, one of them")
        ((name, value),) = given.items()
        most = MOST_BITS if name == "bits_per_weight" else float("inf")
        try:
            number = float("nan") if isinstance(value, (bool, str)) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not 0 < number < most:
            raise ConfigError(f"Budget({name}={value!r}): must be a number above 0 and below {most:g}")
        object.__setattr__(self, name, int(number) if name == "max_bytes" else number)

    def bytes_for(self, weights: int) -> int | None:
        """Bytes for this number of weights; None without a limit."""
        return self.max_bytes if self.bits_per_weight is None else int(self.bits_per_weight * weights / 8)


@dataclass(frozen=True)
class Option:
    """Settings that a Linear, or several together, can get, bytes of all their tensors, and loss in nats a token."""

    settings: Mapping[str, Any]
    bytes: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """What the Linears `names`, one or those that have to get the same, get."""

    names: tuple[str, ...]
    weights: int
    option: Option


@dataclass(frozen=True)
class Plan:
    """Settings of every Linear under a budget, before anything is solved.

    Args:
        method: with the settings as its overrides; `quantize` and `calibrate` take it as `config`.
        choices: in graph order.
        head_bytes: of output projections, which are rounded as `head_bits` says.
        head_weights: their number of weights.
        uniform: the best setting that is the same for all and fits the budget, None if none does.
        checked: divergence of the division and of the uniform setting, each measured with all Linears at once on text
            that the division has not seen; the choices are those of the smaller. None if that was not measured.
    """

    method: Method
    choices: tuple[Choice, ...]
    head_bytes: int
    head_weights: int
    uniform: Option | None
    checked: tuple[float, float] | None = None

    @property
    def kl(self) -> float:
        """Predicted KL divergence from the unquantised model, in nats a token; output projections add to it."""
        return sum(choice.option.loss for choice in self.choices)

    @property
    def bytes(self) -> int:
        return self.head_bytes + sum(choice.option.bytes for choice in self.choices)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / (self.head_weights + sum(choice.weights for choice in self.choices))

    @property
    def figures(self) -> dict[str, Any]:
        """What was predicted and measured, ready for JSON."""
        uniform = None if self.uniform is None else {"settings": dict(self.uniform.settings), "kl": self.uniform.loss}
        return {"kl": self.kl, "uniform": uniform, "checked": None if self.checked is None else list(self.checked)}

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [
            (", ".join(choice.names), _text(choice.option.settings), 8 * choice.option.bytes / choice.weights,
             choice.option.bytes, choice.option.loss)
            for choice in self.choices
        ]  # fmt: skip
        if self.head_weights:
            bits = 8 * self.head_bytes / self.head_weights
            rows.append(("output projection", f"bits {self.method.head_bits}", bits, self.head_bytes, ""))
        title = f"{self.bits_per_weight:.3f} bits per weight, {self.bytes:,} bytes, {predicted(self.figures)}"
        return render(title, ("Linears", "settings", "bits per weight", "bytes", "predicted KL"), rows)


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of loss over bytes, by rising bytes, to the one of least loss."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.loss)):
        if found and option.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], option):
            found.pop()
        found.append(option)
    return found


def divide(options: Sequence[Sequence[Option]], limit: int | None, most_loss: float = 0.0) -> list[Option]:
    """Choose an option for each Linear: the least total loss with at most `limit` bytes in all, or the fewest bytes
    with at most `most_loss`, whichever takes less.

    The step that would exceed the limit ends the search: a smaller step taken instead could not be taken with more
    bytes, and the loss would rise.

    Raises:
        ConfigError: the smallest options exceed the limit, or without one, the best options have more loss.
    """
    hulls = [hull(each) for each in options]
    spent, loss = sum(each[0].bytes for each in hulls), sum(each[0].loss for each in hulls)
    if limit is not None and spent > limit:
        raise ConfigError(f"the budget leaves {limit:,} bytes for these Linears, and the least possible is {spent:,}")
    steps = sorted(
        ((_gain(low, high), index, place) for index, each in enumerate(hulls)
         for place, (low, high) in enumerate(pairwise(each))),
        key=lambda step: (-step[0], step[1], step[2]),
    )  # fmt: skip
    chosen = [0] * len(hulls)
    for _, index, place in steps:
        low, high = hulls[index][place : place + 2]
        if loss <= most_loss or (limit is not None and spent + high.bytes - low.bytes > limit):
            break
        spent, loss, chosen[index] = spent + high.bytes - low.bytes, loss + high.loss - low.loss, place + 1
    if limit is None and loss > most_loss:
        raise ConfigError(f"the budget is a divergence of {most_loss:g}, and the least predicted is {loss:.3g}")
    return [each[place] for each, place in zip(hulls, chosen, strict=True)]


def overrides_of(choices: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """Return the choices as overrides of a method, by the exact names of the Linears."""
    return {escape(name): dict(choice.option.settings) for choice in choices for name in choice.names}


def best_uniform(options: Sequence[Sequence[Option]], limit: int) -> list[Option] | None:
    """Return the options of the setting of least loss that is the same for every Linear with at most `limit` bytes."""
    fitting = []
    for setting in options[0] if options else ():
        same = [own for each in options for own in each if own.settings == setting.settings]
        if len(same) == len(options) and sum(own.bytes for own in same) <= limit:
            fitting.append(same)
    return min(fitting, key=lambda same: sum(own.loss for own in same), default=None)


def total_of(same: Sequence[Option]) -> Option:
    """Return one option of the settings of the first, with the bytes and the loss of all."""
    return Option(same[0].settings, sum(own.bytes for own in same), sum(own.loss for own in same))


def _gain(low: Option, high: Option) -> float:
    """Fall of the loss for a byte."""
    return (low.loss - high.loss) / (high.bytes - low.bytes)


def predicted(figures: Mapping[str, Any]) -> str:
    """Say what a plan's figures mean."""
    text, uniform, checked = f"predicted KL {figures['kl']:.3g}", figures["uniform"], figures["checked"]
    if uniform is not None:
        text += f" ({_text(uniform['settings'])} for all: {uniform['kl']:.3g})"
    if checked is not None:
        text += f"; checked together {checked[0]:.3g} ({checked[1]:.3g})"
    return text


def _text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
