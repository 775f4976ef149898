"""The shape of a pass over an ExportedProgram, after `torch.fx.passes.infra.pass_base.PassBase` for graphs."""

from __future__ import annotations

from collections import Counter

from torch.export import ExportedProgram

from lopro_fx.kernels.errors import GraphError

# Number of edits by "pass.event"; tests assert on it.
counters: Counter[str] = Counter()


class ProgramPass:
    """`requires` checks the input, `call` returns a new program, `ensures` checks it; the input is not changed."""

    name: str

    def __call__(self, program: ExportedProgram) -> ExportedProgram:
        self.requires(program)
        result = self.call(program)
        self.ensures(result)
        return result

    def requires(self, program: ExportedProgram) -> None:
        """Raise if `program` is not what the pass needs."""

    def call(self, program: ExportedProgram) -> ExportedProgram:
        raise NotImplementedError

    def ensures(self, program: ExportedProgram) -> None:
        """Raise if the result is not what the pass promises."""

    def promise(self, kept: bool, broken: str) -> None:
        """Raise a GraphError that names what is `broken`, unless the promise is `kept`."""
        if not kept:
            raise GraphError(
                f"the pass '{self.name}' made a wrong program: {broken}; a pass or edit before it may be at fault"
            )
