"""`LoProQuantizer`: quantise within transformers' exporters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer

from lopro_fx.methods.base import Method
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.passes.fingerprint import Digest
from lopro_fx.quantize import apply, calibrate
from lopro_fx.state import QuantState


class LoProQuantizer(ExportQuantizer):
    """Quantizer of the program that `DynamoExporter` exports; pass it as `DynamoConfig(quantizer=...)`.

    Args:
        config: `LoPRo` (default), `FLRQ`, `GPTQ`, `RTN`, or another method.
        calibration_dataset: dicts of the model's inputs, or, for `export_for_generation`, of `generate`'s. Without it
            the export's own sample inputs serve, with a warning of transformers.

    A second program with the same weights, such as `decode` after `prefill`, reuses the state of the first. `states`
    lists the calibrated QuantStates in order, because exporters keep only the graph.
    """

    quantizes_fx_graph = True
    supported_formats: Any = (ExportFormat.DYNAMO,)
    required_packages = ("torch",)
    min_versions = {"torch": "2.11.0"}  # noqa: RUF012  as the base class declares it

    def __init__(
        self, config: Method | None = None, calibration_dataset: Iterable[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(calibration_dataset)
        self.config = config
        # Exporters quantise with shallow copies, which share both.
        self.states: list[QuantState] = []
        self._calibrated: dict[str, QuantState] = {}

    def quantize(self, model: GraphModule, sample_inputs: dict[str, Any], export_format: ExportFormat) -> GraphModule:  # noqa: ARG002
        """Calibrate the graph and pack its Linears; dynamic sizes stay dynamic.

        Raises:
            GraphError: no Linear to quantise.
            CalibrationError: a sample doesn't fit the program, or an activation is not finite.
        """
        inputs = dict(sample_inputs)
        shapes = _dynamic_sizes(model, inputs).dynamic_shapes(model, (), inputs)
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
        key = _key(program, self.config or LoPRo())
        if key not in self._calibrated:
            batches = list(self.traced_calibration(inputs))
            self._calibrated[key] = calibrate(program, batches, self.config)
            self.states.append(self._calibrated[key])
        quantized: Any = apply(program, self._calibrated[key]).module()
        return quantized


def _dynamic_sizes(model: GraphModule, inputs: dict[str, Any]) -> ShapesCollection:
    """Collect the graph's dynamic sizes, so that they stay dynamic when it is exported again."""
    sizes = ShapesCollection()
    placeholders = model.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, pytree.tree_leaves(((), inputs)), strict=True):
        if isinstance(value, torch.Tensor):
            open_sizes = {index: Dim.AUTO for index, size in enumerate(node.meta["val"].shape)
                          if not isinstance(size, int)}  # fmt: skip
            if open_sizes:
                sizes[value] = open_sizes
    return sizes


def _key(program: ExportedProgram, config: Method) -> str:
    """Key of the method and the parameters' values, equal for all programs of one model. Addresses of parameters would
    not do: they are reused when a model is freed, and overwritten when another checkpoint is loaded."""
    digest = Digest()
    digest.text(config.to_dict())
    for name in sorted(program.graph_signature.parameters):
        digest.text(name)
        digest.value(program.state_dict[name])
    return digest.hexdigest()
