"""Flags of the methods: one for each setting with a help text, of whichever method."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields

from lopro_fx.errors import ConfigError
from lopro_fx.methods.base import HELP, KIND, Method
from lopro_fx.methods.registry import METHODS, from_dict


def add_method(parser: ArgumentParser) -> None:
    """Add --method and the flags of every method that is registered."""
    parser.add_argument("--method", choices=list(METHODS)[::-1], default="lopro", help="(default: lopro)")
    known = {}
    for method in METHODS.values():
        for field in fields(method):
            # Methods share a flag; its text is that of the first.
            if HELP in field.metadata:
                known.setdefault(field.name, (method, field))
    taken = {option for action in parser._actions for option in action.option_strings}
    for name, (method, field) in known.items():
        flag, text = f"--{name.replace('_', '-')}", field.metadata[HELP].replace("%", "%%")
        if flag in taken:
            raise ConfigError(f"method '{method.name}': its setting '{name}' has the name of another flag, {flag}")
        if isinstance(field.default, tuple):
            parser.add_argument(flag, action="append", metavar="PATTERN", help=text)
        elif choices := field.metadata["choices"]:
            parser.add_argument(flag, choices=choices, help=text)
        else:
            kind = field.metadata[KIND]
            parser.add_argument(flag, type=kind, metavar="NAME" if kind is str else "N", help=text)


def method_of(args: Namespace) -> Method:
    """Make the method that the flags describe, with the settings for language models.

    Raises:
        ConfigError: a flag belongs to another method, or a value is out of range.
    """
    method = METHODS[args.method]
    own = {field.name: field for field in fields(method)}
    flags = {field.name for other in METHODS.values() for field in fields(other) if HELP in field.metadata}
    values = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name not in own:
            raise ConfigError(f"{flag}: {args.method} has no such setting; leave it out")
        kind = own[name].metadata[KIND]
        if not isinstance(value, list):
            try:
                values[name] = kind(str(value))
            except ValueError as error:
                raise ConfigError(f"{flag}: {args.method} takes a {kind.__name__}") from error
    return from_dict({"method": args.method, **method.of_language_models, **values})
