"""Package a quantised transformers model with its KV cache programs, and generate from the package.

The model and the tokenizer are tiny and made here, so that nothing is downloaded. Compiling takes about half a minute,
and minutes more where lopro_fx has not built its C++ kernel before.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lopro_fx
from lopro_fx.models import export_causal_lm


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config).eval(), byte_tokenizer()

    batches = [torch.randint(256, (2, 64)) for _ in range(4)]
    state = lopro_fx.calibrate(export_causal_lm(model), batches, lopro_fx.LoPRo(bits=4, rank=4, head_bits=8))
    programs = lopro_fx.export_for_generation(model, max_cache_len=64)
    programs = programs.map(lambda program: lopro_fx.apply(program, state))
    eager = lopro_fx.Generator.from_programs(programs.map(lambda program: lopro_fx.optimize(program, target="cpu")))
    result = lopro_fx.package(programs, "model.pt2", tokenizer)
    print(f"{result.path}: {result.bytes:,} bytes in {result.seconds:.0f} s")

    # What follows needs neither the model nor the state, and may run in another process.
    generator = lopro_fx.load_package("model.pt2")
    text = lopro_fx.generate(generator, generator.tokenizer, "Once upon a time", 16)
    print(repr(text))
    print("same as eager:", text == lopro_fx.generate(eager, tokenizer, "Once upon a time", 16))


if __name__ == "__main__":
    main()
