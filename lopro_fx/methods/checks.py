"""Checks of a configuration's values; each raises ConfigError with the value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopro_fx.errors import ConfigError


def choice(config: object, name: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    # 3.0 == 3 and True == 1, but neither is a width.
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): allowed are {', '.join(map(str, allowed))}")


def at_least(config: object, name: str, low: float, high: float = float("inf")) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be a number in [{low:g}, {high:g}]")


def whole(config: object, name: str, low: int, high: int) -> None:
    value = getattr(config, name)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be a whole number in [{low}, {high}]")


def flag(config: object, name: str) -> None:
    value = getattr(config, name)
    if type(value) is not bool:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be True or False")


def patterns(config: object, name: str) -> None:
    """Make a tuple of the patterns; a single one may be a plain string."""
    value = getattr(config, name)
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list, set, frozenset)) or not all(isinstance(item, str) for item in patterns):
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): must be names or patterns, as strings")
    object.__setattr__(config, name, tuple(patterns))


def mapping(config: object, name: str) -> None:
    """Make a plain dict of settings by pattern."""
    value = getattr(config, name)
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) and isinstance(settings, Mapping) for key, settings in value.items()
    ):
        raise ConfigError(
            f"{type(config).__name__}({name}={value!r}): must be settings by pattern, such as "
            "{'*.down_proj': {'bits': 4}}"
        )
    object.__setattr__(config, name, {key: dict(settings) for key, settings in value.items()})
