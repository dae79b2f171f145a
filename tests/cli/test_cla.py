import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ext.cla.shared import shared_layers
from hf_ext.cli import main
from hf_ext.testing import tiny_model


@pytest.fixture
def folder(tmp_path):
    """A tiny model folder with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(i): i for i in range(128)}
    raw = Tokenizer(models.WordLevel(letters, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tiny_model("llama", num_hidden_layers=5).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="\0").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return tmp_path


def cla(folder, action, *words):
    return main(["cla", action, str(folder / "model"), *map(str, words)])


def test_info(folder, capsys):
    assert cla(folder, "info", "--pattern", "uniform", "--factor", 5) == 0
    said = capsys.readouterr().out
    assert "map: [0, 0, 0, 0, 0]" in said and "1.2 KiB -> 256 B" in said


def test_rank_resumes_and_convert_uses_it(folder, capsys):
    words = ("--text", folder / "text.txt", "--tokens", 200, "--window", 100, "--output", folder / "ranking.json")
    assert cla(folder, "rank", *words) == 0
    first = json.loads((folder / "ranking.json").read_text())
    assert sorted(loss["layer"] for loss in first["losses"]) == [1, 2, 3, 4]
    said = capsys.readouterr().out
    half = {**first, "losses": [{**loss, "nats": 7.0} for loss in first["losses"][:2]]}
    (folder / "ranking.json").write_text(json.dumps(half))
    assert cla(folder, "rank", *words) == 0
    assert capsys.readouterr().out.count("+7.0000") == 2 and "nats a token" in said
    assert cla(folder, "rank", *words[:2], "--tokens", 100, *words[4:]) == 1
    assert "was measured with tokens=200, not 100; name a new file" in capsys.readouterr().err

    out = folder / "converted"
    options = ("--ranking", folder / "ranking.json", "--keep", 0.8, "--output", out)
    assert cla(folder, "convert", *options) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(shared_layers(model)) == 1
    assert main(["cla", "info", str(out)]) == 0 and "shares already" in capsys.readouterr().out


def test_convert_searches_the_map_and_goes_on_when_interrupted(folder, capsys, monkeypatch):
    from hf_ext.cli import cla as command
    from hf_ext.patches import cla_search

    text, ranking, out = folder / "text.txt", folder / "ranking.json", folder / "out"
    words = ("--text", text, "--tokens", 200, "--window", 100, "--reach", 2, "--output", ranking)
    assert cla(folder, "rank", *words) == 0

    def fail(*args):
        raise OSError("no space left")

    words = ("--ranking", ranking, "--keep", 0.6, "--text", text, "--search-tokens", 200, "--output", out)
    with monkeypatch.context() as broken:
        broken.setattr(command, "save_atomically", fail)
        assert cla(folder, "convert", *words) == 1
    measured = json.loads((folder / "out.work" / "search.json").read_text())
    assert len(measured) >= 2 and not out.exists()
    monkeypatch.setattr(cla_search._Search, "measure", fail)  # nothing is measured again
    assert cla(folder, "convert", *words) == 0
    shares = shared_layers(AutoModelForCausalLM.from_pretrained(out))
    sources = [shares.get(layer, layer) for layer in range(5)]
    assert len(shares) == 2 and sources in [one for one, _ in measured]
    assert not (folder / "out.work").exists()


def test_convert_heals_and_writes_at_once(folder, capsys):
    out = folder / "out"
    words = ("--text", folder / "text.txt", "--layer-tokens", 1024, "--heal-tokens", 2048, "--output", out)
    assert cla(folder, "convert", *words) == 0
    assert not (folder / "out.work").exists() and not (folder / "out.part").exists()
    healed = AutoModelForCausalLM.from_pretrained(out)
    assert shared_layers(healed) == {3: 2}  # keep_ends over five layers: 0, 1, (2, 3), 4
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert cla(folder, "convert", *words) == 1
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_another_conversions_checkpoints_are_not_taken(folder, capsys):
    work = folder / "out.work"
    work.mkdir()
    (work / "settings.json").write_text("{}")
    words = ("--text", folder / "text.txt", "--heal-tokens", 2048, "--output", folder / "out")
    assert cla(folder, "convert", *words) == 1
    assert "holds an unfinished conversion with other options" in capsys.readouterr().err
    assert (work / "settings.json").read_text() == "{}" and not (folder / "out").exists()


def test_a_failed_conversion_leaves_nothing(folder, capsys, monkeypatch):
    assert cla(folder, "convert", "--map", "[0,0,1,3,4]", "--output", folder / "out") == 1
    assert "layer 1 reads those of layer 0 and has none of its own" in capsys.readouterr().err

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    assert cla(folder, "convert", "--output", folder / "out") == 1
    assert "no space left" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"model", "text.txt"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--map", "0,0"], "--map must be a list"),
        (["--map", "[0]", "--ranking", "x"], "either --map or --ranking"),
        (["--ranking", "missing.json"], "missing.json"),
        (["--heal-tokens", "9"], "--heal-tokens needs --text FILE"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, words, sentence):
    assert cla(folder, "convert", *words, "--output", folder / "out") == 1
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
    assert torch.is_grad_enabled()
