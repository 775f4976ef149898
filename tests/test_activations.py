"""One default for the one switch of the CPU kernel's activations."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser

import lopro_fx
from lopro_fx.commands import bench, export
from lopro_fx.kernels.cpu_site.activations import ACTIVATIONS, DEFAULT


def test_every_function_with_the_choice_makes_the_same() -> None:
    functions = [value for name in lopro_fx.__all__ if inspect.isfunction(value := getattr(lopro_fx, name))]
    functions.append(lopro_fx.LoProConfig)
    defaults = {
        function.__name__: signature.parameters["activations"].default
        for function in functions
        if "activations" in (signature := inspect.signature(function)).parameters
    }
    assert defaults.keys() >= {"optimize", "package", "pack_model", "save_pretrained", "LoProConfig"}
    assert set(defaults.values()) == {DEFAULT}


def test_the_command_line_takes_what_the_functions_take() -> None:
    for command, arguments in ((export, ["folder", "--hf", "out"]), (bench, ["folder"])):
        parser = ArgumentParser()
        command.add(parser)
        assert parser.parse_args(arguments).activations in (DEFAULT, None)
        for choice in ACTIVATIONS:
            assert parser.parse_args([*arguments, "--activations", choice]).activations == choice
