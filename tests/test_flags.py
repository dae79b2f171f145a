"""What ``hf_ext=`` accepts, and the sentences for what it does not."""

import json

import pytest

from hf_ext import CLAConfig, HfExtConfig, SirLLMConfig
from hf_ext.flags import parse_flags


def test_dicts_and_configs_mean_the_same():
    by_dict = parse_flags({"cla": {"sharing_factor": 2}, "kv_cache": {"type": "sirllm", "memory_size": 60}})
    assert by_dict == HfExtConfig(cla=CLAConfig(sharing_factor=2), kv_cache=SirLLMConfig(memory_size=60))


def test_a_cache_may_be_a_name_or_a_list():
    one = (SirLLMConfig(),)
    assert HfExtConfig(kv_cache="sirllm").kv_cache == one
    assert HfExtConfig(kv_cache=["sirllm"]).kv_cache == one
    assert HfExtConfig(kv_cache=SirLLMConfig()).kv_cache == one


@pytest.mark.parametrize("flags", [HfExtConfig(), HfExtConfig(cla=CLAConfig()), HfExtConfig(kv_cache=SirLLMConfig())])
def test_flags_survive_json(flags):
    assert parse_flags(json.loads(json.dumps(flags.to_dict()))) == flags


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"clas": {}}, "HfExtConfig has no option 'clas'; allowed: cla, kv_cache"),
        ({"cla": {"factor": 2}}, "CLAConfig has no option 'factor'; allowed: sharing_factor"),
        ({"cla": 2}, "cla must be a CLAConfig or a dict of its options, got 2"),
        ({"kv_cache": "sirlm"}, "'sirlm' is no kind of cache; allowed: .*sirllm"),
        ({"kv_cache": {"memory_size": 3}}, "a dict with a 'type'"),
        ({"kv_cache": {"type": "sirllm", "memory": 3}}, "SirLLMConfig has no option 'memory'; allowed: "),
        ({"kv_cache": []}, "at least one cache"),
        ("cla", "hf_ext must be an HfExtConfig, a dict of flags or None, got 'cla'"),
    ],
)
def test_mistakes_are_sentences(value, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(value)
