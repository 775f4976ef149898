"""The passes over a quantised program, in the order in which they help each other."""

from __future__ import annotations

from torch.export import ExportedProgram

from lopro_fx.kernels.errors import ConfigError
from lopro_fx.passes.calls import PackedPass
from lopro_fx.passes.fold_permutation import FoldPermutationPass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.native_cpu import NativeCpuPass

# Bits of a rounded activation by what `optimize` calls it.
_ACTIVATIONS = {"int8": 8, "float": 0}


def optimize(
    program: ExportedProgram,
    *,
    merge: bool = True,
    fuse: bool = True,
    fold: bool = True,
    target: str | None = None,
    activations: str = "int8",
) -> ExportedProgram:
    """Compute the same with fewer nodes.

    What was done, and what was left with the reason, is listed in `graph_module.meta["lopro_fx"]["optimized"]`.

    Args:
        program: from `quantize`, `apply` or `load`. It is not changed.
        merge: packed Linears that read one tensor become one.
        fuse: rotation, down-projection and packed Linear become one `lopro::packed_site`.
        fold: permutations move into the rows of the Linears before, where only elementwise operators are between.
        target: "cpu" makes every packed Linear a `lopro::cpu_site`, compiled code where a C++ compiler is found. Such
            a program runs on CPUs fast, elsewhere slowly. None keeps operators for every device.
        activations: with a target, "int8" rounds what a packed product reads to 8 bits, with a scale a token and block
            of at most 128 columns; "float" keeps it.

    Returns:
        A new program, whose outputs differ by no more than the order of fp32 sums, and the rounding of activations.

    Raises:
        ConfigError: `target` or `activations` is unknown.
        GraphError: the program holds no packed Linear.
    """
    if target not in (None, "cpu"):
        raise ConfigError(f"target is '{target}'; give \"cpu\" or None")
    if activations not in _ACTIVATIONS:
        raise ConfigError(f"activations is '{activations}'; known: {', '.join(_ACTIVATIONS)}")
    PackedPass().requires(program)
    passes = (
        (fold, FoldPermutationPass()),
        (merge, MergeLinearsPass()),
        (fuse, FuseSitePass()),
        (target == "cpu", NativeCpuPass(_ACTIVATIONS[activations])),
    )
    for wanted, apply in passes:
        if wanted:
            program = apply(program)
    return program
