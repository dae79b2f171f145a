"""What every registered cache, and every kind of stack, keeps true.

A new cache joins with one line in each table of `hf_ext.testing`.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from hf_ext import make_cache
from hf_ext.registry import CACHES
from hf_ext.testing import LOSSLESS, SMALL, assert_close, ragged_batch, tiny_model

FULL_ATTENTION_ONLY = {"pyramid_infer"}  # refuses models with sliding-window layers by a sentence

ALL = pytest.mark.parametrize("kind", sorted(CACHES))
STACKS = {
    "snapkv over decoquant": ["snapkv", {}],
    "tova over decoquant before RoPE": ["tova", {"pre_rope": True}],
    "pyramid_infer_cache over decoquant before RoPE": ["pyramid_infer_cache", {"pre_rope": True}],
}
WITH_STACKS = pytest.mark.parametrize("kind", [*sorted(CACHES), *STACKS])
PROMPT = ragged_batch([12, 7, 3])


def small(model, kind):
    if kind in CACHES:
        return make_cache(model, kind, **SMALL[kind])
    outer, options = STACKS[kind]
    inner = {"type": "decoquant", **SMALL["decoquant"], "first_block": 6, **options}
    return make_cache(model, [{"type": outer, **SMALL[outer]}, inner])


def generate(model, cache, inputs=PROMPT, **options):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    return model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)


def feed(model, cache, ids):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits


@ALL
def test_every_registered_cache_is_tested_here(kind):
    assert kind in SMALL
    assert kind in LOSSLESS


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_room_for_all_it_is_dynamic_cache_bit_for_bit(kind, attention):
    model = tiny_model(attn_implementation=attention)
    ours = generate(model, make_cache(model, kind, **LOSSLESS[kind]))
    host = generate(model, DynamicCache(config=model.config))
    assert torch.equal(ours.sequences, host.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, host.logits, strict=True))


@ALL
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda o: next(iter(o)),
)
def test_with_room_for_all_every_way_of_decoding_agrees(kind, options):
    model = tiny_model()
    inputs = PROMPT if "prompt_lookup_num_tokens" not in options else ragged_batch([12])
    ours = generate(model, make_cache(model, kind, **LOSSLESS[kind]), inputs, **options)
    host = generate(model, DynamicCache(config=model.config), inputs, **options)
    assert torch.equal(ours.sequences, host.sequences)


@WITH_STACKS
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2}],
    ids=lambda options: next(iter(options), "greedy"),
)
def test_every_way_of_decoding_runs_and_counts_what_it_saw(kind, options):
    model = tiny_model()
    inputs = PROMPT if "prompt_lookup_num_tokens" not in options else ragged_batch([12])
    if "num_return_sequences" in options:
        options = {**options, "do_sample": True}
    cache = small(model, kind)
    out = generate(model, cache, inputs, **options)
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    for layer in cache.own_layers:
        assert layer.seen == cache.get_seq_length()
        length, offset = layer.get_mask_sizes(3)
        assert length + offset == layer.seen + 3


@WITH_STACKS
def test_a_second_turn_is_fed_its_own_tokens_only(kind):
    model, cache = tiny_model(), None
    cache = small(model, kind)
    first = generate(model, cache, ragged_batch([12]), max_new_tokens=6, min_new_tokens=6).sequences
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    history = torch.cat([first, ragged_batch([5], seed=3)["input_ids"]], dim=1)
    generate(model, cache, {"input_ids": history}, max_new_tokens=3, min_new_tokens=3)
    handle.remove()
    assert seen == [6, 1, 1]  # the last token of the answer, the 5 new ones, then one at a time


@WITH_STACKS
def test_bytes_are_those_of_the_storages(kind):
    model = tiny_model()
    cache = small(model, kind)
    assert cache.nbytes() == 0
    generate(model, cache)
    counted = {}
    tensors = [t for _, owner in cache._owners() for t in vars(owner).values() if isinstance(t, torch.Tensor)]
    for tensor in tensors:
        counted[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert cache.nbytes() == pytest.approx(sum(counted.values()), rel=0.01)
    assert sum(cache.nbytes_by_component().values()) == cache.nbytes()


@WITH_STACKS
def test_reset_makes_it_new(kind):
    model = tiny_model()
    used, fresh = small(model, kind), small(model, kind)
    generate(model, used)
    used.reset()
    assert used.nbytes() == 0
    assert used.get_seq_length() == 0
    assert all(
        torch.equal(a, b) for a, b in zip(generate(model, used).logits, generate(model, fresh).logits, strict=True)
    )


def copies(model, kind, cache, folder):
    cache.save(folder / "cache.safetensors")
    return {
        "file": small(model, kind).load(folder / "cache.safetensors"),
        "state_dict": small(model, kind).load_state_dict(cache.state_dict()),
        "deepcopy": copy.deepcopy(cache),
        "pickle": pickle.loads(pickle.dumps(cache)),
    }


@WITH_STACKS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_saved_or_copied_cache_goes_on_as_the_first(kind, family, tmp_path):
    model = tiny_model(family if kind not in FULL_ATTENTION_ONLY else "llama")
    cache = small(model, kind)
    generate(model, cache)
    twins = copies(model, kind, cache, tmp_path)
    tail = torch.randint(3, 128, (3, 9))
    expected = [feed(model, cache, piece) for piece in tail.split([1, 5, 3], dim=1)]
    for name, twin in twins.items():
        for want, piece in zip(expected, tail.split([1, 5, 3], dim=1), strict=True):
            assert torch.equal(want, feed(model, twin, piece)), name
        assert twin.nbytes() == pytest.approx(cache.nbytes(), rel=0.01)


@ALL
def test_files_that_are_no_such_cache_are_refused(kind, tmp_path):
    model = tiny_model()
    cache = small(model, kind)
    generate(model, cache)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    with pytest.raises(ValueError, match="layers"):
        make_cache(tiny_model(num_hidden_layers=2), kind, **SMALL[kind]).load(path)
    with pytest.raises(ValueError, match="options"):
        make_cache(model, kind, **LOSSLESS[kind]).load(path)
    with pytest.raises(ValueError, match="no state_dict of a cache"):
        small(model, kind).load_state_dict({"tensors": {}})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        small(model, kind).load(path)
    with pytest.raises(OSError, match="no saved cache at"):
        small(model, kind).load(tmp_path / "nothing")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@WITH_STACKS
def test_rows_can_be_chosen_repeated_and_reordered(kind):
    model = tiny_model()
    cache = small(model, kind)
    generate(model, cache)
    swapped, repeated, chosen = (copy.deepcopy(cache) for _ in range(3))
    swapped.reorder_cache(torch.tensor([2, 0, 1]))
    repeated.batch_repeat_interleave(2)
    chosen.batch_select_indices(torch.tensor([1]))
    tail = torch.randint(3, 128, (3, 4))
    expected = feed(model, cache, tail)
    assert_close("reorder", expected[[2, 0, 1]], feed(model, swapped, tail[[2, 0, 1]]), 1e-5)
    assert_close("repeat", expected.repeat_interleave(2, 0), feed(model, repeated, tail.repeat_interleave(2, 0)), 1e-5)
    assert_close("select", expected[1:2], feed(model, chosen, tail[1:2]), 1e-4)


@WITH_STACKS
def test_crop_takes_back_what_was_recorded(kind):
    model = tiny_model()
    straight, back = small(model, kind), small(model, kind)
    ids = torch.randint(3, 128, (2, 12))
    for cache in (straight, back):
        feed(model, cache, ids[:, :8])
    back.activate_past_recording()
    feed(model, back, ids[:, 2:6])
    back.crop(-4)
    assert back.get_seq_length() == 8
    assert_close("logits", feed(model, straight, ids[:, 8:]), feed(model, back, ids[:, 8:]), 1e-5)
    with pytest.raises(ValueError, match="negative"):
        back.crop(1)
    with pytest.raises(ValueError, match="cannot remove"):
        back.crop(-13)


@WITH_STACKS
def test_what_recording_held_back_goes_with_the_crop(kind):
    model = tiny_model()
    cache, ids = small(model, kind), torch.randint(3, 128, (2, 104))
    feed(model, cache, ids[:, :20])
    cache.activate_past_recording()
    for piece in ids[:, 20:].split(7, 1):  # as assisted decoding: of every seven tokens two are rejected
        feed(model, cache, piece)
        cache.crop(-2)
    assert cache.get_seq_length() == 80
    if kind.startswith(("snapkv", "pyramid_kv", "knorm")) and "decoquant" not in kind:
        return  # they compress prompts only
    dense = 2 * 4 * 2 * 2 * 16 * 4 * 80  # keys and values, layers, rows, heads, channels, bytes, tokens
    small_state = sum(size for name, size in cache.nbytes_by_component().items() if name in ("keys", "values"))
    assert small_state < 0.8 * dense


@WITH_STACKS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_interrupted_forward_is_taken_back(kind, family):
    model = tiny_model(family if kind not in FULL_ATTENTION_ONLY else "llama")
    straight, broken = small(model, kind), small(model, kind)
    ids = torch.randint(3, 128, (2, 30))
    for cache in (straight, broken):
        feed(model, cache, ids[:, :9])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, broken, ids[:, 9:12])
    handle.remove()
    assert broken.get_seq_length() == 9
    assert_close("logits", feed(model, straight, ids[:, 12:]), feed(model, broken, ids[:, 12:]), 1e-5)


@WITH_STACKS
def test_it_moves_between_devices_with_all_it_holds(kind):
    model = tiny_model()
    cache = small(model, kind)
    generate(model, cache)
    before = feed(model, copy.deepcopy(cache), PROMPT["input_ids"])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(before, feed(model, cache, PROMPT["input_ids"]))


@WITH_STACKS
def test_moving_leaves_no_stored_token_behind(kind):
    model = tiny_model()
    cache = small(model, kind)
    generate(model, cache)
    for layer in cache.own_layers:
        layer.map_rows(lambda tensor: tensor.to("meta"))
        sizes = {name: t for name, t in vars(layer).items() if isinstance(t, torch.Tensor) and t.numel() > len(t)}
        assert sizes and all(tensor.is_meta for tensor in sizes.values()), sizes


@WITH_STACKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_keeps_the_models_dtype(kind, dtype):
    model = tiny_model().to(dtype)
    cache = small(model, kind)
    out = generate(model, cache)
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    assert feed(model, cache, PROMPT["input_ids"]).dtype == dtype


@WITH_STACKS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(kind, bad):
    model = tiny_model()
    cache, ids = small(model, kind), torch.randint(3, 128, (1, 30))
    feed(model, cache, ids)
    weight = model.model.layers[1].self_attn.k_proj.weight.data
    weight[0, 0], right = bad, weight[0, 0].clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        feed(model, cache, ids)
    weight[0, 0] = right
    assert torch.isfinite(feed(model, cache, ids)).all()
    assert cache.get_seq_length() == 60


@WITH_STACKS
def test_another_number_of_rows_is_refused_and_nothing_is_lost(kind):
    model = tiny_model()
    cache, straight, ids = small(model, kind), small(model, kind), torch.randint(3, 128, (2, 20))
    for one in (cache, straight):
        feed(model, one, ids)
    with pytest.raises(ValueError, match="holds 2 rows, the new tokens have 3"):
        feed(model, cache, torch.randint(3, 128, (3, 2)))
    with pytest.raises(ValueError, match="attention_mask has 1 rows"), torch.no_grad():
        model(ids[:, :2], attention_mask=torch.ones(1, 22), past_key_values=cache)
    assert torch.equal(feed(model, straight, ids[:, :2]), feed(model, cache, ids[:, :2]))


@WITH_STACKS
def test_a_row_of_padding_alone_stays_finite(kind):
    model = tiny_model()
    cache, mask = small(model, kind), torch.ones(2, 33, dtype=torch.long)
    mask[0, :30] = 0
    with torch.no_grad():
        model(torch.randint(3, 128, (2, 30)), attention_mask=mask[:, :30], past_key_values=cache)
        for end in range(31, 34):
            out = model(torch.randint(3, 128, (2, 1)), attention_mask=mask[:, :end], past_key_values=cache)
            assert torch.isfinite(out.logits).all()


@WITH_STACKS
def test_a_prompt_of_one_token_will_do(kind):
    model = tiny_model()
    inputs = ragged_batch([1])
    ours, host = (
        model.generate(**inputs, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for cache in (small(model, kind), DynamicCache(config=model.config))
    )
    assert torch.equal(ours, host)


@ALL
def test_models_it_cannot_serve_are_refused(kind):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    with pytest.raises(ValueError, match="encoder-decoder"):
        make_cache(t5, kind)
    with pytest.raises(ValueError, match="none of its 4 layers has full attention"):
        make_cache(tiny_model("mistral"), kind)


@ALL
def test_it_serves_one_model_with_hooks_only(kind):
    model, other = tiny_model(), tiny_model(seed=1)
    cache = small(model, kind)
    feed(model, cache, PROMPT["input_ids"])
    small(other, kind)
    with pytest.raises(ValueError, match="made for another model"):
        feed(other, cache, PROMPT["input_ids"])
    with pytest.raises(RuntimeError, match="no hooks"):
        feed(tiny_model(seed=2), small(model, kind), PROMPT["input_ids"])
