"""SirLLM on the embedded SmolLM2: entropies against float64, and a fact that a window of the same size has lost."""

import pytest
import torch

from hf_ext import make_cache

pytestmark = pytest.mark.real_model


@torch.inference_mode()
def test_entropies_equal_float64_to_1e_5(real_model):
    model, tokenizer = real_model
    text = "The quick brown fox was last seen near Ljubljana, with seven alpacas."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    cache = make_cache(model, "sirllm")
    for piece in ids.split(5, dim=1):
        model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
    hidden = model.model(input_ids=ids).last_hidden_state.double()
    logits = hidden @ model.lm_head.weight.double().T
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert ((cache.entropy[:, 1:].double() - expected).abs() / expected.clamp(min=1)).max() < 1e-5


@torch.inference_mode()
def test_surprising_words_stay_and_the_window_loses_them(real_model):
    model, tokenizer = real_model
    filler = "The weather was fine and the sun was in the sky and the people went to the park. " * 8
    ids = tokenizer("My name is Zephyrine and I keep seven alpacas. " + filler, return_tensors="pt")["input_ids"]
    kept = {}
    for kind, options in {
        "sirllm": {"memory_size": 40, "recent_size": 20, "block_size": 16},
        "sink_window": {"window_size": 60, "block_size": 16},
    }.items():
        cache = make_cache(model, kind, **options)
        for piece in ids.split(16, dim=1):
            model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
        kept[kind] = tokenizer.decode(ids[0, cache.ordinals[0]])
    assert "alp" in kept["sirllm"]
    assert "rine" in kept["sirllm"]
    assert "alp" not in kept["sink_window"]
