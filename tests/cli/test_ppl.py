"""``hf-ext ppl`` end to end."""

import io
import json
import math
import sys

import pytest

TEXT = "The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def measure(hf_ext_command, *arguments):
    status, out, _ = hf_ext_command("ppl", *arguments, "--json")
    assert status == 0
    return json.loads(out)


def test_prints_perplexity_and_what_was_scored(hf_ext_command, folder, text):
    status, out, _ = hf_ext_command("ppl", folder, "--text", text, "--window", 100)
    values = measure(hf_ext_command, folder, "--text", text, "--window", 100)
    assert status == 0
    assert f"perplexity {values['perplexity']:.4f}" in out
    assert "356 tokens scored in 4 windows of 100, stride 100" in out
    assert values["perplexity"] == pytest.approx(math.exp(values["nats"]))
    assert (values["tokens"], values["windows"], values["window"]) == (len(TEXT) - 4, 4, 100)


def test_stride_windows_and_dtype(hf_ext_command, folder, text):
    values = measure(hf_ext_command, folder, "--text", text, "--window", 100, "--stride", 50, "--windows", 2)
    assert (values["tokens"], values["stride"]) == (149, 50)
    half = measure(hf_ext_command, folder, "--text", text, "--dtype", "bfloat16")
    assert half["nats"] == pytest.approx(measure(hf_ext_command, folder, "--text", text)["nats"], rel=1e-2)


def test_a_cache_that_forgets_nothing_changes_nothing_and_a_small_one_does(hf_ext_command, folder, text):
    whole = measure(hf_ext_command, folder, "--text", text)
    large = measure(hf_ext_command, folder, "--text", text, "--cache", "sirllm", "--chunk", 16)
    small = "sink_window:sink_size=2,window_size=20,block_size=4"
    forgetful = measure(hf_ext_command, folder, "--text", text, "--cache", small, "--chunk", 4)
    assert large["nats"] == pytest.approx(whole["nats"], rel=1e-6)
    assert forgetful["nats"] != pytest.approx(whole["nats"], rel=1e-5)


def test_standard_input(hf_ext_command, folder, text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert measure(hf_ext_command, folder, "--text", "-")["tokens"] == len(TEXT) - 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "perplexity needs a text of at least 2 tokens, got 0"),
        (b"a", [], "perplexity needs a text of at least 2 tokens, got 1"),
        (b"a\xff", [], "is not utf-8 text: byte 1 is 0xff"),
        (b"abc", ["--window", "1"], "window must be at least 2 tokens, got 1"),
        (b"abc" * 900, ["--window", "2500"], "at most the model's context of 2048 tokens, got 2500"),
        (b"abc", ["--cache", "sirlm"], "'sirlm' is no kind of cache"),
        (b"abc", ["--device", "nowhere"], "cannot be loaded on device 'nowhere'"),
        (b"abc", ["--device", "cuda:99"], "cannot be loaded on device 'cuda:99'"),
    ],
)
def test_mistakes_are_one_sentence(hf_ext_command, folder, tmp_path, content, options, message):
    (tmp_path / "text").write_bytes(content)
    status, out, err = hf_ext_command("ppl", folder, "--text", tmp_path / "text", *options)
    assert (status, out) == (1, "")
    assert message in err and err.count("\n") == 1
