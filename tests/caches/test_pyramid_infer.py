"""PyramidInfer: lengths of the schedule, nested tokens, exactness in batches, and what thinning out keeps."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

from hf_ext import PyramidInferConfig, make_cache
from hf_ext.caches.budgets import PyramidSchedule, generation_keep
from hf_ext.testing import assert_close, ragged_batch, tiny_model

SMALL = {"decay": 0.5, "min_context": 3, "sink_size": 2, "generation_block": 4, "voters": 3}
FLAT = {
    "decay": 0.3,
    "flat_from": 2,
    "min_context": 3,
    "sink_size": 2,
    "vote_size": 4,
    "vote_heads": "max",
    "kernel": 5,
}
PACKED = {"type": "decoquant", "bits": 2, "first_block": 6, "block_size": 3, "sink_size": 2}
KINDS = ["pyramid_infer", "pyramid_infer_cache"]


def run(model, cache, ids, mask, cuts):
    out, begin = [], 0
    for end in cuts:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
        with torch.no_grad():
            out.append(
                model(
                    input_ids=ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions,
                    past_key_values=cache,
                ).logits
            )
        begin = end
    return out


def check_rows_are_independent(model, make, tolerance=1e-9):
    lengths = [40, 33, 12, 5]
    batch = ragged_batch(lengths)
    ids = torch.cat([batch["input_ids"], torch.randint(3, 128, (4, 20))], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 20, dtype=torch.long)], 1)
    cuts = [40, 41, *range(42, 54), 60]
    together = run(model, make(), ids, mask, cuts)
    for row, length in enumerate(lengths):
        begin = 40 - length
        cut = [end - begin for end in cuts]
        alone = run(model, make(), ids[row : row + 1, begin:], mask[row : row + 1, begin:], cut)
        for expected, got in zip(alone, together, strict=True):
            assert_close(f"row {row}", expected[0, -1], got[row, -1], tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "olmo2"])
def test_a_left_padded_batch_equals_single_runs(kind, family):
    model = tiny_model(family).double()
    check_rows_are_independent(model, lambda: make_cache(model, kind, **SMALL))


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_our_own_schedule(kind):
    model = tiny_model().double()
    check_rows_are_independent(model, lambda: make_cache(model, kind, **FLAT))


def test_a_flat_schedule_cuts_once():
    model = tiny_model(num_hidden_layers=6)
    cache = make_cache(model, PyramidInferConfig.preset("flat", target_ratio=0.5, min_context=4))
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 400)), past_key_values=cache)
    first, second, *others = cache.stored_by_layer
    assert first == second == 400
    assert len(set(others)) == 1
    assert sum(cache.stored_by_layer) / (6 * 400) == pytest.approx(0.5, abs=0.01)


def test_votes_of_the_best_head_spread_to_neighbours():
    model, ids = tiny_model(), torch.randint(3, 128, (1, 80))
    cache, dense = make_cache(model, "pyramid_infer_cache", **FLAT), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=dense)
    kept = (cache.own_layers[2].keys[0, 0][:, None] == dense.layers[2].keys[0, 0]).all(-1).nonzero()[:, 1].tolist()
    runs = [b - a for a, b in pairwise(kept)]
    assert runs.count(1) >= len(runs) - 8


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_a_stack_over_packed_storage(kind):
    model = tiny_model().double()
    check_rows_are_independent(model, lambda: make_cache(model, [{"type": kind, **SMALL}, PACKED]))


def test_eager_attention_agrees_with_sdpa():
    ids = torch.randint(3, 128, (1, 60))
    mask = torch.ones_like(ids)
    outs = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=attention)
        outs.append(run(model, make_cache(model, "pyramid_infer", **SMALL), ids, mask, [40, 41, 45, 60])[1:])
    for a, b in zip(*outs, strict=True):
        assert_close("logits", a, b, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 40, 200])
def test_lengths_are_those_of_the_schedule(kind, length):
    model = tiny_model(num_hidden_layers=6)
    cache = make_cache(model, kind, decay=0.5, min_context=16)
    with torch.no_grad():
        model(torch.randint(3, 128, (1, length)), past_key_values=cache)
    assert cache.stored_by_layer == PyramidSchedule(0.5, 0.2, 16).lengths(length, 6)


def test_the_target_is_met():
    model = tiny_model(num_hidden_layers=8)
    cache = make_cache(model, "pyramid_infer", target_ratio=0.75, min_context=8)
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 400)), past_key_values=cache)
    assert sum(cache.stored_by_layer) / (8 * 400) == pytest.approx(0.75, abs=0.02)


def test_deeper_layers_store_a_part_of_what_shallower_ones_do():
    model, ids = tiny_model(num_hidden_layers=6), torch.randint(3, 128, (1, 80))
    cache, dense = (
        make_cache(model, "pyramid_infer_cache", decay=0.4, min_context=4),
        DynamicCache(config=model.config),
    )
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=dense)
    before = set(range(80))
    for ours, host in zip(cache.own_layers, dense.layers, strict=True):
        equal = (ours.keys[0, 0][:, None] == host.keys[0, 0]).all(-1)  # [stored, 80]
        now = set(equal.nonzero()[:, 1].tolist())
        assert len(now) == ours.stored and now <= before
        before = now
    assert len(before) < 60


def test_deeper_layers_compute_less():
    model, widths = tiny_model(num_hidden_layers=6), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    cache = make_cache(model, "pyramid_infer", decay=0.5, min_context=4)
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 80)), past_key_values=cache)
    assert widths == cache.stored_by_layer == PyramidSchedule(0.5, 0.2, 4).lengths(80, 6)


def test_sinks_and_recent_tokens_always_stay():
    model = tiny_model()
    ids = torch.randint(3, 128, (1, 50))
    cache, dense = make_cache(model, "pyramid_infer_cache", **SMALL), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=dense)
    for ours, host in zip(cache.own_layers, dense.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :2], host.keys[:, :, :2])
        assert torch.equal(ours.keys[:, :, -11:], host.keys[:, :, -11:])


def test_generated_blocks_are_thinned_out_by_depth():
    model = tiny_model(num_hidden_layers=6)
    cache = make_cache(model, "pyramid_infer", decay=1.0, recent_ratio=0.1)
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 20)), past_key_values=cache)
        for _ in range(19):
            model(torch.randint(3, 128, (1, 1)), past_key_values=cache)
    gone = [39 - stored for stored in cache.stored_by_layer]
    assert gone == [16 - generation_keep(layer, 6) for layer in range(6)]
    assert cache.get_seq_length() == 39


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_without_decay(kind):
    model, ids = tiny_model(), torch.randint(3, 128, (1, 30))
    cache = make_cache(model, kind, decay=1.0, generation_block=0)
    ours = model.generate(ids, past_key_values=cache, max_new_tokens=20)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=20))


def test_hybrid_models_are_told_which_variant_serves_them():
    with pytest.raises(ValueError, match="pyramid_infer_cache serves this model"):
        make_cache(tiny_model("gemma2"), "pyramid_infer")
    model = tiny_model("gemma2", attn_implementation="eager")
    check_rows_are_independent(model, lambda: make_cache(model, "pyramid_infer_cache", **SMALL), 1e-4)


def test_released_presets():
    assert PyramidInferConfig.preset("13b") == PyramidInferConfig(decay=0.8, interval=2)
    with pytest.raises(ValueError, match="not for '3b'"):
        PyramidInferConfig.preset("3b")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decay": 1.5}, "decay must be from 0 to 1"),
        ({"decay": "0.9"}, "decay must be a number, got '0.9'"),
        ({"distance_weight": float("inf")}, "distance_weight must be a number, got inf"),
        ({"target_ratio": 0}, "target_ratio must be above 0"),
        ({"interval": 0}, "interval must be"),
        ({"distance_weight": 0}, "distance_weight must be positive"),
        ({"vote_heads": "sum"}, "vote_heads must be"),
        ({"kernel": 4}, "kernel must be an odd number"),
    ],
)
def test_bad_options_are_refused_by_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PyramidInferConfig(**options)
