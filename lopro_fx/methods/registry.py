"""Registry of methods, by their names in files and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopro_fx.errors import ConfigError
from lopro_fx.methods.base import Method
from lopro_fx.methods.flrq import FLRQ
from lopro_fx.methods.gptq import GPTQ
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.lrc import LRC
from lopro_fx.methods.lrq import LRQ
from lopro_fx.methods.rtn import RTN
from lopro_fx.methods.tileq import TileQ

METHODS: dict[str, type[Method]] = {}


def register_method(method: type[Method]) -> type[Method]:
    """Register a method; usable as a decorator of its class.

    Raises:
        ConfigError: it is no subclass of Method with a `name` of its own, or another method has that name.
    """
    if not (isinstance(method, type) and issubclass(method, Method) and isinstance(getattr(method, "name", None), str)):
        raise ConfigError(f"register_method({method!r}): give a subclass of Method with a name")
    if method.name in METHODS:
        raise ConfigError(f"method '{method.name}' is registered already")
    METHODS[method.name] = method
    return method


def from_dict(values: Mapping[str, Any]) -> Method:
    """Inverse of `Method.to_dict`."""
    values = dict(values)
    name = values.pop("method", None)
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: known are {', '.join(METHODS)}")
    try:
        return METHODS[name](**values)
    except TypeError as error:
        raise ConfigError(f"{METHODS[name].__name__}: {error}") from error


for _method in (RTN, GPTQ, FLRQ, LoPRo, LRC, LRQ, TileQ):
    register_method(_method)
