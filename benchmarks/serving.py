"""Serving on a CPU: prefill and decode of our packages against llama.cpp and against torch.compile in bf16.

llama.cpp is reached through `llama-cpp-python`, built on this machine for its processor and installed in an
environment of its own (`--llama-python` names its interpreter); nothing in lopro_fx needs it. Models: SmolLM2-135M, and
random ones: of the shape of Llama-3.2-1B with a vocabulary of 32768 (`wide`), and a Mixtral (`moe`). Both sides start
from the same float32 weights, get the same token ids, and choose greedily.

    python -m benchmarks.serving prepare --llama-python PYTHON [names of files, e.g. wide/3.pt2]
    python -m benchmarks.serving run --llama-python PYTHON [names of rows]

With `--ik-python`, an interpreter that has `ik-llama-cpp-python`, rows of types that need an importance matrix, and of
mixtures, run in ik_llama.cpp, with random codes.

Every side is a process of its own. All sides of a row are warm at once and their repetitions alternate, in turn
forwards and backwards, so that what else happens on the machine hits them alike; a ratio is one of medians of one run.
Decoding: 64 tokens after a prompt of 32, which is not timed. Prefill: 512 tokens, logits of the last. llama.cpp runs
with flash attention, which is the faster choice here, and keeps its cache in fp16.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, save_result
from benchmarks.serving_child import Child
from benchmarks.serving_models import build, folder

RANDOM = ("IQ2_XXS.ik", "IQ3_XXS.ik", "IQ2_KT.ik", "IQ3_KT.ik")
DRAWN = (*RANDOM, "Q4_0.ik")
GGUF = {
    "smollm2": ("Q4_0",),
    "wide": ("Q2_K", "Q3_K_S", "Q4_0", *RANDOM),
    "moe": ("Q4_0.ik", "IQ2_XXS.ik"),
}
PACKAGES = {
    "smollm2": {"3": ("affine", 3), "4": ("affine", 4)},
    "wide": {
        "2": ("affine", 2), "3": ("affine", 3), "4": ("affine", 4),
        "trellis-2": ("trellis", 2), "trellis-3": ("trellis", 3), "trellis-4": ("trellis", 4),
    },
    "moe": {"2": ("affine", 2), "4": ("affine", 4)},
}  # fmt: skip
GROUP, RANK, HEAD = 128, 16, 8
CACHE, DECODED, PROMPT, LONG_PROMPT = 640, 64, 32, 512


@dataclass(frozen=True)
class Row:
    """`ours` and `theirs` are files of the model's folder; `bar` is what ours / theirs should reach."""

    model: str
    task: str
    ours: str
    theirs: str
    bar: float


ROWS = {
    "decode-smollm2-4": Row("smollm2", "decode", "4.pt2", "Q4_0.gguf", 1.0),
    "prefill-smollm2-4": Row("smollm2", "prefill", "4.pt2", "Q4_0.gguf", 1.0),
    "decode-smollm2-4-bf16": Row("smollm2", "decode", "4.pt2", "bf16", 2.0),
    "decode-wide-2": Row("wide", "decode", "2.pt2", "Q2_K.gguf", 1.1),
    "decode-wide-3": Row("wide", "decode", "3.pt2", "Q3_K_S.gguf", 1.1),
    "decode-wide-4": Row("wide", "decode", "4.pt2", "Q4_0.gguf", 1.0),
    "decode-wide-2-bf16": Row("wide", "decode", "2.pt2", "bf16", 2.0),
    "decode-wide-3-bf16": Row("wide", "decode", "3.pt2", "bf16", 2.0),
    "decode-wide-4-bf16": Row("wide", "decode", "4.pt2", "bf16", 2.0),
    "decode-wide-2-trellis": Row("wide", "decode", "trellis-2.pt2", "2.pt2", 0.85),
    "decode-wide-3-trellis": Row("wide", "decode", "trellis-3.pt2", "3.pt2", 0.65),
    "decode-wide-4-trellis": Row("wide", "decode", "trellis-4.pt2", "4.pt2", 0.8),
    "prefill-wide-3-trellis": Row("wide", "prefill", "trellis-3.pt2", "3.pt2", 0.9),
    "decode-wide-2-iq": Row("wide", "decode", "trellis-2.pt2", "IQ2_XXS.ik.gguf", 1.0),
    "decode-wide-3-iq": Row("wide", "decode", "trellis-3.pt2", "IQ3_XXS.ik.gguf", 1.0),
    "decode-wide-2-kt": Row("wide", "decode", "trellis-2.pt2", "IQ2_KT.ik.gguf", 1.0),
    "decode-wide-3-kt": Row("wide", "decode", "trellis-3.pt2", "IQ3_KT.ik.gguf", 1.0),
    "decode-moe-4-ik": Row("moe", "decode", "4.pt2", "Q4_0.ik.gguf", 1.0),
    "decode-moe-2-ik": Row("moe", "decode", "2.pt2", "IQ2_XXS.ik.gguf", 1.0),
    "prefill-moe-4-ik": Row("moe", "prefill", "4.pt2", "Q4_0.ik.gguf", 1.0),
    "memory-smollm2-3": Row("smollm2", "memory", "3.pt2", "bf16", 0.5),
    "memory-wide-3": Row("wide", "memory", "3.pt2", "bf16", 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run"))
    parser.add_argument("names", nargs="*", help=f"files, or rows out of {', '.join(ROWS)}; default all")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python")
    parser.add_argument(
        "--ik-python", help="interpreter that has ik-llama-cpp-python, for rows that end in -iq, -kt or -ik"
    )
    parser.add_argument("--work", help="folder of models and packages; default in lopro_fx's cache")
    parser.add_argument("--result", default="serving", help="name of the result file; one holds rows of one processor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--mode", default="freezing", help="of torch.compile, see serving_bf16.py")
    args = parser.parse_intermixed_args()  # names may follow options
    torch.set_num_threads(args.threads)
    if args.command == "prepare":
        for model in GGUF:
            prepare(model, args)
        return
    # Read again at each row, so that rows can be redone one by one.
    for name in args.names or ROWS:
        result = {"row": name, **measure(ROWS[name], args)}
        print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict)}), flush=True)
        path = RESULTS / f"{args.result}.json"
        done = {old["row"]: old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
        save_result(args.result, list({**done, name: result}.values()), threads=args.threads, prompt=PROMPT,
                    decoded=DECODED, long_prompt=LONG_PROMPT, group_size=GROUP, rank=RANK, head_bits=HEAD)  # fmt: skip


def prepare(name: str, args: argparse.Namespace) -> None:
    """Make the files of a model that are absent."""
    place = folder(name, args.work)
    place.mkdir(parents=True, exist_ok=True)
    ggufs = [place / f"{kind}.gguf" for kind in GGUF[name]]
    packages = {place / f"{stem}.pt2": kind for stem, kind in PACKAGES[name].items()}
    missing = [path for path in (*ggufs, *packages, place / "bf16") if not path.exists()]
    if args.names:
        missing = [path for path in missing if f"{name}/{path.name}" in args.names]
    if not missing:
        return
    model = build(name)
    for path in missing:
        started = time.perf_counter()
        if path in packages:
            _package(model, *packages[path], path)
        elif path.stem in DRAWN:
            from benchmarks.serving_gguf import write_random

            write_random(model, path, path.name.partition(".")[0])
        elif path.suffix == ".gguf":
            _quantize_gguf(model, path, args.llama_python)
        else:
            build(name).to(torch.bfloat16).save_pretrained(path)
        print(f"{path}: {time.perf_counter() - started:.0f} s", flush=True)


def _package(model: Any, format: str, bits: int, path: Path) -> None:
    import lopro_fx
    from benchmarks.serving_state import rounded_state

    group = {"group_size": GROUP} if format == "affine" else {}
    config = lopro_fx.LoPRo(format=format, bits=bits, rank=RANK, head_bits=HEAD, **group)
    programs = lopro_fx.export_for_generation(model, max_cache_len=CACHE)
    state = rounded_state(programs.decode, config)
    lopro_fx.package(programs.map(lambda program: lopro_fx.apply(program, state)), path)


def _quantize_gguf(model: Any, path: Path, python: str | None) -> None:
    from benchmarks.serving_gguf import write_gguf

    source = path.with_name("f32.gguf")
    if not source.exists():
        write_gguf(model, source)
    interpreter = _interpreter(python, "--llama-python", path)
    command = [interpreter, "-m", "benchmarks.serving_llama", "quantize", str(source), str(path), path.stem]
    subprocess.run(command, cwd=ROOT, check=True)


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result: both sides, each repetition's seconds or the peak bytes, and their ratio."""
    place = folder(row.model, args.work)
    vocabulary = json.loads((place / "bf16" / "config.json").read_text())["vocab_size"]
    length = LONG_PROMPT if row.task == "prefill" else PROMPT
    request: dict[str, Any] = {"prompt": random.Random(0).choices(range(vocabulary), k=length)}
    if row.task != "prefill":
        request["tokens"] = DECODED
    task = "prefill" if row.task == "prefill" else "decode"
    mode = "eager" if row.task == "memory" else args.mode
    files = [place / row.ours, place / row.theirs]
    with ExitStack() as stack:
        sides = [stack.enter_context(_start(path, mode, args)) for path in files]
        for side in sides:  # compiles, and reads the weights from the disk
            side.ask(task, **request)
        seconds: list[list[float]] = [[], []]
        for repetition in range(0 if row.task == "memory" else args.repetitions):
            for index in (0, 1) if repetition % 2 == 0 else (1, 0):
                time.sleep(0.05)  # the other side's threads may spin for a moment after their last product
                seconds[index].append(sides[index].ask(task, **request)["seconds"])
        infos = [side.ask("info") for side in sides]
    records = [{"info": info, **_size(path)} for info, path in zip(infos, files, strict=True)]
    result = {"bar": row.bar, "ours": records[0], "theirs": records[1]}
    if row.task == "memory":
        peaks = [info["peak_rss_bytes"] for info in infos]
        return {**result, "peak_rss_mb": [peak / 1e6 for peak in peaks], "ratio": peaks[0] / peaks[1]}
    count = LONG_PROMPT if row.task == "prefill" else DECODED
    for record, times in zip(records, seconds, strict=True):
        record["seconds"] = times
    rates = [count / median(times) for times in seconds]
    return {**result, "tokens_per_second": rates, "ratio": rates[0] / rates[1]}


def _start(path: Path, mode: str, args: argparse.Namespace) -> Child:
    common = [str(path), "--threads", str(args.threads)]
    if path.name.endswith(".ik.gguf"):
        python = _interpreter(args.ik_python, "--ik-python", path)
        command = [python, "-m", "benchmarks.serving_ik", *common, "--cache", str(CACHE)]
    elif path.suffix == ".gguf":
        python = _interpreter(args.llama_python, "--llama-python", path)
        command = [python, "-m", "benchmarks.serving_llama", "serve", *common, "--cache", str(CACHE)]
        command.append("--flash")
    elif path.suffix == ".pt2":
        command = [sys.executable, "-m", "benchmarks.serving_package", *common]
    else:
        command = [sys.executable, "-m", "benchmarks.serving_bf16", *common, "--mode", mode]
        command += ["--cache", str(PROMPT + DECODED)]
    return Child(command, args.threads, ROOT)


def _interpreter(python: str | None, option: str, path: Path) -> str:
    if python is None:
        raise SystemExit(f"{path.name}: give {option}")
    return python


def _size(path: Path) -> dict[str, Any]:
    from benchmarks.serving_gguf import contents

    if path.suffix == ".gguf" and not path.name.endswith(".ik.gguf"):
        return contents(path)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return {"bytes": sum(file.stat().st_size for file in files)}


if __name__ == "__main__":
    main()
