"""One conformance table for Cross-Layer Attention on every family."""

import copy
import pickle
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.cache_utils import DummyLayer

from hf_ext import CLAConfig, HfExtConfig
from hf_ext.cla.plan import plan
from hf_ext.cla.shared import shared_layers
from hf_ext.patches.cla_config import layer_kinds
from hf_ext.testing import FAMILIES, assert_close, ragged_batch, tiny_config, tiny_model

ALL = pytest.mark.parametrize("family", FAMILIES)


@cache
def model_of(family, factor=2, layers=4):
    return tiny_model(family, num_hidden_layers=layers, hf_ext={"cla": {"sharing_factor": factor}})


def reference_logits(config, weights, ids, sources):
    """Llama with shared keys and values written out in float64, one token and one head at a time.

    It reads weights only: no module, mask, rotary or cache code of the host takes part.
    """
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = torch.arange(ids.shape[1]).double()[:, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def rotate(x):
        a, b = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    hidden, kept = weights["model.embed_tokens.weight"][ids[0]], {}
    for layer, source in enumerate(sources):
        at = f"model.layers.{layer}."
        x = norm(hidden, at + "input_layernorm.weight")
        if source == layer:
            keys = (x @ weights[at + "self_attn.k_proj.weight"].T).view(-1, kv_heads, size).transpose(0, 1)
            kept[layer] = rotate(keys), (x @ weights[at + "self_attn.v_proj.weight"].T).view(-1, kv_heads, size)
        query = rotate((x @ weights[at + "self_attn.q_proj.weight"].T).view(-1, heads, size).transpose(0, 1))
        rows = []
        for token in range(ids.shape[1]):
            for head in range(heads):
                keys, values = kept[source][0][head * kv_heads // heads], kept[source][1][:, head * kv_heads // heads]
                scores = (keys[: token + 1] @ query[head, token] / size**0.5).softmax(0)
                rows.append(scores @ values[: token + 1])
        hidden = hidden + torch.stack(rows).view(ids.shape[1], -1) @ weights[at + "self_attn.o_proj.weight"].T
        x = norm(hidden, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(x @ weights[at + "mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (x @ weights[at + "mlp.up_proj.weight"].T)) @ weights[at + "mlp.down_proj.weight"].T
    return (norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T)[None]


@pytest.mark.parametrize("sources", [(0, 0, 2, 2, 4, 4), (0, 0, 0, 3, 3, 3), (0, 1, 0, 1, 4, 4)])
def test_equals_a_reference_that_shares_activations(sources):
    """Logits, and the gradient of every weight: a producer's includes what comes back through its consumers."""
    model = tiny_model("llama", num_hidden_layers=6, hf_ext={"cla": {"kv_source_layers": sources}})
    ids = ragged_batch([11])["input_ids"]
    weights = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    expected, actual = reference_logits(model.config, weights, ids, sources), model(ids).logits
    assert_close("logits", expected, actual.double(), 1e-5)
    direction = torch.randn_like(actual)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(name, weights[name].grad, parameter.grad.double(), 1e-4)


@ALL
def test_factor_1_is_the_stock_model(family):
    batch, stock, cla = ragged_batch([9, 5]), tiny_model(family), model_of(family, factor=1)
    with torch.no_grad():
        assert torch.equal(stock(**batch).logits, cla(**batch).logits)
    assert list(stock.state_dict()) == list(cla.state_dict())


@ALL
def test_consumers_own_no_keys_and_values(family):
    stock, cla = tiny_model(family), model_of(family)
    kinds, config = layer_kinds(stock.config), stock.config
    kv = kinds[0].kv_heads * kinds[0].head_dim
    bias = 2 * kv if family in ("qwen2", "gpt_neox") else 0
    key_norm = {"qwen3": kinds[0].head_dim, "gemma3_text": kinds[0].head_dim, "olmo2": kv}.get(family, 0)
    saved = len(shared_layers(cla)) * (2 * config.hidden_size * kv + bias + key_norm)
    assert stock.num_parameters() - cla.num_parameters() == saved
    consumers = tuple(f"layers.{layer}." for layer in shared_layers(cla))
    left = [name for name, _ in cla.named_modules() if any(at in name for at in consumers)]
    assert not [name for name in left if name.endswith((".k_proj", ".v_proj", ".k_norm"))]


@ALL
@pytest.mark.parametrize("factor", [2, 3])
def test_generation_with_and_without_cache(family, factor):
    model, batch = model_of(family, factor), ragged_batch([12, 5])
    greedy = {"max_new_tokens": 10, "do_sample": False}
    plain = model.generate(**batch, **greedy, use_cache=False)
    assert torch.equal(model.generate(**batch, **greedy), plain)
    assert torch.equal(model.generate(**batch, **greedy, prefill_chunk_size=5), plain)
    assert torch.equal(model.generate(**batch, **greedy, cache_implementation="static"), plain)


@ALL
def test_beams_samples_and_drafts(family):
    model, batch, one = model_of(family), ragged_batch([12, 5]), ragged_batch([12])
    for options in ({"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}):
        options |= {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(**batch, max_new_tokens=8, do_sample=True, use_cache=use_cache))
    assert torch.equal(*drawn)
    plain = model.generate(**one, max_new_tokens=8, do_sample=False, use_cache=False)
    if family not in ("mistral", "gemma2", "gemma3_text"):  # the host refuses drafts with sliding-window caches
        drafted = model.generate(**one, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(drafted, plain)
        assisted = model.generate(**one, max_new_tokens=8, do_sample=False, assistant_model=model_of(family, 3))
        assert torch.equal(assisted, plain)


@ALL
@pytest.mark.parametrize("chunks", [(1,) * 17, (5, 12), (16, 1), (1, 16), (7, 7, 3)])
def test_chunked_forward_equals_one_forward(family, chunks):
    model, ids = model_of(family), ragged_batch([17])["input_ids"]
    with torch.no_grad():
        whole, kept, parts = model(ids, use_cache=False).logits, DynamicCache(config=model.config), []
        for part in ids.split(chunks, dim=1):
            parts.append(model(part, past_key_values=kept).logits)
    assert_close("logits", whole, torch.cat(parts, 1), 1e-5)
    assert kept.get_seq_length() == 17 and len(kept) == 4


def stored_bytes(kept):
    return sum(t.nbytes for layer in kept.layers for t in (layer.keys, layer.values) if t is not None)


@ALL
@pytest.mark.parametrize("factor", [2, 3])
def test_cache_bytes(family, factor):
    model, dense, ids = model_of(family, factor, layers=6), tiny_model(family, num_hidden_layers=6), ragged_batch([7])
    filled = model(**ids).past_key_values
    sources = plan(CLAConfig(sharing_factor=factor), layer_kinds(model.config))
    assert [isinstance(layer, DummyLayer) for layer in filled.layers] == [s != i for i, s in enumerate(sources)]
    assert stored_bytes(filled) * 6 == stored_bytes(dense(**ids).past_key_values) * len(set(sources))
    assert stored_bytes(filled) == 7 * model.kv_bytes_per_token()
    assert dense.kv_bytes_per_token() * len(set(sources)) == model.kv_bytes_per_token() * 6
    assert model.kv_bytes_per_token(torch.bfloat16) * 2 == model.kv_bytes_per_token()


def test_static_cache_bytes_and_a_cache_without_config():
    model, ids = model_of("llama"), ragged_batch([7])["input_ids"]
    kept = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_close("static", expected, model(ids, past_key_values=kept).logits, 1e-5)
        assert_close("no config", expected, model(ids, past_key_values=DynamicCache()).logits, 1e-5)
    assert stored_bytes(kept) == 32 * model.kv_bytes_per_token()


@ALL
def test_cache_operations_between_steps(family):
    """Reorder, repeat and select rows, then take tokens back: continuing equals starting over."""
    model, ids = model_of(family), ragged_batch([7, 7])["input_ids"]
    more = torch.tensor([[5], [9]])
    with torch.no_grad():
        kept = model(ids).past_key_values
        kept.reorder_cache(torch.tensor([1, 0]))
        assert_close(
            "reorder",
            model(torch.cat([ids.flip(0), more], 1)).logits[:, -1:],
            model(more, past_key_values=kept).logits,
            1e-5,
        )
        kept = model(ids).past_key_values
        kept.batch_repeat_interleave(2)
        kept.batch_select_indices(torch.tensor([3, 0]))
        assert_close(
            "select",
            model(torch.cat([ids.flip(0), more], 1)).logits[:, -1:],
            model(more, past_key_values=kept).logits,
            1e-5,
        )
        if not any(kept.is_sliding):
            kept = model(ids).past_key_values
            kept.crop(-3)
            again = model(torch.cat([ids[:, 4:], more], 1), past_key_values=kept).logits
            assert_close("crop", model(torch.cat([ids, more], 1)).logits[:, 4:], again, 1e-5)


@ALL
def test_attention_implementations_agree(family):
    batch = ragged_batch([9, 5])
    rows = batch["attention_mask"].bool()
    cla = {"cla": {"sharing_factor": 2}}
    eager = tiny_model(family, hf_ext=cla, attn_implementation="eager")
    with torch.no_grad():
        out = eager(**batch, output_attentions=True, output_hidden_states=True)
        assert len(out.attentions) == 4 and len(out.hidden_states) == 5
        default = model_of(family)(**batch).logits
        assert_close("default", out.logits[rows], default[rows], 1e-5)


@pytest.mark.slow
@ALL
def test_flex_attention_agrees(family):
    batch, flex = ragged_batch([9, 5]), copy.deepcopy(model_of(family))
    rows = batch["attention_mask"].bool()
    flex.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert_close("flex", model_of(family)(**batch).logits[rows], flex(**batch).logits[rows], 1e-5)


@ALL
def test_bfloat16(family):
    model, batch = copy.deepcopy(model_of(family)).bfloat16(), ragged_batch([9, 5])
    with torch.no_grad():
        rows = batch["attention_mask"].bool()
        assert_close("bf16", model_of(family)(**batch).logits[rows], model(**batch).logits[rows].float(), 0.15)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(**batch, **greedy).shape == (2, 15)
    assert model(**batch).past_key_values.layers[0].keys.dtype == torch.bfloat16


def test_copies_and_pickles_share_within_themselves():
    for family in ("llama", "phi3", "gpt_neox"):
        model, batch = model_of(family), ragged_batch([9, 5])
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            expected = model(**batch).logits
            for other in (twin, thawed):
                assert torch.equal(expected, other(**batch).logits)
                for parameter in other.parameters():
                    parameter.zero_()
            assert torch.equal(expected, model(**batch).logits)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in ("phi3", "gpt_neox", "olmo2")])
def test_separate_norm_starts_as_the_same_function(family):
    stock, batch = model_of(family), ragged_batch([9, 5])
    own = tiny_model(family, hf_ext={"cla": {"separate_kv_norm": True}})
    assert own.num_parameters() - stock.num_parameters() == 2 * 64  # hidden size for each of two producers
    with torch.no_grad():
        assert_close("logits", stock(**batch).logits, own(**batch).logits, 1e-6)
        norms = [m for name, m in own.named_modules() if name.endswith("kv_norm")]
        for norm in norms:
            norm.weight.mul_(0.5).add_(0.25)
        assert (stock(**batch).logits - own(**batch).logits).abs().max() > 1e-4
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(own.generate(**batch, **greedy), own.generate(**batch, **greedy, use_cache=False))


def test_separate_norm_acts_on_keys_and_values_only():
    """Against the reference formula: k = W_k (kv_norm * x / rms(x)), queries keep input_layernorm."""
    own = tiny_model("llama", hf_ext={"cla": {"separate_kv_norm": True}})
    layer, x = own.model.layers[0], torch.randn(1, 3, 64)
    norm = layer.input_layernorm
    norm.weight.data.uniform_(0.5, 2), norm.kv_norm.weight.data.uniform_(0.5, 2)
    unit = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    both = norm(x)
    for name, weight in (("q_proj", norm.weight), ("k_proj", norm.kv_norm.weight), ("v_proj", norm.kv_norm.weight)):
        slot = getattr(layer.self_attn, name)
        assert_close(name, (unit * weight) @ slot.module().weight.T, slot(both), 1e-5)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "olmo2"])
def test_separate_norm_is_refused_where_there_is_none(family):
    with pytest.raises(ValueError, match="separate_kv_norm=True needs an RMSNorm in front of"):
        tiny_model(family, hf_ext={"cla": {"separate_kv_norm": True}})


def test_hybrid_map_across_types_is_refused():
    kinds = [kind.attention for kind in layer_kinds(tiny_config("gemma2"))]
    assert kinds == ["sliding_attention", "full_attention"] * 2
    with pytest.raises(ValueError, match=r"layer 1 \(full_attention, 2 KV heads of size 16\) cannot read the keys"):
        tiny_model("gemma2", hf_ext={"cla": {"kv_source_layers": [0, 0, 2, 2]}})


def test_unsupported_model_is_refused_by_name():
    with pytest.raises(ValueError, match=r"cla does not support GPT2Model \(model type 'gpt2'\); supported"):
        AutoModelForCausalLM.from_config(tiny_config("gpt2", n_layer=2, n_head=2, n_embd=64, hf_ext={"cla": {}}))


def test_a_layer_by_itself_says_what_it_lacks():
    layer = model_of("llama").model.layers[1]
    x = torch.randn(1, 3, 64)
    embeddings = model_of("llama").model.rotary_emb(x, torch.arange(3)[None])
    with pytest.raises(RuntimeError, match="Layer 1 reads the keys and values of layer 0"):
        layer(x, position_embeddings=embeddings)


def test_composite_model_shares_in_its_text_decoder():
    text = tiny_config("gemma3_text").to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = tiny_config("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, hf_ext={"cla": {}})
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert shared_layers(model) == {1: 0, 3: 2}
    batch = ragged_batch([9, 5])
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**batch, **greedy), model.generate(**batch, **greedy, use_cache=False))
    assert [isinstance(layer, DummyLayer) for layer in model(**batch).past_key_values.layers] == [False, True] * 2


def test_bytes_are_not_guessed_for_other_kinds_of_layers():
    mamba = AutoModelForCausalLM.from_config(tiny_config("mamba"))
    with pytest.raises(ValueError, match=r"counts layers of type full_attention.*; got linear_attention"):
        mamba.kv_bytes_per_token()
    mamba.config.kv_lora_rank = 16
    with pytest.raises(ValueError, match="cannot tell what a 'mamba' model stores"):
        mamba.kv_bytes_per_token()


def test_models_without_the_flag_are_untouched():
    model_of("llama")
    stock = tiny_model("llama")
    assert stock.config.kv_sharing_modes is None and not stock.model._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in stock.modules())
    assert HfExtConfig().to_dict() == {}
