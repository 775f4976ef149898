"""Hugging Face in and out. Importing this imports no transformers: what needs it is made when it is asked for."""

from __future__ import annotations

from typing import Any

from lopro_fx.huggingface.hook import when_imported
from lopro_fx.huggingface.save import pack_model, save_pretrained
from lopro_fx.huggingface.versions import require_transformers

__all__ = ["pack_model", "save_pretrained"]


def _register() -> None:
    from lopro_fx.huggingface.quantizer import register

    register()


# transformers asks its registry for the quantizer that a folder names; whoever imports lopro_fx finds ours there,
# whichever of the two comes first.
when_imported("transformers.quantizers.auto", _register)


def __getattr__(name: str) -> Any:
    if name == "LoProConfig":
        require_transformers("LoProConfig")
        # Registers, which imports the module below as a whole; importing that first would meet itself half-way.
        import transformers.quantizers.auto  # noqa: F401

        from lopro_fx.huggingface.quantizer import LoProConfig

        return LoProConfig
    if name == "LoProQuantizer":
        require_transformers("LoProQuantizer", (5, 23))
        from lopro_fx.huggingface.exporter import LoProQuantizer

        return LoProQuantizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
