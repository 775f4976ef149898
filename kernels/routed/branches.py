"""Low-rank branches of experts in a grid, whose rows share factors that project down, and columns those back up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lopro_fx.kernels.project.reference import dense_factor


@dataclass(frozen=True)
class Branches:
    """Operands of the branches by expert, see `definition.experts`: `up` is fp32 (columns, out_features, rank)."""

    up: Tensor
    cells: list[list[int]]
    core: Tensor | None

    @classmethod
    def of(cls, named: Mapping[str, Any], experts: int) -> Branches:
        """The branches of an operator's operands by name: up, up_scale, cells, core."""
        cells = named["cells"]
        places = [[index, index] for index in range(experts)] if cells is None else cells.tolist()
        return cls(dense_factor(named["up"], named["up_scale"], -1), places, named["core"])

    def of_expert(self, expert: int, latent: Tensor) -> Tensor:
        """The branch of one expert on latents (tokens, rows * rank): (tokens, out_features) of their dtype."""
        row, column = self.cells[expert]
        rank = self.up.shape[-1]
        own = latent[:, row * rank : (row + 1) * rank]
        if self.core is not None:
            own = own @ self.core[expert].to(latent.dtype).T
        return own @ self.up[column].to(latent.dtype).T
