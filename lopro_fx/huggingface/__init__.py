"""Hugging Face in and out. Importing this doesn't import transformers, which is imported on first use."""

from __future__ import annotations

from typing import Any

from lopro_fx.huggingface.hook import when_imported
from lopro_fx.huggingface.save import pack_model, save_pretrained
from lopro_fx.huggingface.versions import require_transformers
from lopro_fx.models import routed

__all__ = ["pack_model", "save_pretrained"]


def _register() -> None:
    from lopro_fx.huggingface.quantizer import register

    register()


# transformers looks up a folder's quantizer in its registry; ours is there whichever of lopro_fx and transformers is
# imported first.
when_imported("transformers.quantizers.auto", _register)
when_imported("transformers.integrations.moe", routed.register)


def __getattr__(name: str) -> Any:
    if name == "LoProConfig":
        require_transformers("LoProConfig")
        # This import registers, which imports the module below; importing that one first would be circular.
        import transformers.quantizers.auto  # noqa: F401

        from lopro_fx.huggingface.quantizer import LoProConfig

        return LoProConfig
    if name == "LoProQuantizer":
        require_transformers("LoProQuantizer", (5, 23))
        from lopro_fx.huggingface.exporter import LoProQuantizer

        return LoProQuantizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
