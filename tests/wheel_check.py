"""Run by CI where only the wheel is installed: all imports, kernels compile, and a flagged model generates."""

import importlib
import pkgutil
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_ext
from hf_ext.testing import tiny_model

OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "gguf", "matplotlib", "peft", "rich", "scipy", "sklearn", "trl"}

for module in pkgutil.walk_packages(hf_ext.__path__, "hf_ext."):
    if module.name == "hf_ext.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert (error.name or "").split(".")[0] in OPTIONAL, f"{module.name}: {error}"

for folder in ("patches", "trainers", "kernels"):
    module = importlib.import_module(f"hf_ext.{folder}")
    assert all("site-packages" in path for path in module.__path__), module.__path__

kernels = importlib.import_module("hf_ext.kernels.native")
sources = [path for suffix in kernels.LANGUAGES for path in Path(kernels.__file__).parent.glob(f"*{suffix}")]
assert sources
if shutil.which("cc") and shutil.which("c++"):
    for source in sources:  # headers have to be in the wheel too
        assert kernels.load_native(source.stem) is not None, source

with tempfile.TemporaryDirectory() as folder:
    tiny_model(hf_ext={"kv_cache": "sirllm"}).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
print("The wheel works:", hf_ext.__version__, ids.tolist())
