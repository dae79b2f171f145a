import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_ext import CLAConfig, HfExtConfig, uninstall
from hf_ext.cla.shared import shared_layers
from hf_ext.testing import FAMILIES, ragged_batch, tiny_model

ALL = pytest.mark.parametrize("family", FAMILIES)
CLA2 = {"cla": {"sharing_factor": 2}}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)


def assert_clean(info):
    assert not {kind: keys for kind, keys in info.items() if keys}


@ALL
def test_round_trip(family, tmp_path):
    model, batch = tiny_model(family, hf_ext=CLA2), ragged_batch([9, 5])
    model.save_pretrained(tmp_path)
    again, info = load(tmp_path)
    assert_clean(info)
    assert again.config.hf_ext == HfExtConfig(cla=CLAConfig(sharing_factor=2))
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    eager, _ = load(
        tmp_path, attn_implementation="eager"
    )  # what is asked for stays, and the layers share all the same
    assert eager.config._attn_implementation == "eager" and shared_layers(eager) == shared_layers(model)
    torch.testing.assert_close(model(**batch).logits[0], eager(**batch).logits[0], rtol=0, atol=1e-4)


@ALL
def test_dense_to_shared_is_silent_and_saves_its_own_names(family, tmp_path, caplog):
    dense, batch = tiny_model(family), ragged_batch([9, 5])
    dense.save_pretrained(tmp_path)
    logging.enable_propagation()
    shared, info = load(tmp_path, hf_ext=CLA2)
    assert_clean(info)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    assert torch.equal(shared(**batch).logits, tiny_model(family, hf_ext=CLA2)(**batch).logits)
    shared.save_pretrained(tmp_path / "shared")
    again, info = load(tmp_path / "shared")
    assert_clean(info)
    assert torch.equal(shared(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_separate_norms_start_from_the_queries_norm(family, tmp_path):
    dense, batch = tiny_model(family), ragged_batch([9, 5])
    for layer in dense.model.layers:
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    dense.save_pretrained(tmp_path)
    options = {"cla": {"sharing_factor": 2, "separate_kv_norm": True}}
    own, info = load(tmp_path, hf_ext=options)
    assert_clean(info)
    plain, _ = load(tmp_path, hf_ext=CLA2)
    torch.testing.assert_close(own(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-5)
    own.save_pretrained(tmp_path / "own")
    again, info = load(tmp_path / "own")
    assert_clean(info)
    assert torch.equal(own(**batch).logits, again(**batch).logits)


@ALL
def test_shared_to_dense_is_refused(family, tmp_path):
    tiny_model(family, hf_ext={"cla": {"kv_source_layers": [0, 1, 0, 1]}}).save_pretrained(tmp_path)
    saved = (tmp_path / "model.safetensors").read_bytes()
    for flag in (None, {"cla": {"sharing_factor": 1}}, {"cla": {"kv_source_layers": [0, 1, 0, 3]}}):
        with pytest.raises(
            ValueError, match=r"has no keys and values for layers \[(2, )?3\]: it was saved with Cross-"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path, hf_ext=flag)
    assert (tmp_path / "model.safetensors").read_bytes() == saved


def test_shared_to_dense_is_refused_when_the_config_is_given(tmp_path):
    tiny_model("llama", hf_ext=CLA2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["fusion_config"]
    with pytest.raises(ValueError, match=r"no keys and values for layers \[1, 3\]"):
        LlamaForCausalLM.from_pretrained(tmp_path, config=LlamaConfig(**saved))


def test_more_sharing_than_saved_is_fine(tmp_path):
    tiny_model("llama", hf_ext={"cla": {"kv_source_layers": [0, 0, 2, 3]}}).save_pretrained(tmp_path)
    model, info = load(tmp_path, hf_ext=CLA2)
    assert_clean(info)
    assert shared_layers(model) == {1: 0, 3: 2}


def test_sharded_and_half_precision(tmp_path):
    model, batch = tiny_model("phi3", hf_ext=CLA2), ragged_batch([9, 5])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load(tmp_path)[0](**batch).logits, model(**batch).logits)
    half, info = load(tmp_path, dtype=torch.bfloat16)
    assert_clean(info)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_untied_embeddings_and_base_model(tmp_path):
    from transformers import AutoModel

    model = tiny_model("llama", hf_ext=CLA2, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    base, batch = AutoModel.from_pretrained(tmp_path), ragged_batch([9, 5])
    assert shared_layers(base) == {1: 0, 3: 2}
    assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    again, info = load(tmp_path)
    assert_clean(info)
    assert again.lm_head.weight is again.model.embed_tokens.weight


SCRIPT = """
import sys, torch
{prelude}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[1] + "/logits.pt")
"""


def in_a_fresh_process(folder, prelude):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(prelude=prelude), str(folder)], capture_output=True, text=True, cwd=folder
    )


def test_a_fresh_process_gives_the_same_bits_and_one_without_hf_ext_refuses(tmp_path):
    model = tiny_model("llama", hf_ext=CLA2)
    model.save_pretrained(tmp_path)
    done = in_a_fresh_process(tmp_path, "import hf_ext; torch.set_num_threads(1)")
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(3, 20)[None]).logits)
    torch.set_num_threads(threads)
    refused = in_a_fresh_process(tmp_path, "")
    assert refused.returncode != 0 and "Unknown fusion type: hf_ext" in refused.stderr


def test_uninstall_gives_the_host_its_loader_back():
    import transformers.modeling_utils as host

    import hf_ext

    uninstall()
    try:
        assert not hasattr(host.PreTrainedModel, "kv_bytes_per_token")
        assert host.get_model_conversion_mapping.__module__ == "transformers.conversion_mapping"
        assert not hasattr(host.get_model_conversion_mapping, "__wrapped__")
        assert not hasattr(LlamaConfig(), "kv_sharing_modes")
    finally:
        hf_ext.install()
    assert hasattr(host.PreTrainedModel, "kv_bytes_per_token")
