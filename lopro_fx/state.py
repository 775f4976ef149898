"""Result of a calibration, independent of the program that it was made on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from lopro_fx.layer import Input, Layer, stored_bytes
from lopro_fx.passes.record import record_of
from lopro_fx.passes.recover import recover


@dataclass(frozen=True)
class QuantState:
    """Inputs and layers by fully qualified name; `lopro_fx.apply` puts them into any program of the same model.

    `config` is the method and its parameters, `skipped` lists (name, reason) of what was not quantised, `info` holds
    the run's own figures (versions, calibration tokens, seconds).
    """

    config: dict[str, Any]
    inputs: dict[str, Input]
    layers: dict[str, Layer]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int:
        """Bytes of everything that replaces the weights: packed tensors, factors, permutations, signs."""
        owners = (*self.inputs.values(), *self.layers.values())
        return sum(stored_bytes(owner.tensors.values()) for owner in owners)

    @property
    def weights(self) -> int:
        """Number of weights that were quantised."""
        return sum(layer.weights for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * packed_bytes / weights."""
        return 8 * self.packed_bytes / self.weights if self.weights else 0.0


def state_of(program: ExportedProgram) -> QuantState:
    """Recover the state that was applied to a quantised program; its tensors are the program's own.

    Raises:
        GraphError: the program was not quantised, or was optimised since.
    """
    inputs, layers = recover(program)
    record = record_of(program, "recover")
    skipped = [(name, reason) for name, reason in record["left"]]
    return QuantState(record["config"], inputs, layers, skipped, record["info"])
