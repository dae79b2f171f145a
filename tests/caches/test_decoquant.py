"""DecoQuant as a cache: rows are independent, packed and rebuilt reads agree, and bytes are what the formula says."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_ext import DecoQuantConfig, make_cache
from hf_ext.caches.observed import SEAM
from hf_ext.testing import assert_close, ragged_batch, tiny_model

SMALL = {"first_block": 12, "block_size": 4, "sink_size": 2}


def feed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen2", "sdpa"),
        ("qwen3", "sdpa"),
        ("gemma2", "eager"),
        ("phi3", "sdpa"),
        ("gpt_neox", "sdpa"),
        ("olmo2", "sdpa"),
    ],
)
def test_a_left_padded_batch_equals_single_runs(family, attention):
    # Double precision, so that no rounding of the model itself can move a number across the border of a code. The
    # host's eager attention has no such mask (its softmax is float32): there few numbers are near a border.
    model, bits, tolerance = tiny_model(family, attn_implementation=attention), 8, 1e-5
    if attention == "sdpa":
        model, bits, tolerance = model.double(), 2, 1e-9
    lengths = [30, 25, 12, 5]
    batch = ragged_batch(lengths)
    tail = torch.randint(3, 128, (4, 14))
    pieces = tail.split([1, 4, 1, 1, 7], dim=1)
    cache = make_cache(model, "decoquant", bits=bits, **SMALL)
    mask, together = batch["attention_mask"], []
    for index, piece in enumerate([batch["input_ids"], *pieces]):
        mask = torch.cat([mask, torch.ones_like(piece)], 1) if index else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        with torch.no_grad():
            out = model(input_ids=piece, attention_mask=mask, position_ids=positions, past_key_values=cache)
        together.append(out.logits)
    assert cache.own_layers[0].packed_count.tolist() != [0] * 4
    for row, length in enumerate(lengths):
        alone = make_cache(model, "decoquant", bits=bits, **SMALL)
        feed(model, alone, batch["input_ids"][row : row + 1, -length:])
        for piece, expected in zip(pieces, together[1:], strict=True):
            assert_close("logits", expected[row], feed(model, alone, piece[row : row + 1])[0], tolerance)


@pytest.mark.parametrize("method", ["allocated", "uniform"])
def test_packed_attention_equals_attention_over_rebuilt_keys(method):
    model = tiny_model()
    ids = torch.randint(3, 128, (2, 40))
    cache = make_cache(model, DecoQuantConfig(bits=4, method=method, **SMALL))
    feed(model, cache, ids[:, :24])
    rebuilt = copy.deepcopy(cache)
    logits = [feed(model, cache, piece) for piece in ids[:, 24:].split([1, 5, 10], 1)]
    SEAM.open = False  # as after hf_ext.uninstall(): update() itself returns every key
    try:
        for expected, piece in zip(logits, ids[:, 24:].split([1, 5, 10], 1), strict=True):
            assert_close("logits", expected, feed(model, rebuilt, piece), 1e-4)
    finally:
        SEAM.open = True


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
def test_more_bits_come_closer_to_the_dense_cache(bits, tolerance):
    model = tiny_model()
    ids = torch.randint(3, 128, (1, 90))
    ours, dense = make_cache(model, "decoquant", bits=bits, **SMALL), DynamicCache(config=model.config)
    for cache in (ours, dense):
        feed(model, cache, ids[:, :80])
    assert_close("logits", feed(model, dense, ids[:, 80:]), feed(model, ours, ids[:, 80:]), tolerance)


@pytest.mark.parametrize("method", ["allocated", "uniform"])
def test_bytes_are_those_of_the_formula(method):
    model = tiny_model(head_dim=64, num_hidden_layers=2)
    config = DecoQuantConfig(bits=4, method=method, first_block=16)
    cache = make_cache(model, config)
    feed(model, cache, torch.randint(3, 128, (1, 504)))
    packed, heads, d = 500, 2, 64
    group = 64 if method == "allocated" else 16
    rows = packed * heads * d // 2 + (0 if method == "allocated" else packed * 2)
    side = d + 2 * group * group + heads * d * 2 + d * 2  # widths, synthesis, means, weights
    per_layer = 2 * (rows + side) + 2 * 4 * heads * d * 4 + 3 * 8  # sinks in float32, three counters
    assert cache.nbytes() == 2 * per_layer


def test_a_long_prompt_takes_at_most_28_percent_of_half_precision():
    model = tiny_model(
        head_dim=64, num_key_value_heads=3, num_attention_heads=9, hidden_size=72, max_position_embeddings=4096
    )
    cache = make_cache(model, "decoquant")
    feed(model, cache, torch.randint(3, 128, (1, 2048)))
    assert cache.nbytes() <= 0.28 * (2 * 2 * 4 * 3 * 64 * 2048)


def test_tokens_are_taken_back_out_of_what_is_packed():
    model = tiny_model().double()
    ids = torch.randint(3, 128, (2, 50))
    config = DecoQuantConfig(bits=8, **SMALL)
    straight, back = make_cache(model, config), make_cache(model, config)
    feed(model, straight, ids[:, :20])
    feed(model, back, ids[:, :20])
    for token in ids[:, 20:30].split(1, 1):
        feed(model, back, token)
    back.crop(-10)
    assert back.get_seq_length() == 20
    assert_close("logits", feed(model, straight, ids[:, 30:]), feed(model, back, ids[:, 30:]), 1e-9)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 29), min_size=3, max_size=25, unique=True))
def test_keeping_tokens_moves_codes_and_never_decodes_them(kept):
    model = tiny_model()
    cache = make_cache(model, "decoquant", bits=4, **SMALL)
    feed(model, cache, torch.randint(3, 128, (1, 30)))
    layer = cache.own_layers[1]
    slots = torch.tensor(sorted(kept))
    expected = [side[:, :, slots] for side in layer._dense(torch.float32)]
    packed = slots[(slots >= 2) & (slots < 2 + int(layer.packed_count[0]))] - 2  # after two sinks
    codes = layer.key_codes[:, :, packed]
    layer.keep(slots[None])
    assert layer.stored == len(kept)
    assert torch.equal(codes, layer.key_codes)
    for want, got in zip(expected, layer._dense(torch.float32), strict=True):
        assert_close("rebuilt", want, got, 1e-6)  # how many rows a matrix product has decides how it is rounded


def test_keys_before_rope_are_packed_better():
    # Keys that share a direction before the rotation: after it that direction is everywhere.
    model, ids = tiny_model(num_hidden_layers=1), torch.randint(3, 128, (1, 300))
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data.copy_(torch.outer(torch.randn(32), torch.randn(64)) / 4)
    errors = []
    for pre_rope in (False, True):
        cache = make_cache(model, "decoquant", bits=2, pre_rope=pre_rope, sink_size=0)
        exact = DynamicCache(config=model.config)
        feed(model, cache, ids)
        feed(model, exact, ids)
        rebuilt = cache.own_layers[0]._dense(torch.float32)[0]
        errors.append((rebuilt - exact.layers[0].keys).norm().item())
    assert errors[1] < 0.5 * errors[0]


def test_rows_of_keys_before_rope_are_independent():
    model, batch, tail = tiny_model().double(), ragged_batch([30, 12]), torch.randint(3, 128, (2, 9))
    caches = [make_cache(model, "decoquant", bits=8, pre_rope=True, **SMALL) for _ in range(2)]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(tail)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for begin, end in ((0, 30), (30, 34), (34, 39)):
            ids = torch.cat([batch["input_ids"], tail], 1)[:, begin:end]
            out = model(ids, attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                        past_key_values=caches[0]).logits  # fmt: skip
            alone = feed(model, caches[1], ids[1:, 18:] if begin == 0 else ids[1:])
    assert_close("logits", alone[0, -1], out[1, -1], 1e-5)
    caches[0].crop(-3)
    assert caches[0].get_seq_length() == 36


def test_keys_before_rope_need_rope_that_can_be_undone():
    longrope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="leave pre_rope out"):
        make_cache(tiny_model(rope_parameters=longrope), "decoquant", pre_rope=True)
    with pytest.raises(ValueError, match="leave pre_rope out"):
        make_cache(tiny_model(rope_parameters=longrope), ["snapkv", {"type": "decoquant", "pre_rope": True}])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8"),
        ({"bits": True}, "bits must be 2, 4 or 8"),
        ({"bits": 4.0}, "bits must be 2, 4 or 8"),
        ({"extra_bits": "1"}, "extra_bits must be a number, got '1'"),
        ({"method": "svd"}, "method must be"),
        ({"extra_bits": 7}, "extra_bits must be from 0 to 4"),
        ({"first_block": 0}, "first_block must be"),
        ({"sink_size": -1}, "sink_size must be"),
    ],
)
def test_bad_options_are_refused_by_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DecoQuantConfig(**options)


def test_a_group_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ValueError, match="group must divide the head dimension 16"):
        make_cache(tiny_model(), "decoquant", method="uniform", group=12)


def test_padding_on_the_right_is_refused():
    model = tiny_model()
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="padding on the left only"):
        feed(model, make_cache(model, "decoquant"), torch.randint(3, 128, (1, 10)), mask)


def test_rows_can_be_repeated_when_every_token_is_packed():
    model, ids = tiny_model(), torch.randint(3, 128, (2, 21))
    cache = make_cache(model, "decoquant", first_block=8, block_size=1, sink_size=0)
    feed(model, cache, ids[:, :20])
    assert cache.own_layers[0].keys.numel() == 0
    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    expected = feed(model, cache, ids[:, 20:])
    assert_close(
        "logits", expected.repeat_interleave(2, 0), feed(model, twice, ids[:, 20:].repeat_interleave(2, 0)), 1e-5
    )


def test_other_models_still_compile_whole():
    model, other, ids = tiny_model(), tiny_model(seed=1), torch.randint(3, 128, (1, 9))
    feed(model, make_cache(model, "decoquant"), ids)  # from here on attention functions look for marked keys
    with torch.no_grad():
        compiled = torch.compile(other, backend="eager", fullgraph=True)
        assert_close("logits", other(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits, 1e-6)
