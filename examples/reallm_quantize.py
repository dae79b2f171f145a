"""Quantise a model to about 3 bits a weight, save it, load it again and count the bits on disk.

    python examples/reallm_quantize.py --calibration some_text.txt [--model NAME] [--budget 3.25] [--out runs/reallm]

Without ``--calibration`` matrices are quantised while they are read, without any data: faster, and much worse.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM

from hf_ext import ReALLMConfig
from hf_ext.default_model import load_model
from hf_ext.quant.integrity import bits_on_disk
from hf_ext.quant.linear import set_decode_mode


def main() -> None:
    """Quantise, save, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder; the embedded model by default")
    parser.add_argument("--calibration", help="text file, or folder of *.txt")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 1024 tokens")
    parser.add_argument("--budget", type=float, default=3.25, help="bits a weight of everything that is stored")
    parser.add_argument("--out", default="runs/reallm")
    arguments = parser.parse_args()
    if arguments.calibration:
        config = ReALLMConfig(
            budget=arguments.budget,
            low_rank_bits=8,
            calibration=arguments.calibration,
            windows=arguments.windows,
        )
    else:
        config = ReALLMConfig(bits=3, rank=4)
    model, tokenizer = load_model(arguments.model, quantization_config=config)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    bits = bits_on_disk(arguments.out)
    print(f"{bits['linear']:.3f} bits a weight in the linear layers, {bits['whole_file']:.3f} in the whole file")

    again = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=model.dtype)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        print("bit-identical after loading:", torch.equal(again(**prompt).logits, model(**prompt).logits))
    set_decode_mode(again, "once")  # dense weights: more memory, faster prefill; "low_memory" is the other way round
    print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main()
