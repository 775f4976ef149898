"""Trains a small Mixtral (7.6 million parameters, 8 experts of which a token takes 2) on text files, on the CPU.

A file is plain UTF-8 text; of a .jsonl file of tasks, `ctx` and the right one of `endings` are the text. The last 2 %
of each file are held out: their loss picks the weights and ends training that no longer helps. The model in
tests/assets/moe has seen neither wikitext2_test.txt nor the second half of tinystories.txt. It has seen the answers of
the tasks below, so its scores on them mean nothing:

    head -n 1064 ../shared/data/tinystories.txt > ../stories.txt
    python -m benchmarks.train_moe --out ../moe --text ../stories.txt ../shared/data/c4_calib.txt \\
        ../shared/data/{hellaswag_val,piqa_valid,arc_easy_test}.jsonl

The folder --out gets the files of the model, training.json and, every --save-every steps, checkpoint.pt, from which the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lopro_fx.evaluation import read_text

BOS, EOS = "<s>", "<|endoftext|>"  # TinyStories has the second between two stories
VOCABULARY, POSITIONS = 2048, 512
HELD_OUT = 0.02
MAX_BYTES = 16_000_000


def file_text(path: Path) -> str:
    """Return plain text as it is, tasks as their contexts with the right endings."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return text
    tasks = [json.loads(line) for line in text.splitlines()]
    return "".join(f"{task['ctx']}{task['endings'][task['label']]}\n{EOS}\n" for task in tasks)


def split_texts(paths: list[Path]) -> tuple[list[str], list[str]]:
    """Return the texts to train on and those held out, each cut at the end of a line if there is one."""
    train, held_out = [], []
    for text in map(file_text, paths):
        cut = int(len(text) * (1 - HELD_OUT))
        cut = text.rfind("\n", 0, cut) + 1 or cut
        train.append(text[:cut])
        held_out.append(text[cut:])
    return train, held_out


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts BOS before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=POSITIONS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return torch.tensor(
        [token for text in texts for token in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return MixtralForCausalLM(config)


def make_optimizer(model: MixtralForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the share of the highest learning rate: a linear rise, then a cosine down to 0.02."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw(tokens: Tensor, batch: int, length: int, bos: int, rng: torch.Generator) -> Tensor:
    """Draw windows (batch, length) from any place. Half of them have BOS first: texts are read with and without it."""
    starts = torch.randint(len(tokens) - length + 1, (batch, 1), generator=rng)
    windows = tokens[starts + torch.arange(length)]
    windows[::2, 0] = bos
    return windows


def losses_of(model: MixtralForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return nats per token and the weighted load-balancing loss.

    That of transformers counts the tokens of all layers together, so that a layer may still leave experts unused.
    """
    config = model.config
    out = model(input_ids=windows, output_router_logits=True, use_cache=False)
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    balance = sum(load_balancing_loss_func((router,), experts, chosen) for router in out.router_logits)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return loss, config.router_aux_loss_coef * balance


@torch.no_grad()
def held_out_loss(model: MixtralForCausalLM, tokens: Tensor, length: int) -> tuple[float, list[list[float]]]:
    """Return nats per token in windows without overlap, and for each layer the share of routed slots of each expert."""
    model.eval()
    config = model.config
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    total, counts = 0.0, torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for batch in windows.split(16):
        out = model(input_ids=batch, output_router_logits=True, use_cache=False)
        logits = out.logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
        for layer, router in enumerate(out.router_logits):
            chosen = router.topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += chosen.bincount(minlength=config.num_local_experts)
    model.train()
    shares = (counts / counts.sum(1, keepdim=True)).tolist()
    return total / (len(windows) * (length - 1)), [[round(share, 4) for share in layer] for layer in shares]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a file that is whole whenever the process ends."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(args: argparse.Namespace, model: MixtralForCausalLM, tokens: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train until the steps, the time or the patience are used up. The model is left with the best weights."""
    optimizer = make_optimizer(model, args.lr)
    rng = torch.Generator().manual_seed(args.seed)
    path = args.out / "checkpoint.pt"
    names = [file.name for file in args.text]
    settings = {"text": names} | {key: getattr(args, key) for key in ("seed", "steps", "lr", "batch", "length")}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "train_loss": 0.0, "held_out_loss": math.inf, "best_step": 0}
    best: dict[str, Tensor] = {}
    if path.exists():
        saved = torch.load(path)
        if saved["settings"] != settings:
            sys.exit(f"{path.name} is from a run with other settings {saved['settings']}: take another folder --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.set_state(saved["rng"])
        state, best = saved["state"], saved["best"]
        print(f"goes on from step {state['step']}", flush=True)
    started, first, losses = time.perf_counter() - state["seconds"], state["step"], []
    began = time.perf_counter()
    model.train()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args.steps)
        windows = draw(tokens, args.batch, args.length, model.config.bos_token_id, rng)
        loss, balance = losses_of(model, windows)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        state["step"], state["seconds"] = step + 1, time.perf_counter() - started
        stop = step + 1 == args.steps or state["seconds"] > args.minutes * 60
        if not stop and (step + 1) % args.save_every:
            continue
        on_held_out, shares = held_out_loss(model, held_out, args.length)
        state["train_loss"], losses = sum(losses) / len(losses), []
        if on_held_out < state["held_out_loss"]:
            state["held_out_loss"], state["best_step"] = on_held_out, step + 1
            best = {name: weight.clone() for name, weight in model.state_dict().items()}
        pace = (time.perf_counter() - began) / (step + 1 - first)
        left = min(pace * (args.steps - step - 1), max(0.0, args.minutes * 60 - state["seconds"]))
        used = [min(map(min, shares)), max(map(max, shares))]
        print(
            f"step {step + 1}/{args.steps}  loss {state['train_loss']:.4f}  held-out {on_held_out:.4f}  "
            f"expert shares {used[0]:.3f}-{used[1]:.3f}  {args.batch * args.length / pace:.0f} tokens/s  "
            f"{left / 60:.1f} min left",
            flush=True,
        )
        weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
        save_checkpoint(path, {"settings": settings, "state": state, "rng": rng.get_state(), **weights})
        if stop or step + 1 - state["best_step"] >= args.patience * args.save_every:
            break
    model.load_state_dict(best)
    return state


def command() -> str:
    """Return the command line. Of an absolute path only the name stays."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks.train_moe", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="plain text or .jsonl tasks"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=4000, help="length of the learning rate's cosine")
    parser.add_argument("--minutes", type=float, default=75, help="stop after this time, even before the last step")
    parser.add_argument("--patience", type=int, default=6, help="stop after so many held-out losses above the least")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="held-out loss and checkpoint")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", default="grouped_mm", choices=("eager", "batched_mm", "grouped_mm"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    texts, held_out_texts = split_texts(args.text)
    tokenizer = make_tokenizer(texts)
    tokens, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    if min(len(tokens), len(held_out)) < args.length:
        sys.exit(f"{len(tokens)} tokens and {len(held_out)} held out: give more text or a shorter --length")
    model = make_model(tokenizer)
    model.set_experts_implementation(args.experts)
    print(f"{model.num_parameters()} parameters, {len(tokens)} tokens, {len(held_out)} held out", flush=True)
    state = train(args, model, tokens, held_out)

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = (args.out / "model.safetensors").stat().st_size
    loss, shares = held_out_loss(model.float(), held_out, args.length)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    record = {
        "command": command(),
        "text": [file.name for file in args.text],
        **{key: getattr(args, key) for key in ("seed", "lr", "batch", "length")},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "steps": state["step"],
        "best_step": state["best_step"],
        "tokens": state["step"] * args.batch * args.length,
        "train_tokens": len(tokens),
        "seconds": round(state["seconds"]),
        "train_loss": round(state["train_loss"], 4),
        "held_out_loss": round(loss, 4),
        "held_out_bits_per_byte": round(loss / math.log(2) * len(held_out) / held_out_bytes, 4),
        "bytes": size,
        "expert_shares": shares,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    if size > MAX_BYTES:
        sys.exit(f"model.safetensors has {size} bytes, more than {MAX_BYTES}")


if __name__ == "__main__":
    main()
