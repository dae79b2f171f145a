"""Convert a trained model to Cross-Layer Attention: rank its layers, convert, heal, save, generate.

    python examples/cla_convert.py [--model NAME_OR_FOLDER] [--text FILE] [--keep 0.8] [--heal-tokens 4096] [--out DIR]

Without --text it uses the Python manual that every interpreter carries. A few thousand tokens of healing show the
direction only; see docs/cla.md for what a longer run reaches.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM

from hf_ext import CLAConfig, convert_to_cla
from hf_ext.default_model import load_model
from hf_ext.evaluation import perplexity, tokenize
from hf_ext.patches.cla_rank import map_for_bytes, rank_layers
from hf_ext.trainers.cla_heal import heal


def main() -> None:
    """Rank, convert, heal, save and load again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--keep", type=float, default=0.8, help="share of the cache's bytes to keep")
    parser.add_argument("--rank-tokens", type=int, default=512)
    parser.add_argument("--heal-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("cla_model"))
    args = parser.parse_args()
    teacher, tokenizer = load_model(args.model)
    text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics.values())
    ids = tokenize(tokenizer, text[:400_000])
    held_out, ids = ids[:1024], ids[1024:]

    ranked = rank_layers(teacher, ids[: args.rank_tokens], init="fit", progress=True)
    budget = int(teacher.kv_bytes_per_token() * args.keep)
    config = CLAConfig(kv_source_layers=map_for_bytes(teacher, ranked, budget))
    student = convert_to_cla(teacher, config, "fit", ids[:4096])
    print(f"map {config.kv_source_layers}")
    print(f"bytes a token {teacher.kv_bytes_per_token()} -> {student.kv_bytes_per_token()}")
    print(f"perplexity dense     {perplexity(teacher, held_out, 512).perplexity:.2f}")
    print(f"perplexity converted {perplexity(student, held_out, 512).perplexity:.2f}")
    if args.heal_tokens:
        work = args.out.with_name(args.out.name + ".work")
        heal(student, teacher, ids, work, tokens=args.heal_tokens, length=256)
        print(f"perplexity healed    {perplexity(student, held_out, 512).perplexity:.2f}")
    student.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    again = AutoModelForCausalLM.from_pretrained(args.out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    print(tokenizer.decode(again.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))


if __name__ == "__main__":
    main()
