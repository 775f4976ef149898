"""Interface of a method: a frozen configuration that names what to measure and solves the layers of one input.

One file holds a method; `registry.register_method` makes it known. A bad value is refused on construction, with the
value and the allowed range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.kernels.activation.reference import BITS
from lopro_fx.layer import Input, Layer, Transform
from lopro_fx.methods import checks
from lopro_fx.methods.observers import Observer, Statistics

HEAD_BITS = (0, 4, 8)
IMPORTANCE = ("none", "gradient")
ACT_BITS = (0, *BITS)
ACT_GROUPS = (0, 32, 64, 128, -1)
# Keys of a setting's help text, and of what reads its flag, in its field's metadata.
HELP, KIND = "help", "kind"


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None, kind: Callable[[str], Any] = str) -> Any:
    """Define a field that is also a command-line flag, with `text` as its help.

    `kind` reads a value; where it is left out, the type of the default does.
    """
    kind = type(default) if kind is str else kind
    return field(default=default, metadata={HELP: text, "choices": choices, KIND: kind})


def number(text: str) -> int | float:
    """Read a number; a whole one is an int."""
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Unit:
    """Linears that read one tensor: their names, and weights (m_i, n) of any float dtype in the same order.

    Weights of experts are (experts, m_i, n).
    """

    name: str
    names: tuple[str, ...]
    weights: Sequence[Tensor]

    @property
    def in_features(self) -> int:
        return self.weights[0].shape[-1]

    @property
    def experts(self) -> int:
        """Number of experts; 0 for Linears."""
        return len(self.weights[0]) if self.weights[0].dim() == 3 else 0

    def expert(self, index: int) -> Unit:
        """The unit of one expert."""
        return replace(self, weights=[weight[index] for weight in self.weights])

    def input(self, **shared: Any) -> Input:
        """Make the layers' `Input`; `shared` are its other fields, such as `transform` and `down`."""
        return Input(self.name, self.names, self.in_features, **{"transform": Transform(), **shared})


@dataclass(frozen=True)
class Context:
    """Device on which a unit is solved, and its random generator, seeded by the unit's name and the run's seed."""

    device: torch.device
    generator: torch.Generator


def seed_of(name: str, seed: int) -> int:
    """Derive the seed of the unit `name` in a run with `seed`: the same in every process and version."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Solved:
    """Result of a unit: its input, and its layers in the unit's order.

    A layer's `metrics` may hold "transform", "relative_loss", "damp" and other figures of the method; those that
    follow from the tensors are added later.
    """

    input: Input
    layers: tuple[Layer, ...]


class Block(Protocol):
    """Linears whose outputs meet, such as those of a decoder layer, and the calibration batches that they read."""

    @property
    def name(self) -> str:
        """Module path."""
        ...

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        ...

    @property
    def units(self) -> Sequence[tuple[Unit, Solved]]:
        """Units in graph order, and their solutions so far."""
        ...

    def error(self, weights: Mapping[str, Callable[[], Tensor]], batches: Sequence[int]) -> Tensor:
        """Mean squared error of the block's output to that of the unquantised model, a number, differentiable.

        Args:
            weights: by a Linear's name, a function that returns its dense weight, in the packed weight's coordinates.
                Linears that are left out keep their solutions. Activations are rounded as the solutions say, with the
                gradient of the identity.
            batches: places of the batches to run.

        Returns:
            fp32 (): squared error over the outputs' variance; tokens and features weigh as in the Grams.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of methods, with the settings that all have.

    Args:
        include: fnmatch patterns on a Linear's fully qualified name. Layers kept by default (the output projection,
            routers of experts, Linears of one output feature) are taken only if a pattern is the whole name, without
            wildcards.
        exclude: patterns of Linears to skip; they win over `include` and `head_bits`.
        head_bits: code width of the output projection and of an embedding that shares its weight: 4 or 8; 0 keeps
            both. They are rounded to nearest, without data, rotation or factors. An output projection that `include`
            names is solved like other Linears, and its embedding is kept.
        token_clip: tokens whose squared norm exceeds this many times the median are scaled down to that in the Gram; 0
            scales none.
        importance: "gradient" weighs tokens in the Gram by the size of the loss's gradient at the layers' outputs. It
            takes one more forward and a backward run of the calibration batches, and a program that returns logits.
            "none" weighs all tokens the same.
        sequential: solve each unit on inputs computed by the quantised layers before it; False uses the unquantised
            model's inputs throughout.
        act_bits: 8 or 4 rounds the activations that a packed weight multiplies, in the program and while calibrating
            later layers: to nearest, symmetric, one step per token and column group. 0 rounds nothing.
        act_group: columns that share a step: 32, 64, 128, -1 for all of a token's, or 0 for 128 of a
            rotated input, else 32, limited by the weight's column groups.
        seed: seed of every random choice (signs, sketches).
        overrides: settings of some Linears, by fnmatch pattern on the fully qualified name, such as
            `{"*.down_proj": {"bits": 4}}`; of several patterns that match, the last one counts. Linears that read one
            tensor are solved together: only their format and its settings may differ, without a low-rank branch.
    """

    include: tuple[str, ...] = setting(("*",), "Linears to take (repeatable)")
    exclude: tuple[str, ...] = setting((), "Linears to leave alone (repeatable)")
    head_bits: int = setting(
        0, "of the output projection and an embedding tied to it: 8, 4, or 0 to keep them (default: 8)"
    )
    token_clip: float = 16.0
    importance: str = setting(
        "none",
        "gradient weighs tokens by the loss's gradient (default for lopro, flrq, tileq, lrc, lrq; none for the others)",
        IMPORTANCE,
    )
    sequential: bool = True
    act_bits: int = setting(0, "of a rounded activation: 8, 4, or 0 to keep it (default: 4 for lrc, else 0)")
    act_group: int = 0
    seed: int = setting(0, "of every random choice (default: 0)")
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    # Key in the registry, in files and on the command line.
    name: ClassVar[str]
    # Whether it loses accuracy without calibration.
    needs_data: ClassVar[bool] = True
    # Whether `learn` follows once the units of a block are solved; it needs calibration.
    learns: ClassVar[bool] = False
    # Settings of a whole run, which no Linear can have for itself.
    of_run: ClassVar[tuple[str, ...]] = (
        "include", "exclude", "head_bits", "token_clip", "importance", "sequential", "seed", "overrides",
    )  # fmt: skip
    # Settings that differ on the command line, where programs return logits.
    of_language_models: ClassVar[Mapping[str, Any]] = {"head_bits": 8}

    def __post_init__(self) -> None:
        checks.patterns(self, "include")
        checks.patterns(self, "exclude")
        checks.choice(self, "head_bits", HEAD_BITS)
        checks.at_least(self, "token_clip", 0)
        checks.choice(self, "importance", IMPORTANCE)
        checks.choice(self, "act_bits", ACT_BITS)
        checks.choice(self, "act_group", ACT_GROUPS)
        checks.whole(self, "seed", 0, 2**63 - 1)
        checks.flag(self, "sequential")
        checks.mapping(self, "overrides")
        for pattern, values in self.overrides.items():
            self._overridden(pattern, values)

    def changed(self, values: Mapping[str, Any]) -> Method:
        """Return the method with other settings, without overrides.

        Raises:
            ConfigError: a setting is unknown, or a value is not allowed.
        """
        known = {field.name for field in fields(self)}
        for name in values:
            if name not in known or name in self.of_run:
                reason = "is a setting of the whole run" if name in known else "is no such setting"
                own = ", ".join(sorted(known.difference(self.of_run)))
                raise ConfigError(f"'{name}' {reason}; a Linear's own are {own}")
        return replace(self, **{"overrides": {}, **values})

    def for_unit(self, names: Sequence[str]) -> Method:
        """Return the method with the settings of these Linears, which read one tensor.

        Raises:
            ConfigError: `overrides` gives them settings that can't differ among them.
        """
        if not self.overrides:
            return self
        found = {name: self._override(name) for name in names}
        first = found[names[0]]
        other = next((name for name, values in found.items() if values != first), None)
        return self.changed(first) if other is None else self.divided(found, other)

    def divided(self, found: Mapping[str, Mapping[str, Any]], other: str) -> Method:
        """Return a method whose overrides are `found`: settings of Linears that read one tensor, of which `other` is
        the first whose differ from the first one's.

        Raises:
            ConfigError: these settings can't differ.
        """
        name, first = next(iter(found.items()))
        raise ConfigError(
            f"overrides: '{name}' and '{other}' read one tensor and are solved together, but get {first} and "
            f"{found[other]}; give both the same"
        )

    def _override(self, name: str) -> Mapping[str, Any]:
        patterns = [pattern for pattern in self.overrides if fnmatchcase(name, pattern)]
        return self.overrides[patterns[-1]] if patterns else {}

    def _overridden(self, pattern: str, values: Mapping[str, Any]) -> None:
        """Require that `values` can replace the method's own."""
        try:
            self.changed(values)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"overrides[{pattern!r}] = {values!r}: {error}") from error

    def observers(self) -> Sequence[Observer]:
        """Return the observers to run on each input; () for a method without data."""
        return ()

    def observers_of(self, unit: Unit) -> Sequence[Observer]:
        """Return the observers of one input, where they depend on what reads it."""
        return self.observers()

    def solve(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        """Quantise the Linears of one input."""
        raise NotImplementedError

    def solve_experts(self, unit: Unit, seen: Statistics, context: Context) -> Solved | None:
        """Quantise the experts that read one input; None leaves each of them to `solve`, with its own statistics."""
        return None

    def learn(self, block: Block, context: Context, label: Callable[[str], None]) -> Sequence[Solved]:
        """Change the solutions of a block's units by the error of the block's output, if the method `learns`.

        Returns the units' solutions, in order. `label` tells the user what is being done.
        """
        raise NotImplementedError

    def most_bits(self) -> float:
        """Upper bound of the bits per weight, all tensors counted, for the check of free disk space."""
        return 16.0

    def to_dict(self) -> dict[str, Any]:
        """Fields and the method's name, ready for JSON."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"method": self.name, **values}
