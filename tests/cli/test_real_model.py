"""The commands on the embedded real model: an answer a person would accept, a perplexity of the right size."""

import json
from pydoc_data.topics import topics

import pytest

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("default_folder")]


def test_info(hf_ext_command):
    values = json.loads(hf_ext_command("info", "--json")[1])
    assert (values["layers"], values["heads"], values["kv_heads"], values["context"]) == (30, 9, 3, 8192)
    assert values["parameters"] == 134_515_008
    assert values["kv_cache"]["bytes_per_token"]["float32"] == 2 * 30 * 3 * 64 * 4


def test_chat_answers_from_what_was_said(hf_ext_command, monkeypatch):
    typed = iter(["What is the capital of France?", "And of Italy?"])

    def read(prompt=""):
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    status, out, _ = hf_ext_command("chat", "--max-new-tokens", 12, "--temperature", 0)
    assert status == 0
    assert "Paris" in out and "Rome" in out  # the second question names no capital


def test_ppl_of_english_prose(hf_ext_command, tmp_path):
    (tmp_path / "text").write_text(topics["in"] + topics["floating"])
    values = json.loads(hf_ext_command("ppl", "--text", tmp_path / "text", "--window", 256, "--json")[1])
    assert 5 < values["perplexity"] < 40
