"""Tokens per second of a decoder of Llama-2-7B's shape on a GPU: bf16, 2 bits, and 2 bits with rotation and rank 16.

Weights and codes are random, which costs the same time as a trained model's; what it writes means nothing. Every
variant is an exported program of one decode step with a static KV cache, compiled, and replayed from a CUDA graph that
feeds each token back. Variants take turns.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import lopro_fx
from benchmarks.common import RESULTS
from benchmarks.gpu_model import SIZES, Decoder, Size, random_state
from benchmarks.gpu_timing import save, timing

BITS, RANK = 2, 16
SPEED_BAR, KEPT_BAR = 2.5, 0.95
PLAIN, WHOLE = f"{BITS} bits", f"{BITS} bits, rotation, rank {RANK}"
TOLERANCE = 5e-2
_STEPS = 16
Row = dict[str, Any]


class Loop:
    """Greedy decoding with one program; everything between two tokens happens on the device."""

    def __init__(self, program: ExportedProgram, batch: int, size: Size, device: torch.device, eager: bool) -> None:
        self.module, self.size, self.device = program.module(), size, device
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._run: Callable[..., Tensor] = self.module if eager else torch.compile(self.module, fullgraph=True)
        self.error = self._compare()
        self._advance = self._captured() if device.type == "cuda" else self._step
        self.restart()

    def restart(self) -> None:
        """Back to an empty cache."""
        self.ids.zero_()
        self.position.zero_()
        for name, buffer in self.module.named_buffers():
            if name.rpartition(".")[2] in ("keys", "values"):
                buffer.zero_()
        self._done = 0

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of `steps`."""
        if self._done + steps > self.size.length:
            self.restart()
        self._done += steps
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            self._advance()
        self._wait()
        return (time.perf_counter() - started) / steps

    def _step(self) -> None:
        logits = self._run(self.ids, self.position)
        self.ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def _captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.restart()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _compare(self) -> float:
        """Relative RMS of the compiled program's logits beside the eager ones, over three tokens."""
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.size.vocab, (3, *self.ids.shape), generator=rng).to(self.device)
        logits = []
        for run in (self.module, self._run):
            self.restart()
            for token in tokens:
                out = run(token, self.position).double()
                self.position.add_(1)
            logits.append(out)
        return ((logits[1] - logits[0]).norm() / logits[0].norm()).item()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def programs(model: Decoder, batch: int, device: torch.device) -> dict[str, ExportedProgram]:
    """The decode step for a batch, by variant."""
    model.allocate(batch)
    example = (
        torch.zeros(batch, 1, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    program = torch.export.export(model, example, strict=False)
    found = {"bf16": program}
    for name, rank in ((PLAIN, 0), (WHOLE, RANK)):
        found[name] = lopro_fx.optimize(lopro_fx.apply(program, random_state(program, BITS, rank, device)))
    return found


def weight_bytes(program: ExportedProgram) -> int:
    """Bytes that one step reads of its weights: all but the table of embeddings."""
    return sum(tensor.nbytes for name, tensor in program.state_dict.items() if not name.startswith("embed"))


def compare(model: Decoder, batch: int, size: Size, device: torch.device, rounds: int, eager: bool) -> list[Row]:
    """Time every variant at one batch."""
    loops, rows = {}, {}
    for name, program in programs(model, batch, device).items():
        started = time.perf_counter()
        loops[name] = Loop(program, batch, size, device, eager)
        rows[name] = {"batch": batch, "variant": name, "weight_bytes": weight_bytes(program),
                      "error": loops[name].error, "correct": loops[name].error <= TOLERANCE}  # fmt: skip
        print(f"batch {batch}, {name}: ready after {time.perf_counter() - started:.0f} s", flush=True)
    steps = min(_STEPS, size.length)
    for loop in loops.values():
        loop.seconds(steps)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds[name].append(loop.seconds(steps))
    for name, row in rows.items():
        taken = timing(seconds[name])
        row |= {"milliseconds": taken.median * 1e3, "range": [taken.low * 1e3, taken.high * 1e3],
                "tokens_per_second": batch / taken.median}  # fmt: skip
    for name in (PLAIN, WHOLE):
        rows[name]["speed_beside_bf16"] = rows[name]["tokens_per_second"] / rows["bf16"]["tokens_per_second"]
    kept = rows[WHOLE]["tokens_per_second"] / rows[PLAIN]["tokens_per_second"]
    bars = [("speed kept with rotation and rank", kept, KEPT_BAR)]
    if batch == 1:
        bars.append(("beside bf16", rows[WHOLE]["speed_beside_bf16"], SPEED_BAR))
    rows[WHOLE]["bars"] = [
        {"what": what, "value": value, "bar": bar, "pass": value >= bar} for what, value, bar in bars
    ]
    return list(rows.values())


def show(row: Row) -> None:
    """One line of the table, and one for each bar."""
    low, high = row["range"]
    line = (f"batch {row['batch']:3} {row['variant']:28} {row['tokens_per_second']:10.1f} tokens/s "
            f"{row['milliseconds']:8.3f} ms ({low:.3f}-{high:.3f})  error {row['error']:.1e}")  # fmt: skip
    if "speed_beside_bf16" in row:
        line += f"  {row['speed_beside_bf16']:.2f}x bf16"
    print(line if row["correct"] else f"{line}  WRONG")
    for bar in row.get("bars", ()):
        print(f"{'':10}{bar['what']}: {bar['value']:.3f}, bar {bar['bar']:.2f}: {'pass' if bar['pass'] else 'FAIL'}")


def build(size: Size, device: torch.device) -> nn.Module:
    """The decoder with random bf16 parameters, made where it will run."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Decoder(size).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.gpu_decoder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has; not saved without --out")
    parser.add_argument("--rounds", type=int, default=50, help=f"timed runs of {_STEPS} tokens")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out; not saved without --out")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy size, on the CPU too, to try the script; never saved"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        print("gpu_decoder needs a CUDA device; --tiny tries it on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES["tiny" if args.tiny else "llama-2-7b"]
    if args.layers:
        size = size._replace(layers=args.layers)
    folder = args.out or (None if args.eager or args.layers else RESULTS)
    torch.manual_seed(0)
    print("random weights and codes: speed alone means something here")
    model, rows = build(size, device), []
    for batch in args.batches:
        with torch.no_grad():
            found = compare(model, batch, size, device, args.rounds, args.eager)
        for row in found:
            show(row)
        rows += found
        if folder and not args.tiny:
            save("gpu_decoder", folder, rows, shape=size._asdict(), rounds=args.rounds, steps=_STEPS, eager=args.eager,
                 group_size=128, weights="random")  # fmt: skip
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
