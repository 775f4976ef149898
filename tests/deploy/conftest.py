from __future__ import annotations

import pytest

import lopro_fx
from tests.deploy.models import quantized_lm


@pytest.fixture(scope="session")
def quantized():
    """A quantised program with tied weights, constants and dynamic sizes; not to be changed."""
    return quantized_lm()


@pytest.fixture(scope="session")
def saved(quantized, tmp_path_factory):
    """The folder that `quantized` was saved to; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "program"
    lopro_fx.save(quantized, folder)
    return folder
