"""Perplexity of a model on a text, whole windows against a long stream through a small SirLLM cache.

python examples/perplexity.py                              # SmolLM2-135M-Instruct on a text every Python has
python examples/perplexity.py --model NAME --text FILE --tokens 4096
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from hf_ext import make_cache
from hf_ext.default_model import load_model
from hf_ext.evaluation import perplexity, tokenize


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="UTF-8 text file; default: the reference of the Python language")
    parser.add_argument("--tokens", type=int, default=1024, help="how much of it is read")
    parser.add_argument("--window", type=int, default=512, help="tokens a window without a cache")
    options = parser.parse_args()

    text = options.text.read_text() if options.text else "\n\n".join(topics.values())[: 8 * options.tokens]
    model, tokenizer = load_model(options.model)
    ids = tokenize(tokenizer, text)[: options.tokens]

    whole = perplexity(model, ids, options.window)
    print(f"windows of {options.window}: perplexity {whole.perplexity:.2f} over {whole.tokens} tokens")

    def small_memory() -> object:
        return make_cache(model, "sirllm", memory_size=92, recent_size=160, block_size=32)

    stream = perplexity(model, ids, len(ids), cache=small_memory, chunk=32)
    print(f"one stream, a memory of 256: perplexity {stream.perplexity:.2f} over {stream.tokens} tokens")


if __name__ == "__main__":
    main()
