"""Generate with compressed caches and see what they hold.

```bash
python examples/cache_generate.py            # SmolLM2-135M-Instruct
python examples/cache_generate.py MODEL      # any folder or hub name
```
"""

import sys

from transformers import DynamicCache

from hf_ext import DecoQuantConfig, PyramidInferConfig, SnapKVConfig, make_cache
from hf_ext.default_model import load_model

CACHES = {
    "dense": None,
    "DecoQuant, 4 bits": DecoQuantConfig(bits=4),
    "DecoQuant, 2 bits": DecoQuantConfig(bits=2),
    "PyramidInfer": PyramidInferConfig(target_ratio=0.75),
    "PyramidInfer over DecoQuant": [PyramidInferConfig(target_ratio=0.75), DecoQuantConfig(bits=4)],
    "SnapKV": SnapKVConfig(budget=0.5),
}
STORY = "The lighthouse keeper wrote down every ship that passed, its colours, its cargo and its captain. " * 30


def main() -> None:
    """Answer one question about a long prompt through each cache."""
    model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else None)
    chat = [{"role": "user", "content": STORY + "\nWhat did the lighthouse keeper write down?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for name, config in CACHES.items():
        cache = DynamicCache(config=model.config) if config is None else make_cache(model, config)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        held = cache.nbytes() if config else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{name:28s} {held / 2**20:6.2f} MiB  {answer!r}")


if __name__ == "__main__":
    main()
