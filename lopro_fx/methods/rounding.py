"""Base of methods that round to a format: its settings, row units, and the packing of a solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from glob import escape
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.kernels.formats.quantizer import Quantizer
from lopro_fx.kernels.formats.registry import empty, known_format
from lopro_fx.layer import Factor, Layer, Transform
from lopro_fx.methods import checks
from lopro_fx.methods.asymmetric import compensated
from lopro_fx.methods.base import Context, Method, Solved, Unit, number, setting
from lopro_fx.methods.experts import sampled, stacked
from lopro_fx.methods.lowrank import in_unit
from lopro_fx.methods.observers import Drift, Gram, Magnitude, Observer, Statistics
from lopro_fx.methods.prior import informed
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import divided, row_units, stored_factor_scale

# Settings that only some formats have; None takes the format's default.
_OF_FORMAT = ("group_size", "window", "strip")
# Settings that may differ among Linears that read one tensor.
_OF_LINEAR = ("format", "bits", "clip_steps", *_OF_FORMAT)


@dataclass(frozen=True, kw_only=True)
class Rounding(Method):
    """Method that rounds the weights to a format.

    Args:
        format: "affine" (codes with a scale and a zero per column group), "trellis" (a bit string a column), or another
            format that has a quantizer.
        bits: bits of a weight, scales not counted. Affine: 2, 3, 4 or 8. Trellis: 1.5, 2, 2.5, 3 or 4.
        group_size: affine: input columns that share a scale and a zero: 32, 64, 128, or -1 for the whole row; 64 by
            default.
        clip_steps: affine: clipping ranges tried for each group by squared error; 0 keeps min and max.
        window: trellis: bits of a state, 12 to 16. Each more halves the speed of rounding.
        strip: trellis: rows of a bit string, a multiple of 32, or -1 for all rows.
        asymmetry: part, 0 to 1, of the drift of quantised inputs that the weights make up for, see `asymmetric`. More
            than 0 runs the unquantised model beside the quantised one. By default 0 for RTN, GPTQ and what
            is not `sequential`, else 0.4.
    """

    format: str = setting("affine", "affine (scales by group) or trellis (default: affine)")
    bits: float = setting(
        3, "of a weight; affine 2, 3, 4, 8; trellis 1.5, 2, 2.5, 3, 4 (default: 4 for lrc, else 3)", kind=number
    )
    group_size: int | None = setting(
        None, "affine: columns that share a scale: 32, 64, 128, -1 for all (default: 64)", kind=int
    )
    clip_steps: int = 24
    window: int | None = None
    strip: int | None = None
    asymmetry: float | None = setting(
        None,
        "part of the inputs' drift that weights make up for, 0 to 1 (default: 0.4 for lopro, flrq, tileq, lrc, lrq)",
        kind=float,
    )
    name: ClassVar[str]
    # Default of `asymmetry` for a method that is sequential.
    default_asymmetry: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = known_format(self.format).quantizer
        if kind is None:
            raise ConfigError(f"{type(self).__name__}(format={self.format!r}): nothing rounds to this format")
        defaults = {field.name: field.default for field in fields(kind)}
        for name in _OF_FORMAT:
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                given = f"{type(self).__name__}({name}={getattr(self, name)!r})"
                raise ConfigError(f"{given}: format '{self.format}' has no such setting; leave it out, or give None")
        for name, allowed in kind.allowed.items():
            checks.choice(self, name, tuple(allowed))
        checks.whole(self, "clip_steps", 0, 1000)
        if self.asymmetry is None:
            object.__setattr__(self, "asymmetry", self.default_asymmetry if self.sequential is True else 0.0)
        checks.at_least(self, "asymmetry", 0, 1)
        if self.asymmetry and not self.sequential:
            raise ConfigError(
                f"{type(self).__name__}(asymmetry={self.asymmetry!r}, sequential=False): inputs of the unquantised "
                "model do not drift; take sequential=True, or asymmetry=0"
            )

    def changed(self, values: Mapping[str, Any]) -> Method:
        if values.get("format", self.format) != self.format:
            # Another format has defaults of its own.
            values = {**dict.fromkeys(_OF_FORMAT), **values}
        return super().changed(values)

    @property
    def quantizer(self) -> Quantizer:
        """What rounds to the format, with the method's settings."""
        kind = known_format(self.format).quantizer
        assert kind is not None
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def empty(self, shape: tuple[int, ...]) -> Packed:
        """Tensors of a weight (m, n), or of experts (e, m, n), that the method rounds, on the meta device."""
        quantizer = self.quantizer
        spec = {name: getattr(quantizer, name, value) for name, value in known_format(self.format).spec.items()}
        return empty(self.format, shape, spec)

    def branch_bytes(self, rows: Sequence[int], in_features: int) -> int:
        """Bytes of the low-rank branch of Linears with so many rows that read one tensor."""
        return 0

    @property
    def unknown_size(self) -> str | None:
        """Reason why the bytes of a layer don't follow from the settings; None if they do."""
        return None

    @property
    def joint(self) -> bool:
        """Whether Linears that read one tensor share more than the transform, and so all settings."""
        return False

    def divided(self, found: Mapping[str, Mapping[str, Any]], other: str) -> Method:
        common = [{key: value for key, value in values.items() if key not in _OF_LINEAR} for values in found.values()]
        if any(values != common[0] for values in common) or self._changed(common[0]).joint:
            return super().divided(found, other)
        return replace(self, overrides={escape(name): values for name, values in found.items()})

    def _changed(self, values: Mapping[str, Any]) -> Rounding:
        own = self.changed(values)
        assert isinstance(own, Rounding)
        return own

    def most_bits(self) -> float:
        return self.quantizer.most_bits

    def observers(self) -> Sequence[Observer]:
        each = [self, *(self.changed(values) for values in self.overrides.values())]
        paired = any(isinstance(method, Rounding) and method.asymmetry for method in each)
        return Gram(), Magnitude(), *([Drift()] if paired else [])

    def solve(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        own = self.for_unit(unit.names)
        assert isinstance(own, Rounding)
        if own.overrides:
            return own._solve_apart(unit, seen, context.generator)
        return pack_solution(unit, own.solution(unit.weights, seen, context.generator))

    def solve_experts(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        own, generator = self.for_unit(unit.names), context.generator
        assert isinstance(own, Rounding)
        first = own._changed(own._override(unit.names[0])) if own.overrides else own
        transform = first.transform(sampled(unit), informed(replace(seen, rows=None)), generator)
        solved = []
        for index, stats in enumerate(seen.experts):
            expert = unit.expert(index)
            if own.overrides:
                solved.append(own._solve_apart(expert, stats, generator, transform))
            else:
                solved.append(pack_solution(expert, own.solution(expert.weights, stats, generator, transform)))
        return stacked(unit, solved)

    def _solve_apart(
        self, unit: Unit, seen: Statistics, generator: torch.Generator, transform: Transform | None = None
    ) -> Solved:
        """Solve Linears of different settings one by one, behind the transform of all."""
        methods = [self._changed(self._override(name)) for name in unit.names]
        if transform is None:
            joint = torch.cat([weight.to(torch.float32) for weight in unit.weights])
            transform = methods[0].transform(joint, informed(seen), generator)
        rows = [None] * len(methods) if seen.rows is None else seen.rows.split([len(weight) for weight in unit.weights])
        layers = []
        for method, name, weight, part in zip(methods, unit.names, unit.weights, rows, strict=True):
            solution = method.solution([weight], replace(seen, rows=part), generator, transform)
            layers += pack_solution(Unit(unit.name, (name,), [weight]), solution).layers
        return Solved(unit.input(transform=transform), tuple(layers))

    def solution(
        self,
        weights: Sequence[Tensor],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None = None,
    ) -> GroupSolution:
        """Quantise the weights (m_i, n) of Linears that share an input.

        Args:
            weights: floating-point matrices of equal width; each row may have any magnitude within fp32.
            stats: Gram and magnitude of the shared input.
            generator: source of every random choice.
            transform: as the method's `transform` returns for these Linears and others; None chooses one.
        """
        rows = [weight.shape[0] for weight in weights]
        joint = torch.cat([weight.to(torch.float32) for weight in weights])
        if self.asymmetry:
            joint = compensated(joint, stats, self.asymmetry)
        units = row_units(joint)
        joint, unit = divided(joint, units), units.amax().item() or 1.0
        return _in_units(self.solve_rows(joint, units / unit, rows, informed(stats), generator, transform), units, unit)

    def transform(self, joint: Tensor, stats: Statistics, generator: torch.Generator) -> Transform:
        """Choose the transform of the input of Linears with the weights `joint` (m, n)."""
        return Transform()

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None,
    ) -> GroupSolution:
        """Quantise the row-wise concatenation `joint` (sum(rows), n) fp32 of a unit's weights, in units of their rows.

        `share` (m, 1) fp32 holds powers of two that take the rows to one unit: that of the errors, and of the result's
        up factors and loss. `transform` is as in `solution`.
        """
        raise NotImplementedError


def pack_solution(unit: Unit, solution: GroupSolution) -> Solved:
    """Pack a solution and split it into the unit's layers."""
    rows = [weight.shape[0] for weight in unit.weights]
    shared = unit.input(transform=solution.transform, down=_stored(solution.down))
    metrics = {"transform": solution.choice, "relative_loss": solution.relative, "damp": solution.damp}
    ups = solution.ups or (None,) * len(rows)
    layers = (
        Layer(name, unit.name, part.packed(), _stored(up), dict(metrics))
        for name, part, up in zip(unit.names, solution.rounded.split(rows), ups, strict=True)
    )
    return Solved(shared, tuple(layers))


def _stored(factor: Factor | None) -> Factor | None:
    """Convert a factor to its stored form."""
    if factor is None:
        return None
    scale = None if factor.scale is None else stored_factor_scale(factor.scale).contiguous()
    return replace(factor, values=factor.values.contiguous(), scale=scale)


def _in_units(solution: GroupSolution, units: Tensor, unit: float) -> GroupSolution:
    """Undo the division of the weights by `units` (m, 1), whose largest is `unit`, in their solution."""
    losses: Mapping[str, Any] = solution.losses
    return replace(
        solution,
        rounded=solution.rounded.times(units),
        ups=tuple(in_unit(up, unit) for up in solution.ups),
        loss=solution.loss * unit**2,
        losses={name: loss * unit**2 for name, loss in losses.items()},
    )
