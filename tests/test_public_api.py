"""Public names resolve, and importing hf_ext loads almost nothing."""

import subprocess
import sys

import hf_ext

HEAVY = ("torch", "transformers", "peft", "trl", "triton", "accelerate", "datasets", "bitsandbytes", "numpy")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_every_public_name_resolves():
    assert len(hf_ext.__all__) > 3
    for name in hf_ext.__all__:
        assert getattr(hf_ext, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert not hasattr(hf_ext, "NoSuchName")


def test_import_is_light():
    code = f"import sys, hf_ext; print([m for m in {HEAVY!r} if m in sys.modules], len(sys.modules))"
    loaded, count = run(code).rsplit(" ", 1)
    baseline = int(run("import sys; print(len(sys.modules))"))
    assert loaded == "[]"
    assert int(count) - baseline < 150  # `import transformers` alone loads several hundred


def test_import_changes_no_unflagged_model():
    code = """
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
torch.manual_seed(0)
before = LlamaForCausalLM(config)
import hf_ext
torch.manual_seed(0)
after = LlamaForCausalLM(config)
assert "hf_ext" not in config.to_json_string() and config.hf_ext is None
assert list(before.state_dict()) == list(after.state_dict())
assert [type(m) for m in before.modules()] == [type(m) for m in after.modules()]
assert before._forward_hooks == after._forward_hooks and not after.model._forward_pre_hooks
ids = torch.arange(5)[None]
assert torch.equal(before(ids).logits, after(ids).logits)
print("same")
"""
    assert run(code).strip() == "same"
