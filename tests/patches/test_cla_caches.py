"""Caches of hf_ext on top of layers that share: producers have their layers, consumers nothing."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer

from hf_ext import make_cache
from hf_ext.testing import assert_close, ragged_batch, tiny_model

ROOMY = {
    "sirllm": {"sink_size": 2, "memory_size": 64, "recent_size": 64},
    "sink_window": {"sink_size": 2, "window_size": 126},
}
TIGHT = {
    "sirllm": {"sink_size": 2, "memory_size": 6, "recent_size": 8, "block_size": 1},
    "sink_window": {"sink_size": 2, "window_size": 14, "block_size": 1},
}
families = pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "olmo2"])


@families
@pytest.mark.parametrize("name", ROOMY)
def test_with_room_it_is_the_plain_cache(family, name):
    model, batch = tiny_model(family, hf_ext={"cla": {}}), ragged_batch([12])
    greedy = {"max_new_tokens": 10, "do_sample": False}
    cache = make_cache(model, name, **ROOMY[name])
    assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, past_key_values=cache))
    assert [isinstance(layer, DummyLayer) for layer in cache.layers] == [False, True] * 2


@families
@pytest.mark.parametrize("name", TIGHT)
def test_evicting_keeps_half_of_the_dense_models_bytes(family, name):
    sizes, batch = {}, ragged_batch([12])
    for factor in (1, 2):
        model = tiny_model(family, hf_ext={"cla": {"sharing_factor": factor}})
        cache = make_cache(model, name, **TIGHT[name])
        model.generate(**batch, max_new_tokens=20, do_sample=False, past_key_values=cache)
        assert int(torch.as_tensor(cache.stored).max()) <= 17
        sizes[factor] = sum(
            layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if not isinstance(layer, DummyLayer)
        )
    assert sizes[2] * 2 == sizes[1]


@families
def test_quantised_keys_and_values_are_shared_as_they_are_read(family):
    model, ids = tiny_model(family, hf_ext={"cla": {}}), ragged_batch([40])["input_ids"]
    cache = make_cache(model, "decoquant", bits=8, first_block=16, block_size=8)
    with torch.no_grad():
        expected = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split([24, 8, *[1] * 8], dim=1)]
    assert_close("logits", expected, torch.cat(parts, 1), 0.05)
    dense = tiny_model(family)
    whole = make_cache(dense, "decoquant", bits=8, first_block=16, block_size=8)
    for part in ids.split([24, 8, *[1] * 8], dim=1):
        dense(part, past_key_values=whole)
    assert cache.nbytes() * 2 == whole.nbytes()


def test_the_flags_go_together_and_beams_reorder(tmp_path):
    from transformers import AutoModelForCausalLM

    flags = {"cla": {}, "kv_cache": {"type": "sirllm", **ROOMY["sirllm"]}}
    tiny_model("llama", hf_ext=flags).save_pretrained(tmp_path)
    model, batch = AutoModelForCausalLM.from_pretrained(tmp_path), ragged_batch([12, 7])
    assert model.config.hf_ext.cla is not None and model.config.hf_ext.kv_cache is not None
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    plain = tiny_model("llama", hf_ext={"cla": {}})
    assert torch.equal(model.generate(**batch, **options), plain.generate(**batch, **options))
