"""Check that transformers is installed and recent enough."""

from __future__ import annotations

from lopro_fx.errors import ModelError

OLDEST = (5, 17)


def require_transformers(what: str, oldest: tuple[int, int] = OLDEST) -> None:
    """Refuse a process without transformers, or with one that is too old for `what`.

    Raises:
        ModelError: says what to install.
    """
    wanted = ".".join(map(str, oldest))
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{what} needs transformers {wanted} or newer: pip install 'lopro_fx[hf]'") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < oldest:
        raise ModelError(
            f"{what} needs transformers {wanted} or newer, found {transformers.__version__}: "
            f"pip install 'transformers>={wanted}'"
        )
