"""``hf-ext buckets``: documents in, buckets, statistics and pictures out."""

import json

import datasets
import pytest

from hf_ext.cli import main
from hf_ext.cli.buckets import _Tokenise, eos_token_id, load_documents


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"input_ids": list(range(3, 3 + n))}) + "\n" for n in (40, 9, 64, 3) * 4))
    return path


def call(*words):
    return main(["buckets", *map(str, words)])


def test_writes_buckets_statistics_and_pictures(documents, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--out", out, "--min-length", 8, "--max-length", 32, "--eos", 2, "--tokens-per-step", 64, "--cycles", 2)
    assert call(documents, *options, "--plot", "--shard-documents", 5) == 0
    printed = capsys.readouterr().out
    assert "16 documents of 480 tokens; dropped 32" in printed  # tails: 41 -> 1, 10 -> 2, 65 -> 1, 4 -> 4, times 4
    assert "an epoch has " in printed
    rows = datasets.load_from_disk(str(out))
    assert sorted(set(map(len, rows["input_ids"]))) == [8, 32]
    assert {path.name for path in out.glob("*.png")} == {"buckets.png", "schedule.png"}
    assert call(documents, *options, "--json", "--shard-documents", 5) == 0  # again: nothing to do, the same numbers
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "buckets.json").read_text())["statistics"]
    assert found["total_tokens"] == 480 - 32


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


def test_text_is_tokenised(tokenizer, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a b a b\na b a")
    assert call(text, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--min-length", 8) == 0
    assert datasets.load_from_disk(str(tmp_path / "out"))["input_ids"][0] == [1, 2, 1, 2, 1, 2, 1, 0]
    assert call(text, "--out", tmp_path / "new") == 1
    assert "no column input_ids: name a --tokenizer" in capsys.readouterr().err
    assert call(text, "--out", tmp_path / "new", "--tokenizer", tokenizer, "--text-column", "x") == 1
    assert "no column 'x'; it has text" in capsys.readouterr().err


def test_an_interrupted_run_keeps_the_shards_that_are_tokenised(tokenizer, tmp_path, monkeypatch):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "a b " * n}) + "\n" for n in range(1, 13)))
    words = (texts, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--min-length", 2, "--shard-documents", 5)
    tokenise, seen = _Tokenise.__call__, []

    def interrupted(self, batch):
        if len(seen) == 10 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        seen.extend(batch["text"])
        return tokenise(self, batch)

    monkeypatch.setattr(_Tokenise, "__call__", interrupted)
    assert call(*words) == 130
    (tmp_path / "again").touch()
    assert call(*words) == 0
    assert len(seen) == 12 == len(set(seen))  # no document twice
    assert json.loads((tmp_path / "out" / "buckets.json").read_text())["documents"] == 12


def test_folders_of_datasets_and_their_splits(tmp_path):
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "many"))
    assert load_documents(str(tmp_path / "one"), "train")["input_ids"][:] == [[1, 2]]
    assert load_documents(str(tmp_path / "many"), "test")["input_ids"][:] == [[1, 2]]
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        load_documents(str(tmp_path / "many"), "train")


def test_bad_input_in_words(documents, tmp_path, capsys):
    assert call(documents, "--out", tmp_path / "out", "--min-length", 12) == 1
    assert "min_length must be a power of two, got 12" in capsys.readouterr().err
    strange = tmp_path / "documents.xyz"
    strange.write_text("")
    assert call(strange, "--out", tmp_path / "out") == 1
    assert "must end in one of .json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--eos must be a token id, 'none' or 'auto', got 'x'"):
        eos_token_id("x", None)
    assert eos_token_id("none", None) is None and eos_token_id("auto", None) is None and eos_token_id("7", None) == 7
