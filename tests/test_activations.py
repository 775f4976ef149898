"""One default for the one switch of the CPU kernel's activations."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser

import pytest

import lopro_fx
from lopro_fx.commands import bench, export


def test_every_function_with_the_choice_makes_the_same() -> None:
    functions = [value for name in lopro_fx.__all__ if inspect.isfunction(value := getattr(lopro_fx, name))]
    defaults = {
        function.__name__: signature.parameters["activations"].default
        for function in functions
        if "activations" in (signature := inspect.signature(function)).parameters
    }
    assert defaults.keys() >= {"optimize", "package", "pack_model", "save_pretrained"}
    assert set(defaults.values()) == {"int8"}
    # None is what the folder says, else the same.
    assert inspect.signature(lopro_fx.LoProConfig).parameters["activations"].default is None
    assert lopro_fx.LoProConfig().activations == "int8"


def test_the_command_line_takes_what_the_functions_take() -> None:
    for command, arguments in ((export, ["folder", "--hf", "out"]), (bench, ["folder"])):
        parser = ArgumentParser()
        command.add(parser)
        # None is what no option was given for: the function's own default is taken.
        assert parser.parse_args(arguments).activations in ("int8", None)
        for choice in ("int8", "float"):
            assert parser.parse_args([*arguments, "--activations", choice]).activations == choice
        with pytest.raises(SystemExit):
            parser.parse_args([*arguments, "--activations", "int4"])
