"""``hf-ext demo`` end to end on a tiny model and a shorter script, and on the real model the claim it makes."""

import json
from collections import Counter

import pytest
import torch

from hf_ext.cli import demo_recall
from hf_ext.cli import demo_script as script
from hf_ext.cli.demo_recall import Recall, exchanges, recall, steps
from hf_ext.cli.turns import TurnFormat
from hf_ext.default_model import load_model


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(script, "TALK", script.TALK[:2])
    monkeypatch.setattr(script, "WORDS", dict(list(script.WORDS.items())[:2]))


def test_prints_writes_and_draws(hf_ext_command, folder, short, tmp_path):
    picture, numbers = tmp_path / "new" / "picture.png", tmp_path / "numbers.json"
    arguments = ("--budget", 100, "--recent", 30, "--out", picture, "--json", numbers)
    status, out, _ = hf_ext_command("demo", folder, *arguments)
    assert status == 0
    assert "a memory of 100" in out and "right of 8" in out and f"Picture: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    values = json.loads(numbers.read_text())
    assert list(values) == ["full cache", "SirLLM", "sink window"]
    full, sirllm, sinks = values.values()
    assert full["seen"] == sirllm["seen"] == sinks["seen"] == full["kept"]
    assert max(sirllm["kept"]) <= 100 and max(sinks["kept"]) <= 100 < full["kept"][-1]
    assert full["nbytes"][-1] / full["kept"][-1] == full["nbytes"][0] / full["kept"][0]


@pytest.mark.parametrize("recent", [-1, 300])
def test_impossible_budgets_are_one_sentence(hf_ext_command, recent):
    status, _, err = hf_ext_command("demo", "--recent", recent)
    assert status == 1 and f"--recent must be from 0 to --budget minus 20 (236), got {recent}" in err


def test_scores_are_the_log_probabilities_of_the_whole_text(folder, short):
    model, tokenizer = load_model(folder)
    turns = TurnFormat(tokenizer)
    from transformers import DynamicCache

    count = []
    result = recall(model, turns, DynamicCache(), lambda _: 0, lambda _: 0, lambda: count.append(1))
    assert len(count) == steps()
    place, words = list(script.WORDS.items())[1]
    question = turns.later(script.QUESTION.format(place=place)) + turns.ids(script.ANSWER.format(place=place))
    told = [token for exchange in exchanges(turns) for token in exchange[3]] + question
    word = turns.ids(f" {words[2]}")
    with torch.no_grad():
        logprobs = model(torch.tensor([told + word])).logits[0].double().log_softmax(-1)
    expected = sum(logprobs[len(told) - 1 + i, token].item() for i, token in enumerate(word)) / len(word)
    assert result.scores[3, 1, 2].item() == pytest.approx(expected, rel=1e-4)


def test_who_has_forgotten_is_right_once_in_four():
    preferences = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).expand(4, 6, 4)
    assert Recall(preferences).right_uncalibrated == 6 == Recall(preferences).asked // 4
    remembered = preferences + 0.1 * torch.eye(4)[:, None, :]
    assert Recall(remembered).right == 24 > Recall(remembered).right_uncalibrated


def test_the_script_is_fair():
    words = [word for options in script.WORDS.values() for word in options]
    assert max(Counter(words).values()) == 1
    talk = " ".join(" ".join(pair) for pair in script.TALK).lower()
    assert not [word for word in words if word in talk]  # nothing said later repeats what was told
    assert demo_recall.VERSIONS == 4


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.usefixtures("default_folder")
def test_sirllm_remembers_what_the_sink_window_forgets(hf_ext_command, tmp_path):
    numbers = tmp_path / "numbers.json"
    assert hf_ext_command("demo", "--out", tmp_path / "demo.png", "--json", numbers)[0] == 0
    full, sirllm, sinks = json.loads(numbers.read_text()).values()
    assert sirllm["right"] >= sinks["right"] + 6
    assert max(sirllm["kept"]) == max(sinks["kept"]) == 256
    assert sirllm["nbytes"][-1] < full["nbytes"][-1] / 3
