"""Evicting caches, dense and packed: each row of a batch becomes what it would become alone, whatever is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_ext import make_cache
from hf_ext.caches.observed import SEAM
from hf_ext.testing import SMALL, assert_close, ragged_batch, tiny_model

METHODS = ["h2o", "knorm", "pyramid_kv", "snapkv", "tova"]
PACKED = {"type": "decoquant", "bits": 2, "first_block": 6, "block_size": 3, "sink_size": 2}


def run(model, cache, ids, mask, cuts):
    """Logits of every piece after the first, fed with the positions that generate would give."""
    out, begin = [], 0
    for end in cuts:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
        with torch.no_grad():
            logits = model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions,
                past_key_values=cache,
            ).logits
        out.append(logits)
        begin = end
    return out[1:]


def check_rows_are_independent(model, make, tolerance=1e-9):
    lengths = [30, 25, 12, 5]
    batch = ragged_batch(lengths)
    ids = torch.cat([batch["input_ids"], torch.randint(3, 128, (4, 14))], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 14, dtype=torch.long)], 1)
    together = run(model, make(), ids, mask, [30, 31, 35, 36, 37, 44])
    for row, length in enumerate(lengths):
        begin = 30 - length
        alone = run(model, make(), ids[row : row + 1, begin:], mask[row : row + 1, begin:],
                    [end - begin for end in (30, 31, 35, 36, 37, 44)])  # fmt: skip
        for expected, got in zip(alone, together, strict=True):
            assert_close(f"row {row}", expected[0], got[row], tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 10},
        {"budget": 28},
        {"budget": 0.5},
        {"budget": 20, "layer_budgets": [3, 2, 2, 1]},
        {"budget": 0.6, "layer_budgets": [1, 2, 2, 3]},
    ],
    ids=str,
)
def test_a_left_padded_batch_equals_single_runs(method, options):
    model = tiny_model().double()
    options = {**options, "recent_size": 1 if method == "tova" else 4}
    check_rows_are_independent(model, lambda: make_cache(model, method, **options))


@pytest.mark.parametrize("pre_rope", [False, True], ids=["", "pre_rope"])
@pytest.mark.parametrize("method", METHODS)
def test_so_does_a_stack_over_packed_storage(method, pre_rope):
    model = tiny_model().double()
    outer = {"type": method, "budget": 14, "recent_size": 1 if method == "tova" else 4}
    # Angles of the rotation are float32, so what is turned there and back is not double's own.
    tolerance = 1e-5 if pre_rope else 1e-9
    check_rows_are_independent(model, lambda: make_cache(model, [outer, {**PACKED, "pre_rope": pre_rope}]), tolerance)


@pytest.mark.parametrize("kind", ["snapkv", "tova", "h2o", "pyramid_infer", "pyramid_infer_cache"])
def test_keys_before_rope_know_their_places_after_others_went(kind):
    model, ids = tiny_model(), torch.randint(3, 128, (1, 120))
    outer = {"type": kind, **SMALL[kind], **({} if "pyramid" in kind else {"budget": 60})}
    packed = make_cache(model, [outer, {**PACKED, "bits": 8, "pre_rope": True}])
    exact = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=exact)
        for piece in ids.split([100, *[1] * 20], 1):
            model(piece, past_key_values=packed)
    layer = packed.own_layers[2]
    sinks = int(layer.sink_count[0])
    recent = layer.places[0, 0, :, 0]
    places = torch.cat([recent[:sinks], layer.packed_places[0, 0], recent[sinks:]])
    assert (places.diff() > 0).all() and places[-1] == 119 and len(places) < 118
    prompt = int((places < 100).sum())
    expected = exact.layers[2].keys[0][:, places[:prompt]]
    assert_close("keys", expected, layer._dense(torch.float32)[0][0, :, :prompt], 0.1)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "phi3", "gpt_neox", "olmo2"])
def test_families(family):
    if family == "gemma2":
        model = tiny_model(family, attn_implementation="eager")
        check_rows_are_independent(model, lambda: make_cache(model, "snapkv", budget=12, recent_size=4), 1e-4)
    else:
        model = tiny_model(family).double()
        check_rows_are_independent(model, lambda: make_cache(model, "snapkv", budget=12, recent_size=4))


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_what_the_scores_say(method):
    model = tiny_model()
    cache = make_cache(model, method, budget=12, recent_size=1 if method == "tova" else 4)
    layer, recorded = cache.own_layers[2], {}
    original = layer._evict

    def spy(scores):
        recorded.update(scores=scores.clone(), keys=layer.keys.clone())
        original(scores)

    layer._evict = spy
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 30)), past_key_values=cache)
    scores, budget = recorded["scores"][0], layer.stored
    recent = layer.policy.protected(budget)[1]
    for head in range(2):
        values = scores[head if scores.shape[0] > 1 else 0].tolist()
        old = sorted(range(30 - recent), key=lambda i: -values[i])[: budget - recent]
        kept = sorted([*old, *range(30 - recent, 30)])
        assert torch.equal(layer.keys[0, head], recorded["keys"][0, head, kept])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from(["one", "many", "crop", "reorder"]), min_size=3, max_size=9), st.sampled_from(METHODS))
def test_random_operations_keep_the_books(operations, method):
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    cache = make_cache(model, method, budget=14, recent_size=1 if method == "tova" else 4)
    seen = 0
    for operation in ["many", *operations]:
        if operation in ("one", "many"):
            length = 1 if operation == "one" else 9
            with torch.no_grad():
                model(torch.randint(3, 128, (2, length), generator=generator), past_key_values=cache)
            seen += length
        elif operation == "crop":
            before = cache.nbytes()
            try:
                cache.crop(-1)
                seen -= 1
            except ValueError as error:  # a layer with a tiny budget may have no latest token to spare
                assert "no longer stored" in str(error)
                assert cache.nbytes() == before
        else:
            cache.reorder_cache(torch.tensor([1, 0]))
        assert cache.get_seq_length() == seen
        for layer in cache.own_layers:
            assert layer.keys.shape[-2] == layer.stored == layer.real_count.max()
            assert layer.stored <= max(14 + 8, 14 + seen)
            assert layer.get_mask_sizes(1) == (layer.stored + 1, seen - layer.stored)


@pytest.mark.parametrize("method", METHODS)
def test_recording_several_forwards_changes_nothing(method):
    model, ids = tiny_model(), torch.randint(3, 128, (2, 60))
    recent, layers = 1 if method == "tova" else 4, {"layer_budgets": [1] * 4} if method == "pyramid_kv" else {}
    straight, recorded = (make_cache(model, method, budget=30, recent_size=recent, **layers) for _ in range(2))
    with torch.no_grad():
        for cache in (straight, recorded):
            model(ids[:, :8], past_key_values=cache)
        recorded.activate_past_recording()
        for piece in ids[:, 8:40].split([9, 9, 14], 1):  # the last one alone exceeds the budget
            for cache in (straight, recorded):
                model(piece, past_key_values=cache)
        recorded.crop(0)
        recorded.end_recording()
        expected, got = (model(ids[:, 40:], past_key_values=cache).logits for cache in (straight, recorded))
    assert_close("logits", expected, got, 1e-5)


def test_layers_that_share_keys_vote_together():
    """Under Cross-Layer Attention a producer's own and its consumers' queries count alike."""
    model = tiny_model()
    layer = make_cache(model, "h2o", budget=12, recent_size=4).own_layers[0]
    query, keys = torch.randn(3, 1, 4, 20, 16), torch.randn(1, 2, 20, 16)
    layer.expect(None, model.model, torch.arange(20)[None])
    layer.update(keys, keys)
    alone = [layer.policy.score(layer, one, keys, keys, 0.25) for one in query]
    for one in query:
        layer.observe(one, keys, keys, 0.25, None)
    assert_close("scores", sum(alone), layer._new_scores, 1e-6)


def test_a_budget_in_bytes_is_kept():
    model = tiny_model()
    cache = make_cache(model, "snapkv", budget="20KiB", recent_size=4)
    with torch.no_grad():
        model(torch.randint(3, 128, (2, 60)), past_key_values=cache)
    assert 0.9 * 20 * 1024 < cache.nbytes() <= 20 * 1024


@pytest.mark.parametrize("inner", [None, {}, {"pre_rope": True}, {"method": "uniform", "group": 8}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_in_bytes_counts_everything(method, inner):
    model, size = tiny_model(), (96 if method == "h2o" else 64) * 1024  # H2O holds queries, too
    outer = {"type": method, "budget": f"{size} B", "recent_size": 1 if method == "tova" else 4}
    stack = [outer] if inner is None else [outer, {**PACKED, **inner}]
    cache, generated = make_cache(model, stack), 0 if method in ("snapkv", "pyramid_kv", "knorm") else 30
    with torch.no_grad():
        model(torch.randint(3, 128, (2, 400)), past_key_values=cache)
        held = [cache.nbytes()]
        for _ in range(generated):
            model(torch.randint(3, 128, (2, 1)), past_key_values=cache)
            held.append(cache.nbytes())
    assert 0.6 * size < max(held) <= size


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_above_the_length_changes_nothing(method):
    model = tiny_model()
    ids = torch.randint(3, 128, (1, 20))
    layers = {"layer_budgets": [1, 1, 1, 1]} if method == "pyramid_kv" else {}
    ours = model.generate(ids, past_key_values=make_cache(model, method, budget=100, **layers), max_new_tokens=20)
    host = model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=20)
    assert torch.equal(ours, host)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("snapkv", {"budget": 12, "recent_size": 32}, "a budget of 12 tokens is too small"),
        ("snapkv", {"kernel": 4}, "kernel must be an odd number"),
        ("snapkv", {"pooling": "sum"}, "pooling must be"),
        ("h2o", {"budget": 0.0}, "ratio must be above 0"),
        ("tova", {"layer_budgets": [1, 0, 1, 1]}, "positive weights"),
        ("tova", {"layer_budgets": [1, 1]}, "2 weights for 4 layers"),
        ("tova", {"layer_budgets": [1, float("nan"), 1, 1]}, "positive weights"),
        ("tova", {"layer_budgets": "1111"}, "positive weights, one for each layer, got '1111'"),
        ("snapkv", {"budget": 40, "layer_budgets": [1, 1, 1, 0.1]}, "leave 5 of a budget of 40 tokens to one layer"),
        ("pyramid_kv", {"beta": "20"}, "beta must be a number, got '20'"),
        ("pyramid_kv", {"beta": 0.5}, "beta must be at least 1"),
    ],
)
def test_bad_options_are_refused_by_a_sentence(kind, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_cache(tiny_model(), kind, **options)


def test_bytes_too_few_for_the_batch_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="tokens for each of 2 rows"):
        model(torch.randint(3, 128, (2, 9)), past_key_values=make_cache(model, "snapkv", budget="8KiB"))


def test_only_decoquant_can_be_inside():
    with pytest.raises(ValueError, match="over decoquant alone, got sirllm"):
        make_cache(tiny_model(), [{"type": "snapkv"}, {"type": "sirllm"}])


def test_without_the_attention_seam_it_refuses_to_go_on():
    model = tiny_model()
    cache = make_cache(model, "tova")
    used, SEAM.used = SEAM.used, False
    try:
        with pytest.raises(RuntimeError, match="never saw the attention of LlamaModel"):
            model(torch.randint(3, 128, (1, 9)), past_key_values=cache)
    finally:
        SEAM.used = used


def test_tokens_that_went_cannot_be_taken_back():
    model = tiny_model()
    cache = make_cache(model, "snapkv", budget=12, recent_size=4)
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 30)), past_key_values=cache)
    with pytest.raises(ValueError, match="no longer stored"):
        cache.crop(-5)


@pytest.mark.parametrize("kind", ["snapkv", "pyramid_infer_cache"])
def test_a_saved_stack_goes_into_no_other_storage(kind):
    model, outer = tiny_model(), {"type": kind, **SMALL[kind]}
    cache = make_cache(model, [outer, PACKED])
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 30)), past_key_values=cache)
    for other in ([outer], [outer, {**PACKED, "method": "uniform", "group": 8}]):
        with pytest.raises(ValueError, match="the saved cache is for the storage"):
            make_cache(model, other).load_state_dict(cache.state_dict())
    assert make_cache(model, [outer, PACKED]).load_state_dict(cache.state_dict()).nbytes() == cache.nbytes()


def test_scores_are_made_only_where_they_are_used():
    model, calls = tiny_model(num_hidden_layers=1), []  # how many tokens were seen before each call
    cache = make_cache(model, "tova", budget=12)
    score = type(cache.config).score
    token = torch.randint(3, 128, (1, 1))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(cache.config), "score", lambda *args: calls.append(cache.committed) or score(*args))
        for _ in range(39):
            model(token, past_key_values=cache)
    assert calls == [20, 29, 38]  # whenever 9 more than the budget are stored
    assert cache.own_layers[0].stored == 12


@pytest.mark.parametrize("inner", [[], [PACKED]], ids=["dense", "packed"])
def test_scores_of_queries_that_waited_are_those_given_at_once(inner):
    model, ids = tiny_model().double(), torch.randint(3, 128, (1, 60))
    stack = [{"type": "h2o", "budget": 40, "recent_size": 4}, *inner]
    waits, at_once = make_cache(model, stack), make_cache(model, stack)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=waits)
        model(ids[:, :20], past_key_values=at_once)
        for token in ids[:, 20:].split(1, 1):
            expected = model(token, past_key_values=waits).logits
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("hf_ext.caches.evicting_layer.WAITING", 1)
                got = model(token, past_key_values=at_once).logits
            assert at_once.own_layers[0].waiting is None
            assert_close("logits", expected, got, 1e-9)
    assert waits.own_layers[0].stored <= 48
