import pytest
import torch

from hf_ext import make_cache
from hf_ext.caches.rotary import check_movable, frequencies, move_keys
from hf_ext.testing import FAMILIES, assert_close, tiny_model

SERVED = [family for family in FAMILIES if family != "mistral"]
OPTIONS = {"gemma3_text": {"num_hidden_layers": 6}}


@pytest.mark.parametrize("family", SERVED)
def test_keys_of_every_family_move_as_the_model_places_them(family):
    model = tiny_model(family, **OPTIONS.get(family, {}))
    types = getattr(model.config, "layer_types", None) or ["full_attention"]
    check_movable(model.get_decoder(), list(types), "test")


@pytest.mark.parametrize("family", SERVED)
def test_moving_all_by_a_constant_changes_nothing(family):
    model = tiny_model(family, **OPTIONS.get(family, {}))
    ids = torch.randint(3, 128, (2, 14))
    logits = []
    for start in (0, 100):
        cache = make_cache(model, "sink_window")
        positions = torch.arange(start, start + 10)[None]
        with torch.no_grad():
            model(input_ids=ids[:, :10], position_ids=positions, past_key_values=cache)
            cache.evict(0)  # nothing is due: only the positions become dense
            assert cache.positions.tolist() == [list(range(10))] * 2
            logits.append(model(input_ids=ids[:, 10:], past_key_values=cache).logits)
    assert_close("logits", logits[0], logits[1], 2e-4)


def test_partial_rotary_leaves_the_other_channels_alone():
    keys = torch.randn(1, 2, 5, 16)
    moved = move_keys(keys, torch.full((1, 5), 7), torch.tensor([1.0, 0.1]))
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    assert not torch.equal(moved[..., :4], keys[..., :4])


def test_moving_there_and_back_is_the_identity():
    keys, shift = torch.randn(2, 2, 9, 16), torch.randint(-40, 40, (2, 9))
    frequency = frequencies(tiny_model().get_decoder(), "full_attention")
    assert_close("keys", keys, move_keys(move_keys(keys, shift, frequency), -shift, frequency), 1e-5)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "depend on the text's length",
        ),
        ("cohere", {}, "rotates its keys in a way"),
    ],
)
def test_positions_that_cannot_be_followed_are_refused(family, options, words):
    with pytest.raises(ValueError, match=words):
        make_cache(tiny_model(family, **options), "sirllm")


def test_a_model_without_rotary_positions_is_served_with_original_ones():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64)).eval()
    with pytest.raises(ValueError, match="no rotary positions"):
        make_cache(model, "sink_window")
    cache = make_cache(model, "sink_window", positions="original", window_size=8, sink_size=2, block_size=2)
    out = model.generate(
        torch.randint(3, 64, (1, 12)), past_key_values=cache, max_new_tokens=10, min_new_tokens=10, do_sample=False
    )
    assert out.shape[1] == 22
    assert cache.stored <= 10


def test_yarn_keys_move_without_their_scaling():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    model = tiny_model("llama", rope_parameters=rope)
    decoder = model.get_decoder()
    assert decoder.rotary_emb.attention_scaling != 1
    check_movable(decoder, ["full_attention"], "test")
