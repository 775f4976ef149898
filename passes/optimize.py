"""The passes over a quantised program, in the order in which they help each other."""

from __future__ import annotations

from torch.export import ExportedProgram

from lopro_fx.kernels.activation.delivery import ACTIVATIONS, DEFAULT
from lopro_fx.kernels.errors import ConfigError
from lopro_fx.passes.calls import PackedPass
from lopro_fx.passes.fold_permutation import FoldPermutationPass
from lopro_fx.passes.fuse_activation import FuseActivationPass
from lopro_fx.passes.fuse_prologue import FuseProloguePass
from lopro_fx.passes.fuse_residual import FuseResidualPass
from lopro_fx.passes.fuse_site import FuseSitePass
from lopro_fx.passes.merge import MergeLinearsPass
from lopro_fx.passes.native_cpu import NativeCpuPass


def optimize(
    program: ExportedProgram,
    *,
    merge: bool = True,
    fuse: bool = True,
    fold: bool = True,
    prologue: bool = True,
    residual: bool = True,
    target: str | None = None,
    activations: str = DEFAULT,
) -> ExportedProgram:
    """Fuse the nodes of a quantised program; with the target "cpu", round activations to 8 bits by default.

    `graph_module.meta["lopro_fx"]["optimized"]` lists what each pass did, and what it skipped with the reason.

    Args:
        program: from `quantize`, `apply` or `load`. It is not changed.
        merge: packed Linears that read one tensor become one.
        fuse: rotation, down-projection and packed Linear become one `lopro::packed_site`; a rounded activation and the
            packed Linear that reads it become one `lopro::packed_int8`.
        fold: permutations move into the rows of preceding Linears, if only elementwise operators are between.
        prologue, residual: with the target "cuda", fuse norms and gated activations before a site, and sums after it.
        target: "cuda" or "cpu". "cpu" makes every packed Linear its format's operator for CPUs, such as
            `lopro::cpu_site`: compiled code where a C++ compiler is found. Such a program runs on CPUs fast, elsewhere
            slowly. None means "cuda" for a program on a GPU, otherwise operators that run on every device.
        activations: of layers whose activations the program doesn't round, with the target "cpu". "int8", the default
            of every function that has the choice, rounds the input of a packed gemm to 8 bits, with one scale per token
            and block of at most 128 columns. It adds 0.05 to 0.2 % to the perplexity of language models and is two to
            four times faster. "float" rounds nothing.

    Returns:
        A new program. Without "int8" its outputs differ only by the order of fp32 sums and by fewer roundings to 16-bit
        types: values inside a site are not rounded.

    Raises:
        ConfigError: `target` or `activations` is unknown.
        GraphError: the program holds no packed Linear.
    """
    if target not in (None, "cpu", "cuda"):
        raise ConfigError(f'target is \'{target}\'; give "cuda", "cpu" or None')
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations is '{activations}'; known: {', '.join(ACTIVATIONS)}")
    PackedPass().requires(program)
    if target is None and any(tensor.is_cuda for tensor in program.state_dict.values()):
        target = "cuda"
    passes = (
        (fold, FoldPermutationPass()),
        (merge, MergeLinearsPass()),
        (fuse and target != "cpu", FuseActivationPass()),
        (fuse, FuseSitePass(experts=target == "cuda")),
        (prologue and target == "cuda", FuseProloguePass()),
        (residual and target == "cuda", FuseResidualPass()),
        (target == "cpu", NativeCpuPass(ACTIVATIONS[activations])),
    )
    for wanted, apply in passes:
        if wanted:
            program = apply(program)
    return program
