"""What is asked of one architecture: each step is compared with transformers' own model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

import lopro_fx
from benchmarks.family_models import VOCAB, tiny_model
from lopro_fx.layer import dense_weight
from lopro_fx.models.export import export_view
from lopro_fx.passes.linears import as_linears
from lopro_fx.passes.lookups import size_ranges, user_placeholders
from lopro_fx.selection import select

STEPS = ("quantises", "program", "generates", "folder")
COLUMNS = ("exports", *(f"{step}/{bits}" for bits in (0, 8) for step in STEPS))
TOLERANCE = 1e-3
_FIRST = 4  # the first id that has no meaning of its own
_NEW, _LENGTHS = 6, (5, 9)

Send = Callable[[str, str], None]


class Wrong(Exception):
    """Logits are not what they should be."""


def check(architecture: str, send: Send) -> None:
    """Call `send(column, status)` for every column that can be reached, in order."""
    causal = architecture.startswith("causal")
    try:
        model = _settled(tiny_model(architecture))
    except Exception as error:  # whatever the configuration makes transformers raise
        return send("exports", f"no model: {_line(error)}")
    export: dict[str, Any] = {}
    if not _step(send, "exports", lambda: export.update(_exported(model, causal))):
        return None
    for bits in (0, 8):
        _quantised(model, export, causal, bits, send)
    return None


@torch.no_grad()
def _settled(model: Any) -> Any:
    """The model as transformers loads it from its own files, where not all that a random one holds may lie."""
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        model = _class(model).from_pretrained(path).eval()
    first, second = (_logits(model(input_ids=_ids(2, 12))) for _ in range(2))
    if not torch.equal(first, second):
        raise Wrong("the model's own logits differ from run to run")
    return model


def _exported(model: Any, causal: bool) -> dict[str, Any]:
    sizes = [(2, 12), (1, 5), (3, 17)]
    if causal:
        program = lopro_fx.models.export_causal_lm(model)
    else:
        plain = type(model).forward
        free: Any = {"input_ids": {0: Dim("batch", min=1), 1: Dim("sequence", min=2, max=64)}}
        for shapes in (free, {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}):
            try:
                program = export_view(
                    model, lambda self, input_ids: _logits(plain(self, input_ids=input_ids)), (_ids(2, 12),), shapes
                )
                break
            except lopro_fx.ModelError as error:
                first = error
        else:
            raise first
    ranges = size_ranges(program, user_placeholders(program)[0])
    sizes = [size for size in sizes if all(low <= n <= high for n, (low, high) in zip(size, ranges, strict=True))]
    if not sizes:
        sizes = [tuple(int(min(max(n, low), high)) for n, (low, high) in zip((2, 12), ranges, strict=True))]
    _compare("program", program.module(), model, sizes)
    return {"program": program, "sizes": sizes}


def _quantised(model: Any, export: dict[str, Any], causal: bool, bits: int, send: Send) -> None:
    program, sizes = export["program"], export["sizes"]
    common: dict[str, Any] = {"bits": 4, "group_size": 32, "clip_steps": 2, "head_bits": bits}
    # Both methods in turn: what they leave in a program and in a folder differs.
    config = lopro_fx.RTN(**common) if bits else lopro_fx.LoPRo(**common, rank=2, refits=0, sweeps=0)
    made: dict[str, Any] = {}

    def quantises() -> None:
        batches = [(_ids(*sizes[0], seed=seed),) for seed in range(1, 4)]
        made["state"] = lopro_fx.calibrate(program, batches, config, progress=lambda *_: None)

    if not _step(send, f"quantises/{bits}", lambda: select(as_linears(program), config)):
        return
    if not _step(send, f"quantises/{bits}", quantises, late=True):
        return
    state = made["state"]

    def applied() -> None:
        made["twin"] = _twin(model, state)
        _compare("program", lopro_fx.apply(program, state).module(), made["twin"], sizes)

    def folder() -> None:
        with tempfile.TemporaryDirectory() as path:
            # Rounded activations would differ from the twin by more than what is looked for.
            lopro_fx.save_pretrained(model, state, path, activations="float")
            loaded = _class(model).from_pretrained(path)
        _compare("folder", lambda ids: _logits(loaded(input_ids=ids)), made["twin"], sizes)

    _step(send, f"program/{bits}", applied, late=True)
    if causal and "twin" in made:

        def exported() -> None:
            if "programs" not in export:
                export["programs"] = lopro_fx.export_for_generation(model, max_cache_len=32, batch_size=2)

        def generates() -> None:
            _generate(export["programs"].map(lambda part: lopro_fx.apply(part, state)), made["twin"])

        if _step(send, f"generates/{bits}", exported):
            _step(send, f"generates/{bits}", generates, late=True)
    if "twin" in made:
        _step(send, f"folder/{bits}", folder, late=True)


@torch.no_grad()
def _generate(programs: Any, twin: Any) -> None:
    """Both prompts alone and padded to one length, their tokens given, against what transformers makes of each."""
    runner = lopro_fx.Generator.from_programs(programs)
    prompts = [_ids(1, length, seed=length) for length in _LENGTHS]
    references = [_reference(twin, prompt) for prompt in prompts]
    longest = max(_LENGTHS)
    padding = torch.tensor([longest - length for length in _LENGTHS])
    padded = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0), value=0) for p in prompts])
    together = _steps(runner, padded, padding, torch.cat([tokens for tokens, _ in references]))
    for row, (prompt, (tokens, logits)) in enumerate(zip(prompts, references, strict=True)):
        theirs = _error(logits, _generated(twin, prompt))
        alone = _steps(runner, prompt.repeat(2, 1), None, tokens.repeat(2, 1))
        for name, got in (("alone", alone[0]), ("padded", together[row])):
            errors = {"prefill": _error(logits[:1], got[:1]), "decode": _error(logits[1:], got[1:])}
            for part, error in errors.items():
                if not error <= TOLERANCE:
                    raise Wrong(f"{name}, {part}: {error:.1e} (transformers with its cache: {theirs:.1e})")


def _steps(runner: Any, ids: Tensor, padding: Tensor | None, tokens: Tensor) -> Tensor:
    """Logits (rows, steps, vocabulary) after the prompt and after each of the tokens but the last."""
    runner.reset()
    logits = [runner.prefill(ids, padding)]
    logits += [runner.decode(tokens[:, step : step + 1]) for step in range(tokens.shape[1] - 1)]
    return torch.stack(logits, 1)


def _reference(twin: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy tokens, (1, steps), and logits (steps, vocabulary) of transformers' model without a cache."""
    ids, tokens = prompt, torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(_NEW):
        logits = _logits(twin(input_ids=ids, use_cache=False))[0, prompt.shape[1] - 1 :]
        chosen = logits[-1:, _FIRST:].argmax(-1, keepdim=True) + _FIRST
        ids, tokens = torch.cat([ids, chosen], 1), torch.cat([tokens, chosen], 1)
    return tokens, logits


def _generated(twin: Any, prompt: Tensor) -> Tensor:
    """Logits (steps, vocabulary) of transformers' own greedy generation, with its cache."""
    made = twin.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_NEW, do_sample=False, eos_token_id=None,
        forced_eos_token_id=None, forced_bos_token_id=None, pad_token_id=0, suppress_tokens=list(range(_FIRST)),
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(made.logits)


@torch.no_grad()
def _compare(name: str, got: Callable[[Tensor], Tensor], twin: Any, sizes: list[tuple[int, int]]) -> None:
    for size in sizes:
        ids = _ids(*size, seed=size[1])
        error = _error(_logits(twin(input_ids=ids)), got(ids))
        if not error <= TOLERANCE:
            raise Wrong(f"{name} {size[0]}x{size[1]}: {error:.1e}")


def _twin(model: Any, state: Any) -> Any:
    """The model with the weights that the packed ones stand for."""
    twin = copy.deepcopy(model)
    weights = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, site in state.layers.items():
            dense = dense_weight(state.inputs[site.input], site)
            weight = weights[f"{name}.weight" if f"{name}.weight" in weights else name]
            # Some are stored transposed, and of a square one the shape doesn't tell.
            forms = [form for form in (dense, dense.mT) if form.shape == weight.shape]
            weight.copy_(min(forms, key=lambda form: (form - weight).norm()))
    return twin


def _step(send: Send, column: str, work: Callable[[], Any], late: bool = False) -> bool:
    """Run a step and send how it went; whether it went well."""
    send("step", column)
    try:
        work()
    except Wrong as error:
        send(column, f"WRONG: {error}")
    except lopro_fx.LoProError as error:
        send(column, f"refused{' late' if late else ''}: {_line(error)}")
    except Exception as error:  # whatever tracing and running a model may raise
        send(column, f"crash: {type(error).__name__}: {_line(error)}")
    else:
        send(column, "ok")
        return True
    return False


def _class(model: Any) -> Any:
    """The automatic class that finds this one, as a user would load it, or the class itself."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    found = (auto for auto in (AutoModelForCausalLM, AutoModelForMaskedLM) if type(model.config) in auto._model_mapping)
    return next((auto for auto in found if auto._model_mapping[type(model.config)] is type(model)), type(model))


def _ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(_FIRST, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def _error(reference: Tensor, got: Tensor) -> float:
    """Relative RMS error; NaN where anything is not finite."""
    wide = reference.double()
    return ((got.double() - wide).norm() / wide.norm()).item()


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
