"""Output folder of `quantize --out`: checked before the long work, written in one step after it."""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from lopro_fx.budget import Budget
from lopro_fx.commands.output import write_result
from lopro_fx.errors import CheckpointError, first_line
from lopro_fx.layer import stored_bytes
from lopro_fx.methods.base import Method
from lopro_fx.models.quiet import quiet
from lopro_fx.passes.sites import Selection
from lopro_fx.passes.ties import identity
from lopro_fx.passes.weights import tensor_of
from lopro_fx.store.checkpoint import save
from lopro_fx.store.files import replacing
from lopro_fx.store.journal import delete_journal, require_journal
from lopro_fx.store.manifest import JOURNAL, add_companions, require_ours, written
from lopro_fx.store.tensors import unique

# Bytes that a node of the graph takes in program.json and record.json, with room: 850 to 1500 measured.
_NODE_BYTES = 4096


def journal_of(folder: Path) -> Path:
    """Path of the journal of finished layers: beside `folder`, or inside it where its parent can't take it."""
    folder = Path(os.path.realpath(folder))
    if folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)):
        return folder / JOURNAL
    return folder.with_name(f"{folder.name}.partial")


class Target:
    """Output folder and, beside it, the journal of the run that fills it.

    Raises:
        CheckpointError: the folder holds something that lopro_fx didn't write, or its parent can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = Path(os.path.abspath(folder))
        self.journal = journal_of(folder)
        try:
            require_ours(folder)
            require_journal(self.journal)
            self.journal.parent.mkdir(parents=True, exist_ok=True)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"--out {first_line(error)}") from error

    def require_space(
        self, program: ExportedProgram, selection: Selection, config: Method, budget: Budget | None = None
    ) -> None:
        """Refuse a disk that can't hold the journal and the result.

        Raises:
            CheckpointError: says how much there is and how much is needed.
        """
        taken = {identity(tensor_of(program, site.weight)) for site in selection.sites}
        kept = stored_bytes(tensor for _, tensor in unique(program.state_dict) if identity(tensor) not in taken)
        heads = {site.name for head in selection.heads for site in head.sites}
        packed = sum(site.weights
                     * (config.head_bits + 1 if site.name in heads else config.for_unit([site.name]).most_bits()) / 8
                     for site in selection.sites)  # fmt: skip
        limit = budget and budget.bytes_for(sum(site.weights for site in selection.sites))
        packed = packed if limit is None else limit
        # Packed tensors are in the journal and in the result.
        needed = kept + 2 * math.ceil(packed) + _NODE_BYTES * len(program.graph.nodes)
        free = shutil.disk_usage(self.journal.parent).free
        if free < needed:
            raise CheckpointError(f"--out {self.folder}: {needed:,} bytes are needed there, {free:,} are free")

    def save(self, program: ExportedProgram, companions: Sequence[Any], result: Callable[[], dict[str, Any]]) -> None:
        """Write the program, the `companions` (tokenizer and configurations, each with `save_pretrained`) and
        `report.json` (the figures and one row a layer), then delete the journal.

        Raises:
            CheckpointError: writing failed; nothing is left half-written, and the journal stays.
        """
        from lopro_fx.report import report

        with replacing(self.folder, written) as temporary:
            save(program, temporary)
            with quiet():
                for companion in companions:
                    companion.save_pretrained(temporary)
            write_result(str(temporary / "report.json"), {**result(), "layers": list(report(program).rows)})
            add_companions(temporary)
        delete_journal(self.journal)


def costs(started: float) -> dict[str, float]:
    """Seconds since `started` (of `time.monotonic`) and the process's peak memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.monotonic() - started, "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024}
