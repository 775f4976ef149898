"""Flags of the methods: one for each setting with a help text, of whichever method."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields

from lopro_fx.errors import ConfigError
from lopro_fx.methods.base import HELP, Method
from lopro_fx.methods.registry import METHODS, from_dict


def add_method(parser: ArgumentParser) -> None:
    """Add --method and the flags of every method that is registered."""
    parser.add_argument("--method", choices=list(METHODS)[::-1], default="lopro", help="(default: lopro)")
    known = {field.name: field for method in METHODS.values() for field in fields(method) if HELP in field.metadata}
    for name, field in known.items():
        flag, text = f"--{name.replace('_', '-')}", field.metadata[HELP]
        if isinstance(field.default, tuple):
            parser.add_argument(flag, action="append", metavar="PATTERN", help=text)
        elif choices := field.metadata["choices"]:
            parser.add_argument(flag, choices=choices, help=text)
        else:
            parser.add_argument(flag, type=type(field.default), metavar="N", help=text)


def method_of(args: Namespace) -> Method:
    """Make the method that the flags describe, with the settings for language models.

    Raises:
        ConfigError: a flag belongs to another method, or a value is out of range.
    """
    method = METHODS[args.method]
    own = {field.name for field in fields(method)}
    flags = {field.name for other in METHODS.values() for field in fields(other) if HELP in field.metadata}
    values = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    for name, value in values.items():
        if name not in own:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {args.method} has no such setting; leave it out")
    return from_dict({"method": args.method, **method.of_language_models, **values})
