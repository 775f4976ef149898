"""TileQ: low-rank factors that the experts of a layer share in a grid (arXiv 2605.09281).

The experts lie in the cells of a grid. All of a row share what projects down, all of a column what projects up, so a
factor costs a fraction of one for each expert. A small core of each expert between the two makes up for most of what
sharing loses. What is left is rounded with error feedback, by each expert's own statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.layer import Factor, Transform
from lopro_fx.methods import checks
from lopro_fx.methods.asymmetric import compensated
from lopro_fx.methods.base import Context, Solved, Unit, setting
from lopro_fx.methods.experts import sampled, stacked
from lopro_fx.methods.ldlq import damped, proxy_loss
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.lowrank import column_scale
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.placement import affinity, features, grid_of, improved, place
from lopro_fx.methods.prior import FACTOR_DAMP, informed
from lopro_fx.methods.rounding import pack_solution
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.tiles import StoredTiles, stored, tiled, tiled_with_core, unwhitened
from lopro_fx.methods.units import row_units, stored_factor_scale

# Exponent of the activation scale in the released code (TileQ section 3).
_SCALE_POWER = 2.4


@dataclass(frozen=True, kw_only=True)
class TileQ(LoPRo):
    """Experts with factors shared in a grid (arXiv 2605.09281); Linears as by LoPRo.

    Args:
        tile_rank: components of the factors that experts share; 0 leaves them out.
        core: whether each expert has a core (tile_rank, tile_rank) between its factors.
        whitening: "gram" fits the factors in the norm of the layer's Gram, "scale" is the paper: columns scaled by the
            size of their activations.
        tile_refits: times the factors are fitted again to the rounding error; before each but the first, the weights
            are rounded again around them. The best iterate is kept. 0 is the paper: factors once, from the weights.
    """

    tile_rank: int = setting(32, "of the factors that TileQ's experts share (default: 32)")
    core: bool = True
    whitening: str = "gram"
    tile_refits: int = 1
    name: ClassVar[str] = "tileq"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.whole(self, "tile_rank", 0, 4096)
        checks.flag(self, "core")
        checks.choice(self, "whitening", ("gram", "scale"))
        checks.whole(self, "tile_refits", 0, 32)

    @classmethod
    def paper(cls, **changes: Any) -> TileQ:
        """The paper's choices: those of `LoPRo.paper`, rank 32, factors from the scaled weights, without cores."""
        choices = {"rank": 32, "core": False, "whitening": "scale", "tile_refits": 0}
        base = LoPRo.paper().to_dict()
        del base["method"]
        return cls(**{**base, **choices, **changes})

    def solve_experts(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        own = self.for_unit(unit.names)
        assert isinstance(own, TileQ)
        if not own.tile_rank or own.overrides:
            return super().solve_experts(unit, seen, context)
        return _Tiling(own, unit, seen, context).solved()


class _Tiling:
    """One unit of experts: its targets in units of their own, and the metric that factors are fitted in."""

    def __init__(self, config: TileQ, unit: Unit, seen: Statistics, context: Context) -> None:
        self.config, self.unit, self.seen, self.rng = config, unit, seen, context.generator
        # What rounds the residual: its target has made up for the drift already.
        self.plain = replace(config, rank=0, tile_rank=0, asymmetry=0.0)
        self.transform: Transform = self.plain.transform(sampled(unit), informed(replace(seen, rows=None)), self.rng)
        joint = torch.cat([weight.to(torch.float32) for weight in unit.weights], 1)
        if config.asymmetry:
            joint = torch.stack([compensated(weight, own, config.asymmetry)
                                 for weight, own in zip(joint, seen.experts, strict=True)])  # fmt: skip
        self.scale = row_units(joint.abs().amax().view(1, 1)).item() or 1.0
        self.targets = joint / self.scale
        gram = informed(seen).gram
        if config.whitening == "gram":
            self.factor = torch.linalg.cholesky(damped(self.transform.gram(gram), FACTOR_DAMP))
        else:
            # A diagonal in original coordinates is none behind the transform. Its square may not be positive in fp32.
            scaled = self.transform.forward(torch.diag(column_scale(seen.magnitude, _SCALE_POWER)))
            self.factor = torch.linalg.qr(scaled).R.T.contiguous()
        routed = joint.new_tensor([own.routed for own in seen.experts])
        self.shares = routed / routed.sum() if routed.any() else torch.full_like(routed, 1 / len(routed))

    def solved(self) -> Solved:
        """Alternate between the factors and the rounding; keep the best iterate."""
        cells = self._cells()
        tiles = self._fitted(self.targets_moved, cells)
        best = None
        for _ in range(max(self.config.tile_refits, 1)):
            rounded = self._rounded(tiles)
            again = [tiles, self._fitted(self._errors(rounded), cells)] if self.config.tile_refits else [tiles]
            found = min(((self._loss(rounded, each), index) for index, each in enumerate(again)))
            if best is not None and found[0] >= best[0]:
                break
            tiles = again[found[1]]
            best = found[0], rounded, tiles
        assert best is not None
        return self._packed(*best)

    @property
    def targets_moved(self) -> Tensor:
        """Targets (E, m, n) behind the transform."""
        return self.transform.forward(self.targets)

    def _cells(self) -> Tensor:
        blocks = self.targets_moved @ self.factor
        count, out, width = blocks.shape
        rows, columns = grid_of(count, width, out)
        inputs, outputs = features(blocks, max(self.config.tile_rank // 2, 1), self.rng)
        cells = place(affinity(inputs), affinity(outputs), rows, columns, self.rng)
        return improved(cells, rows, columns, inputs, outputs, self.config.tile_rank) if self.config.core else cells

    def _fitted(self, targets: Tensor, cells: Tensor) -> StoredTiles:
        """Factors of targets (E, m, n) behind the transform, rounded as they are stored."""
        blocks, cells = targets @ self.factor, cells.to(targets.device)
        fit = tiled_with_core if self.config.core else tiled
        tiles = unwhitened(fit(blocks, cells, self.config.tile_rank, self.rng, self.shares), self.factor)
        return stored(tiles, blocks, self.factor, self.shares)

    def _rounded(self, tiles: StoredTiles) -> list[GroupSolution]:
        """Round what the factors leave of each expert."""
        rows, dense = [weight.shape[1] for weight in self.unit.weights], tiles.tiles()
        found = []
        for index, own in enumerate(self.seen.experts):
            left = self.targets[index] - self.transform.inverse(dense.dense(index))
            found.append(self.plain.solution(left.split(rows), own, self.rng, self.transform))
        return found

    def _errors(self, rounded: Sequence[GroupSolution]) -> Tensor:
        """What the rounded weights lack (E, m, n), behind the transform."""
        return self.targets_moved - torch.stack([solution.rounded.dense() for solution in rounded])

    def _loss(self, rounded: Sequence[GroupSolution], tiles: StoredTiles) -> float:
        """Squared error of the outputs, over that of all zeros, by the experts' shares of tokens."""
        errors, dense, total, whole = self._errors(rounded), tiles.tiles(), 0.0, 0.0
        for index, own in enumerate(self.seen.experts):
            gram, share = self.transform.gram(informed(own).gram), self.shares[index].item()
            total += share * proxy_loss(errors[index] - dense.dense(index), gram)
            whole += share * proxy_loss(self.transform.forward(self.targets[index]), gram)
        return total / whole if whole > 0 else 0.0

    def _packed(self, loss: float, rounded: Sequence[GroupSolution], tiles: StoredTiles) -> Solved:
        parts = [pack_solution(self.unit.expert(index), _times(solution, self.scale))
                 for index, solution in enumerate(rounded)]  # fmt: skip
        solved = stacked(self.unit, parts)
        layers, first = [], 0
        assert tiles.up.scale is not None
        scale = stored_factor_scale(tiles.up.scale.to(torch.float32) * self.scale)
        core = None if tiles.core is None else tiles.core.values
        for layer in solved.layers:
            values = tiles.up.values[:, first : first + layer.out_features].contiguous()
            first += layer.out_features
            metrics = {**layer.metrics, "relative_loss": loss, "grid": (tiles.cells.amax(0) + 1).tolist()}
            up = Factor(values, scale, -1)
            layers.append(replace(layer, metrics=metrics, up=up, cells=tiles.cells, core=core))
        return Solved(replace(solved.input, down=tiles.down), tuple(layers))


def _times(solution: GroupSolution, unit: float) -> GroupSolution:
    """The solution of weights `unit` times as large."""
    dense = solution.rounded.dense()
    return replace(solution, rounded=solution.rounded.times(dense.new_full((len(dense), 1), unit)))
