import copy

import pytest
import torch

from hf_ext import CLAConfig, SirLLMConfig, convert_to_cla
from hf_ext.cla.shared import shared_layers
from hf_ext.patches.cla_config import layer_kinds
from hf_ext.patches.cla_convert import collect_moments, probe
from hf_ext.patches.cla_rank import candidates, map_for_bytes, rank_layers
from hf_ext.testing import FAMILIES, assert_close, ragged_batch, tiny_config, tiny_model

ALL = pytest.mark.parametrize("family", FAMILIES)
TEXT = ragged_batch([300])["input_ids"][0]


@ALL
@pytest.mark.parametrize("init", ["copy", "mean"])
def test_the_original_is_untouched_and_again_changes_nothing(family, init):
    model, batch = tiny_model(family).bfloat16(), ragged_batch([9, 5])
    before = copy.deepcopy(model.state_dict())
    shared = convert_to_cla(model, {"sharing_factor": 2}, init)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not shared_layers(model) and model.config.hf_ext is None
    assert len(shared_layers(shared)) == 2 and shared.dtype == torch.bfloat16
    again = convert_to_cla(shared, {"sharing_factor": 2}, init)
    assert torch.equal(again(**batch).logits, shared(**batch).logits)


@ALL
def test_copy_equals_loading_the_checkpoint_and_probing(family, tmp_path):
    model, batch = tiny_model(family), ragged_batch([9, 5])
    stock = model(**batch).logits
    shared = convert_to_cla(model, CLAConfig())(**batch).logits
    sources = convert_map(model)
    with probe(model, sources):
        assert torch.equal(model(**batch).logits, shared)
    assert torch.equal(model(**batch).logits, stock)
    assert not any(module._forward_pre_hooks for module in model.modules())


def convert_map(model):
    from hf_ext.cla.plan import plan

    return plan(CLAConfig(), layer_kinds(model.config))


def test_mean_is_the_true_mean_with_bias_and_norm():
    for family, names in (("qwen2", ["k_proj.weight", "v_proj.bias"]), ("qwen3", ["k_norm.weight", "v_proj.weight"])):
        model = tiny_model(family, num_hidden_layers=3)
        for parameter in model.parameters():
            parameter.data.normal_()
        shared = convert_to_cla(model, {"sharing_factor": 3}, "mean")
        for name in names:
            parts = [model.get_parameter(f"model.layers.{layer}.self_attn.{name}") for layer in range(3)]
            mean = (parts[0].double() + parts[1].double() + parts[2].double()) / 3
            assert_close(name, mean, shared.get_parameter(f"model.layers.0.self_attn.{name}").double(), 1e-6)


@pytest.mark.parametrize(("family", "query"), [("phi3", slice(0, 64)), ("gpt_neox", None)])
def test_mean_of_a_fused_projection_leaves_queries_alone(family, query):
    model = tiny_model(family)
    shared = convert_to_cla(model, {"sharing_factor": 4}, "mean")
    layers = {"phi3": "model.layers.{}.self_attn.qkv_proj", "gpt_neox": "gpt_neox.layers.{}.attention.query_key_value"}
    name = f"{layers[family]}.weight"
    parts = torch.stack([model.get_parameter(name.format(layer)) for layer in range(4)])
    found = shared.get_parameter(name.format(0))
    rows = torch.zeros(len(found), dtype=torch.bool)
    rows[query if query is not None else [r for r in range(192) if r // 16 % 3 == 0]] = True
    assert torch.equal(found[rows], parts[0][rows])
    assert_close("mean", parts.mean(0)[~rows], found[~rows], 1e-6)


def test_fit_brings_the_converted_model_nearer():
    """Layers whose keys and values are related, as in trained models, with queries and outputs that are not."""
    model = tiny_model("llama")
    for layer in (1, 3):
        for name in ("k_proj", "v_proj"):
            own, other = (model.get_parameter(f"model.layers.{i}.self_attn.{name}.weight") for i in (layer, layer - 1))
            own.data.copy_(-1.5 * other)
    model.model.embed_tokens.weight.data.mul_(20)  # layers change the normalised states little
    batch = {"input_ids": TEXT[None, :64]}
    with torch.no_grad():
        dense = model(**batch).logits
        errors = {}
        for init in ("copy", "fit"):
            shared = convert_to_cla(model, CLAConfig(), init, TEXT)
            errors[init] = (shared(**batch).logits - dense).norm()
    assert errors["fit"] < 0.7 * errors["copy"]


def test_fit_can_be_probed_and_is_undone():
    model, batch = tiny_model("qwen2"), ragged_batch([9, 5])
    stock, shared = model(**batch).logits, convert_to_cla(model, CLAConfig(), "fit", TEXT)(**batch).logits
    with probe(model, (0, 0, 2, 2), collect_moments(model, {1: 0, 3: 2}, TEXT)):
        assert torch.equal(model(**batch).logits, shared)
    assert torch.equal(model(**batch).logits, stock)


def test_progressive_conversion(tmp_path):
    model, batch = tiny_model("phi3"), ragged_batch([9, 5])
    first = convert_to_cla(model, {"kv_source_layers": [0, 0, 2, 3]})
    both = convert_to_cla(first, {"kv_source_layers": [0, 0, 2, 2]})
    assert torch.equal(both(**batch).logits, convert_to_cla(model, CLAConfig())(**batch).logits)
    wider = convert_to_cla(both, {"kv_source_layers": [0, 0, 0, 0]})
    assert shared_layers(wider) == {1: 0, 2: 0, 3: 0} and shared_layers(both) == {1: 0, 3: 2}
    with pytest.raises(ValueError, match="Layer 1 cannot make its own keys and values"):
        convert_to_cla(both, {"kv_source_layers": [0, 1, 2, 2]})
    assert shared_layers(both) == {1: 0, 3: 2}
    assert both.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_progressive_conversion_with_separate_norms():
    model, batch = tiny_model("llama"), ragged_batch([9, 5])
    first = convert_to_cla(model, {"kv_source_layers": [0, 0, 2, 3], "separate_kv_norm": True})
    both = convert_to_cla(first, {"kv_source_layers": [0, 0, 2, 2], "separate_kv_norm": True})
    assert_close("logits", convert_to_cla(model, CLAConfig())(**batch).logits, both(**batch).logits, 1e-5)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(both.generate(**batch, **greedy), both.generate(**batch, **greedy, use_cache=False))


def test_separate_norms_cannot_be_dropped():
    own = convert_to_cla(tiny_model("llama"), {"separate_kv_norm": True})
    with pytest.raises(ValueError, match="keep separate_kv_norm=True"):
        convert_to_cla(own, {"kv_source_layers": [0, 0, 0, 0]})
    assert shared_layers(own) == {1: 0, 3: 2}


def test_only_a_dense_model_is_ranked():
    with pytest.raises(ValueError, match="the layers of this one share already"):
        rank_layers(convert_to_cla(tiny_model("llama"), {}), TEXT, window=64)


def test_a_model_that_shares_is_probed_further_and_put_back():
    shared = convert_to_cla(tiny_model("llama"), {"kv_source_layers": [0, 0, 2, 3]})
    ids = TEXT[None, :30]
    with torch.no_grad():
        before = shared(ids).logits
        with probe(shared, (0, 0, 2, 2)):
            probed = shared(ids).logits
        assert torch.equal(shared(ids).logits, before)
        further = convert_to_cla(shared, {"kv_source_layers": [0, 0, 2, 2]})
        assert torch.equal(further(ids).logits, probed)
    refused = pytest.raises(ValueError, match=r"Layers \[1\] of this model read other layers' keys and values")
    with refused, probe(shared, (0, 1, 2, 2)):
        pass


def test_other_flags_stay():
    model = tiny_model("llama", hf_ext={"kv_cache": {"type": "sirllm"}})
    flags = convert_to_cla(model, CLAConfig()).config.hf_ext
    assert flags.cla == CLAConfig() and flags.kv_cache == (SirLLMConfig(),)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"init": "sum"}, "init must be one of copy, mean, fit, got 'sum'"),
        ({"init": "fit"}, "init='fit' needs calibration=token ids"),
        ({"config": {"sharing_factor": 9}}, "at most the number of layers, 4, got 9"),
        ({"config": {"factor": 2}}, "CLAConfig has no option 'factor'"),
    ],
)
def test_what_cannot_be_converted(options, sentence):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=sentence):
        convert_to_cla(model, **{"config": {}, **options})
    assert not shared_layers(model)


def test_adapters_and_fused_projections_are_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"without adapters; call merge_and_unload\(\) first"):
        convert_to_cla(adapted, {})
    for family in ("gpt_neox", "phi3"):
        with pytest.raises(ValueError, match="needs separate query and output projections"):
            convert_to_cla(tiny_model(family), {}, "fit", TEXT)


def test_ranking_finds_the_layer_that_costs_nothing_and_resumes():
    model = tiny_model("llama", num_hidden_layers=5)
    model.model.layers[3].self_attn.o_proj.weight.data.zero_()  # whose keys it reads is of no importance
    written = []
    ranked = rank_layers(model, TEXT, window=64, done=written.append)
    costs = {pair.layer: pair.nats for pair in ranked}
    assert costs[3] == pytest.approx(0, abs=1e-9) and all(abs(costs[layer]) > 1e-6 for layer in (1, 2, 4))
    assert list(costs.values()) == sorted(costs.values())
    assert [pair.layer for pair in written] == [1, 2, 3, 4]
    again = []
    assert rank_layers(model, TEXT, window=64, known=written[:2], done=again.append) == ranked
    assert [pair.layer for pair in again] == [3, 4]
    sources = map_for_bytes(model, ranked, 4 * model.kv_bytes_per_token() // 5)
    assert [layer for layer, source in enumerate(sources) if layer != source] == [ranked[0].layer]
    fitted = {pair.layer: pair.nats for pair in rank_layers(model, TEXT, init="fit", window=64)}
    assert fitted[3] == pytest.approx(0, abs=1e-9) and fitted[1] != costs[1]
    with pytest.raises(ValueError, match="init must be copy or fit for a ranking, got 'mean'"):
        rank_layers(model, TEXT, init="mean")


def test_ranking_reaches_further_back():
    model, near = tiny_model("llama"), rank_layers(tiny_model("llama"), TEXT, init="fit", window=64)
    far = rank_layers(model, TEXT, init="fit", reach=2, window=64)
    assert sorted((pair.layer, pair.source) for pair in far) == [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2)]
    assert [pair for pair in far if pair.layer == pair.source + 1] == near
    assert rank_layers(model, TEXT, init="fit", reach=2, window=64, known=near) == far
    with pytest.raises(ValueError, match="reach must be at least 1, got 0"):
        rank_layers(model, TEXT, reach=0)


def test_candidates_stay_within_a_kind():
    kinds = layer_kinds(tiny_config("gemma2"))
    assert candidates(kinds) == [(2, 0), (3, 1)] and candidates(kinds, 2) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_fit_finds_heads_that_changed_places(family):
    """A layer with the keys and values of the one of its kind before it in another order of heads loses nothing."""
    model = tiny_model(family, num_key_value_heads=2, num_attention_heads=4)
    reader = 2 if family.startswith("gemma") else 1
    first, second = (model.model.layers[layer].self_attn for layer in (0, reader))
    for layer in model.model.layers[:reader]:  # so that both layers see the same states
        for silent in (layer.self_attn.o_proj, layer.mlp.down_proj):
            silent.weight.data.zero_()
    for name in ("k_proj", "v_proj", "k_norm"):
        for key, parameter in first.named_parameters():
            if key.startswith(name):
                swapped = parameter.data
                if len(parameter) == model.config.num_key_value_heads * first.head_dim:
                    swapped = parameter.data.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
                second.get_parameter(key).data.copy_(swapped)
    batch = {"input_ids": TEXT[None, :64]}
    sources = [0 if layer == reader else layer for layer in range(4)]
    copied, fitted = (convert_to_cla(model, {"kv_source_layers": sources}, init, TEXT) for init in ("copy", "fit"))
    dense = model(**batch).logits
    assert_close("fit", dense, fitted(**batch).logits, 0.02)
    assert (copied(**batch).logits - dense).norm() > 10 * (fitted(**batch).logits - dense).norm()
