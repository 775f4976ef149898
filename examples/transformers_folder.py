"""Quantise a transformers model, write a folder that transformers loads, and generate from it.

The model is tiny and random, so that nothing is downloaded; use `AutoModelForCausalLM.from_pretrained` for a real one,
and calibrate on real text.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lopro_fx
from lopro_fx.models import export_causal_lm


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    batches = [torch.randint(256, (2, 64)) for _ in range(8)]
    method = lopro_fx.LoPRo(bits=4, group_size=32, rank=4, head_bits=8, act_bits=8, act_group=32)
    state = lopro_fx.calibrate(export_causal_lm(model), batches, method)
    lopro_fx.save_pretrained(model, state, "folder")

    # In another process, `import lopro_fx` first.
    loaded = AutoModelForCausalLM.from_pretrained("folder")
    ids = torch.randint(256, (1, 16))
    with torch.no_grad():
        exact, approximate = model(ids).logits, loaded(ids).logits
    print(f"relative error {((exact - approximate).norm() / exact.norm()).item():.3f}")
    print("generated", loaded.generate(ids, max_new_tokens=8, do_sample=False)[0, 16:].tolist())


if __name__ == "__main__":
    main()
