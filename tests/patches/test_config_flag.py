"""The loading seam: flags through every way of making a config or a model, saved, reloaded, dropped, refused."""

import copy
import json
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import hf_ext
from hf_ext import HfExtConfig, SirLLMConfig
from hf_ext.testing import tiny_config, tiny_model

FLAGS = HfExtConfig(kv_cache=SirLLMConfig(memory_size=60))


@pytest.fixture
def folder(tmp_path):
    """A saved model without flags."""
    tiny_model().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def saved_json(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("flags", [FLAGS, FLAGS.to_dict()], ids=["config", "dict"])
def test_from_pretrained_takes_and_keeps_flags(cls, flags, folder, tmp_path):
    model = cls.from_pretrained(folder, hf_ext=flags)
    assert model.config.hf_ext == FLAGS
    model.save_pretrained(tmp_path / "flagged")
    assert saved_json(tmp_path / "flagged")["fusion_config"] == {"hf_ext": FLAGS.to_dict()}
    assert cls.from_pretrained(tmp_path / "flagged").config.hf_ext == FLAGS


@pytest.mark.parametrize("cls", [AutoConfig, LlamaConfig])
def test_config_classes_take_flags(cls, folder):
    assert cls.from_pretrained(folder, hf_ext=FLAGS).hf_ext == FLAGS


def test_direct_construction_and_from_config_take_flags():
    config = LlamaConfig(**{**tiny_config().to_dict(), "hf_ext": FLAGS})
    assert config.hf_ext == FLAGS
    assert LlamaForCausalLM(config).config.hf_ext == FLAGS
    assert AutoModelForCausalLM.from_config(config).config.hf_ext == FLAGS


def test_from_config_takes_flags_as_an_argument_and_leaves_the_config_alone():
    config = tiny_config()
    assert AutoModelForCausalLM.from_config(config, hf_ext=FLAGS).config.hf_ext == FLAGS
    assert config.hf_ext is None
    assert AutoModelForCausalLM.from_config(tiny_config(hf_ext=FLAGS), hf_ext=None).config.hf_ext is None
    with pytest.raises(ValueError, match="HfExtConfig has no option 'kvcache'"):
        AutoModelForCausalLM.from_config(config, hf_ext={"kvcache": "sirllm"})


def test_none_drops_flags_on_load(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, hf_ext=FLAGS).save_pretrained(tmp_path / "flagged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "flagged", hf_ext=None)
    assert model.config.hf_ext is None
    model.save_pretrained(tmp_path / "dropped")
    assert "fusion_config" not in saved_json(tmp_path / "dropped")


def test_other_flags_replace_saved_ones(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, hf_ext=FLAGS).save_pretrained(tmp_path / "flagged")
    other = {"kv_cache": {"type": "sirllm", "memory_size": 30}}
    assert AutoConfig.from_pretrained(tmp_path / "flagged", hf_ext=other).hf_ext == HfExtConfig(**other)


def test_a_config_without_flags_says_nothing_of_them(folder):
    assert "fusion_config" not in saved_json(folder)
    config = AutoConfig.from_pretrained(folder)
    assert config.hf_ext is None and "hf_ext" not in config.to_json_string()


def test_deepcopy_keeps_flags_and_shares_nothing():
    config = tiny_config(hf_ext=FLAGS)
    other = copy.deepcopy(config)
    other.hf_ext = None
    assert config.hf_ext == FLAGS and other.hf_ext is None


def test_an_entry_of_the_hosts_own_beside_ours_survives():
    config = tiny_config(fusion_config={"patch_embeddings": False})
    config.hf_ext = FLAGS
    config.hf_ext = None
    assert config.fusion_config == {"patch_embeddings": False}


def test_flags_are_found_on_composite_configs():
    from transformers import Gemma3Config

    from hf_ext.patches.config_flag import find_flags

    config = Gemma3Config(text_config=tiny_config("gemma3_text").to_dict(), hf_ext=FLAGS)
    assert find_flags(config) == FLAGS
    inner = Gemma3Config(text_config={**tiny_config("gemma3_text").to_dict(), "hf_ext": FLAGS})
    assert find_flags(inner) == FLAGS


def test_a_misspelt_flag_is_refused_before_loading(folder):
    with pytest.raises(ValueError, match="HfExtConfig has no option 'kvcache'; allowed: cla, kv_cache"):
        AutoModelForCausalLM.from_pretrained(folder, hf_ext={"kvcache": "sirllm"})


def test_a_process_without_hf_ext_fails_loudly(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, hf_ext=FLAGS).save_pretrained(tmp_path / "flagged")
    for cls in ("AutoModelForCausalLM", "LlamaForCausalLM"):
        code = f"import transformers; transformers.{cls}.from_pretrained({str(tmp_path / 'flagged')!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0 and "Unknown fusion type: hf_ext" in done.stderr


def test_generation_config_takes_our_names_only():
    assert GenerationConfig(cache_implementation="sirllm").cache_implementation == "sirllm"
    with pytest.raises(ValueError, match="cache_implementation"):
        GenerationConfig(cache_implementation="sirlm").validate()


def test_uninstall_puts_every_host_object_back_and_install_again_works():
    code = """
import importlib
import hf_ext
from hf_ext.patches.install import SEAMS
hf_ext.uninstall()
hosts = [importlib.import_module(name) for name, _ in SEAMS]

def state():
    seen = {}
    for host in hosts:
        for name, value in vars(host).items():
            seen[host.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == host.__name__:
                seen.update({(host.__name__, name, key): id(item) for key, item in vars(value).items()})
    from transformers.fusion_mapping import _FUSION_REGISTRY
    return seen, dict(_FUSION_REGISTRY)

before = state()
for _ in range(2):
    hf_ext.install()
    hf_ext.install()
    assert state() != before
    hf_ext.uninstall()
    hf_ext.uninstall()
    changed = [key for key in state()[0] if state()[0][key] != before[0].get(key)]
    assert state() == before, changed
print("restored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "restored", done.stderr


def test_importing_twice_opens_each_seam_once():
    from hf_ext.patches import install

    opened = dict(install._open)
    hf_ext.install()
    assert install._open == opened
    assert set(opened) >= {"hf_ext.patches.config_flag:open_flag", "hf_ext.patches.post_init:apply_flags_after_init"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.fusion_mapping", "_FUSION_REGISTRY"),
        ("transformers.fusion_mapping", "ModuleFusionSpec"),
        ("transformers.configuration_utils", "PreTrainedConfig"),
        ("transformers.modeling_utils", "PreTrainedModel"),
        ("transformers.modeling_utils", "PreTrainedModel._from_config"),
        ("transformers.generation.utils", "GenerationMixin._prepare_cache_for_generation"),
        ("transformers.generation.configuration_utils", "ALL_CACHE_IMPLEMENTATIONS"),
        ("transformers.generation.utils", "GenerationMixin"),
    ],
)
def test_private_names_of_transformers_5_22_and_5_23_that_the_seam_needs(module, name):
    import importlib

    owner = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(owner, part), f"{module} has no {name}"
        owner = getattr(owner, part)
