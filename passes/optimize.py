"""The passes over a quantised program, in the order in which they help each other."""

from __future__ import annotations

from torch.export import ExportedProgram

from lopro_fx.passes.calls import PackedPass
from lopro_fx.passes.fold_permutation import FoldPermutationPass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass


def optimize(program: ExportedProgram, *, merge: bool = True, fuse: bool = True, fold: bool = True) -> ExportedProgram:
    """Compute the same with fewer nodes.

    What was done, and what was left with the reason, is listed in `graph_module.meta["lopro_fx"]["optimized"]`.

    Args:
        program: from `quantize`, `apply` or `load`. It is not changed.
        merge: packed Linears that read one tensor become one.
        fuse: rotation, down-projection and packed Linear become one `lopro::packed_site`.
        fold: permutations move into the rows of the Linears before, where only elementwise operators are between.

    Returns:
        A new program, whose outputs differ by no more than the order of fp32 sums.

    Raises:
        GraphError: the program holds no packed Linear.
    """
    PackedPass().requires(program)
    passes = ((fold, FoldPermutationPass()), (merge, MergeLinearsPass()), (fuse, FuseSitePass()))
    for wanted, apply in passes:
        if wanted:
            program = apply(program)
    return program
