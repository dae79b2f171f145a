"""DecoQuant on the embedded SmolLM2 after 2,048 tokens: its share of float16, and what the text that follows costs."""

import math
from pydoc_data import topics

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from hf_ext import make_cache

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
PROMPT, SCORED = 2048, 256


def nats(model, cache, ids):
    """Mean nats of the tokens after the prompt, which are read as they are."""
    model(ids[None, :PROMPT], past_key_values=cache, logits_to_keep=1)
    held = cache.nbytes() if hasattr(cache, "nbytes") else 0
    if held:
        cache.activate_past_recording()
    logits = model(ids[None, PROMPT:-1], past_key_values=cache).logits[0]
    return functional.cross_entropy(logits, ids[PROMPT + 1 :]).item(), held


@torch.inference_mode()
def test_four_bits_are_near_the_dense_cache_at_a_quarter_of_float16(real_model, record_property):
    model, tokenizer = real_model
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = tokenizer(text[200_000:260_000], return_tensors="pt").input_ids[0]
    more = []
    for begin in (0, 5000):
        window = ids[begin : begin + PROMPT + SCORED + 1]
        dense, _ = nats(model, DynamicCache(config=model.config), window)
        ours, held = nats(model, make_cache(model, "decoquant"), window)
        more.append(ours - dense)
        assert held <= 0.28 * 2 * 2 * 30 * 3 * 64 * PROMPT
    record_property("change of perplexity", math.expm1(sum(more) / len(more)))
    assert sum(more) / len(more) <= math.log(1.02), more
