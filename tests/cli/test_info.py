"""``hf-ext info`` end to end, on every family, from configs alone."""

import json

import pytest
import torch
from transformers import BertConfig, T5Config

from hf_ext.cli.info import describe
from hf_ext.testing import FAMILIES, tiny_config, tiny_model


def test_table_and_json(hf_ext_command, folder):
    status, out, _ = hf_ext_command("info", folder)
    assert status == 0
    assert "LlamaForCausalLM (llama)" in out and "4 x full_attention" in out and "2048 tokens" in out
    values = json.loads(hf_ext_command("info", folder, "--json")[1])
    assert (values["layers"], values["heads"], values["kv_heads"], values["head_dim"]) == (4, 4, 2, 16)
    assert values["rope"] == {"type": "default", "theta": 10000.0}
    assert values["flags"] == {} and values["features"]["cla"] is values["features"]["ReALLM weights"] is None


def test_needs_no_weights(hf_ext_command, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert hf_ext_command("info", tmp_path)[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_the_real_model(family):
    model = tiny_model(family)
    described = describe(model.config)
    assert described["parameters"] == model.num_parameters()
    with torch.no_grad():
        layers = model(torch.arange(3, 8)[None], use_cache=True).past_key_values.layers
    growing = [layer for layer in layers if not layer.is_sliding]
    assert described["kv_cache"]["growing"] == len(growing)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in growing)
    assert described["kv_cache"]["bytes_per_token"]["float32"] * 5 == stored
    assert described["kv_cache"]["bytes_per_token"]["bfloat16"] * 10 == stored


def test_flags_of_a_checkpoint(hf_ext_command, tmp_path):
    flags = {"cla": {"sharing_factor": 2}, "kv_cache": "sirllm"}
    tiny_model(hf_ext=flags).save_pretrained(tmp_path)
    values = json.loads(hf_ext_command("info", tmp_path, "--json")[1])
    assert values["flags"]["cla"]["sharing_factor"] == 2 and values["flags"]["kv_cache"][0]["type"] == "sirllm"
    assert values["kv_cache"]["growing"] == 2  # two of four layers own keys and values
    assert '"sharing_factor": 2' in hf_ext_command("info", tmp_path)[1]


def test_what_cannot_be_applied_says_why():
    features = describe(tiny_config("mistral"))["features"]
    assert features["kv_cache=sirllm"].startswith("the sirllm cache has nothing to do for 'mistral'")
    features = describe(tiny_config("gpt2", quantization_config={"quant_method": "gptq", "bits": 4}))["features"]
    assert "does not support" in features["cla"] and "quantised already" in features["ReALLM weights"]


def test_not_a_causal_language_model():
    with pytest.raises(ValueError, match="'t5' is not one"):
        describe(T5Config())
    assert describe(BertConfig(num_hidden_layers=1))["kv_cache"] is None
