import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache

from hf_ext import HfExtConfig, SirLLMConfig, make_cache
from hf_ext.caches.sirllm import SirLLMCache
from hf_ext.patches.forward_context import attach, detach, find_decoder
from hf_ext.testing import ragged_batch, tiny_config, tiny_model

OPTIONS = {"sink_size": 2, "memory_size": 8, "recent_size": 6, "block_size": 4}
PROMPT = ragged_batch([9, 4])


def generate(model, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**PROMPT, **options)


def hooks_of(model):
    decoder, head = find_decoder(model), model.get_output_embeddings()
    return len(decoder._forward_pre_hooks), len(decoder._forward_hooks), len(head._forward_hooks)


def test_hooks_are_attached_once_and_come_off():
    model = tiny_model()
    before = set(vars(find_decoder(model)))
    for _ in range(3):
        make_cache(model, "sirllm")
    assert hooks_of(model) == (1, 1, 1)
    for _ in range(2):
        detach(model)
        assert hooks_of(model) == (0, 0, 0)
    assert set(vars(find_decoder(model))) == before


def test_hooks_do_nothing_for_other_caches():
    plain, hooked = tiny_model(), tiny_model()
    attach(hooked)
    expected, actual = (generate(model, output_logits=True) for model in (plain, hooked))
    assert isinstance(actual.past_key_values, DynamicCache)
    assert all(torch.equal(a, b) for a, b in zip(expected.logits, actual.logits, strict=True))
    assert torch.equal(plain(**PROMPT).logits, hooked(**PROMPT).logits)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_hooks_of_its_own(twin):
    model = tiny_model()
    first = make_cache(model, "sirllm", **OPTIONS)
    generate(model, past_key_values=first)
    other = twin(model)
    assert hooks_of(other) == (1, 1, 1)
    second = make_cache(other, "sirllm", **OPTIONS)
    generate(other, past_key_values=second)
    assert torch.equal(first.entropy, second.entropy)
    detach(other)
    assert hooks_of(other) == (0, 0, 0)
    assert hooks_of(model) == (1, 1, 1)


def test_the_decoder_can_be_called_with_positional_arguments():
    model = tiny_model()
    cache = make_cache(model, "sirllm")
    with torch.no_grad():
        model.model(PROMPT["input_ids"], PROMPT["attention_mask"], None, cache)
    assert cache.real.sum().item() == 13


@pytest.mark.parametrize("return_dict", [True, False])
def test_any_kind_of_output_will_do(return_dict):
    model = tiny_model()
    cache = make_cache(model, "sirllm")
    with torch.no_grad():
        model(**PROMPT, past_key_values=cache, return_dict=return_dict)
    assert cache.logits.shape == (2, 128)


FLAGS = [
    "sirllm",
    {"type": "sirllm", **OPTIONS},
    SirLLMConfig(**OPTIONS),
    HfExtConfig(kv_cache=[SirLLMConfig(**OPTIONS)]),
]


@pytest.mark.parametrize("flag", FLAGS, ids=["name", "dict", "config", "list"])
def test_the_flag_makes_generate_use_the_cache_also_after_saving(flag, tmp_path):
    flags = flag if isinstance(flag, HfExtConfig) else {"kv_cache": flag}
    tiny_model().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", hf_ext=flags)
    model.save_pretrained(tmp_path / "flagged")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "flagged")):
        cache = generate(loaded).past_key_values
        assert isinstance(cache, SirLLMCache)
        assert cache.config == make_cache(loaded).config
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "flagged", hf_ext=None)
    assert isinstance(generate(free).past_key_values, DynamicCache)


def test_a_name_in_generate_makes_the_cache():
    model = tiny_model()
    cache = generate(model, cache_implementation="sirllm", cache_config=OPTIONS).past_key_values
    assert cache.config == SirLLMConfig(**OPTIONS)
    assert cache.stored <= cache.capacity < cache.get_seq_length()
    with pytest.raises(ValueError, match="no option 'memory'"):
        generate(model, cache_implementation="sirllm", cache_config={"memory": 3})


def test_the_flag_gives_what_the_cache_itself_gives():
    model = tiny_model()
    flagged = AutoModelForCausalLM.from_config(tiny_config(hf_ext={"kv_cache": {"type": "sirllm", **OPTIONS}}))
    flagged.load_state_dict(model.state_dict())
    given = generate(model, past_key_values=make_cache(model, "sirllm", **OPTIONS))
    assert torch.equal(given.sequences, generate(flagged.eval()).sequences)


def test_a_flag_the_model_cannot_have_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="none of its 4 layers has full attention"):
        AutoModelForCausalLM.from_config(tiny_config("mistral", hf_ext={"kv_cache": "sirllm"}))
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(ValueError, match="encoder-decoder"):
        AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **t5, hf_ext={"kv_cache": "sirllm"}))


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (None, {}, "carries no kv_cache flag"),
        ("sirlm", {}, "is no kind of cache; allowed: .*sirllm"),
        (SirLLMConfig(), {"decay": 0.5}, "options go with a name or a dict"),
        ({"decay": 0.5}, {}, "a dict with a 'type'"),
        (["sirllm", "sink_window"], {}, "cannot be wrapped around another, got sink_window"),
        (3, {}, "must be a cache config"),
    ],
)
def test_wrong_calls_are_sentences(config, options, words):
    with pytest.raises(ValueError, match=words):
        make_cache(tiny_model(), config, **options)


def test_an_adapter_around_the_model_changes_nothing():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    plain = generate(model, past_key_values=make_cache(model, "sirllm", **OPTIONS)).sequences
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    cache = make_cache(wrapped, "sirllm", **OPTIONS)
    assert torch.equal(plain, generate(wrapped, past_key_values=cache).sequences)


def test_a_compiled_model_gives_the_same(recwarn):
    model = tiny_model()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    plain, traced = (make_cache(model, "sirllm", **OPTIONS) for _ in range(2))
    with torch.no_grad():
        for piece in torch.randint(3, 128, (1, 30)).split([9, 1, 1, 1, 1, 1, 1, 5, 5, 5], dim=1):
            expected = model(input_ids=piece, past_key_values=plain).logits
            assert torch.equal(expected, compiled(input_ids=piece, past_key_values=traced).logits)
    assert torch.equal(plain.entropy, traced.entropy)
    assert not [warning for warning in recwarn if "Dynamo" in str(warning.message)]
