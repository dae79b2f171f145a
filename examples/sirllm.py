"""A dialogue in a fixed memory: SirLLM keeps the tokens that surprised the model most, and forgets the others.

python examples/sirllm.py                      # SmolLM2-135M-Instruct, a memory of 160 tokens
python examples/sirllm.py --model NAME --memory 508 --recent 512
"""

import argparse

import torch

from hf_ext import SirLLMConfig, make_cache
from hf_ext.default_model import load_model

TURNS = (
    "My name is Zephyrine and I keep seven alpacas in Ljubljana.",
    "What is a good breakfast before a long walk?",
    "And what should I wear when it rains?",
    "Name three colours of autumn leaves.",
    "What is my name, and where do I live?",
)


def main() -> None:
    """Hold a short dialogue and print what is remembered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--memory", type=int, default=92, help="tokens kept for their entropy")
    parser.add_argument("--recent", type=int, default=64, help="latest tokens kept")
    parser.add_argument("--new-tokens", type=int, default=40, help="longest answer")
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    config = SirLLMConfig(memory_size=options.memory, recent_size=options.recent, block_size=16)
    cache = make_cache(model, config)

    messages: list[dict[str, str]] = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=options.new_tokens, do_sample=False
            )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"> {turn}\n{answer}")
        print(f"[{cache.stored} of {cache.get_seq_length()} tokens stored, {cache.nbytes():,} bytes]\n")

    kept = sorted((token for token in cache.remembered(0) if token.kind == "memory"), key=lambda token: -token.entropy)
    words = (f"{tokenizer.decode([token.token_id])!r} {token.entropy:.1f}" for token in kept[:12])
    print("most surprising, in nats:", ", ".join(words))


if __name__ == "__main__":
    main()
