"""Registration of `lopro::project`."""

from __future__ import annotations

from lopro_fx.kernels import registry
from lopro_fx.kernels.project.reference import project

registry.register("project(Tensor x, Tensor down, Tensor? scale) -> Tensor", project)
