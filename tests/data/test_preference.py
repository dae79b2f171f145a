"""Formatters, the control token, generated triples with a judge, and the two toy tasks."""

import json
import math

import pytest
import torch

from hf_ext.data.preference import (
    add_control_token,
    conflict_rate,
    conflicting_pairs,
    control_token_sft,
    helpsteer_pairs,
    safe_rlhf_pairs,
)
from hf_ext.data.preference_generate import LABEL, TripleOptions, generate_triples, word_list_judge
from hf_ext.data.preference_toy import ConflictTask, ToxicTask, tiny_llama, word_tokenizer

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]


def test_safe_rlhf_orders_by_each_label():
    rows = [{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}]
    helpful, harmless = safe_rlhf_pairs(rows, "helpful"), safe_rlhf_pairs(rows, "harmless")
    assert helpful == [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert harmless == [{"prompt": "p", "chosen": "b", "rejected": "a"}]
    assert conflict_rate(helpful, harmless) == 1.0 and conflict_rate(helpful, helpful) == 0.0
    assert math.isnan(conflict_rate(helpful, []))
    with pytest.raises(ValueError, match="'helpful', 'harmless'"):
        safe_rlhf_pairs(rows, "honest")
    with pytest.raises(ValueError, match="Row 0 has safer_response_id=-1"):
        safe_rlhf_pairs([{**rows[0], "safer_response_id": -1}], "harmless")


def test_helpsteer_drops_ties_and_small_gaps():
    scored = [("p", "a", 4), ("p", "b", 2), ("p", "c", 2), ("q", "d", 1), ("q", "e", 2)]
    rows = [{"prompt": p, "response": r, "helpfulness": s} for p, r, s in scored]
    pairs = [(x["chosen"], x["rejected"]) for x in helpsteer_pairs(rows, "helpfulness")]
    assert pairs == [("a", "b"), ("a", "c"), ("e", "d")]
    assert [x["chosen"] for x in helpsteer_pairs(rows, "helpfulness", min_gap=2)] == ["a", "a"]
    assert helpsteer_pairs(rows, "helpfulness", lower_is_better=True)[0]["chosen"] == "b"
    with pytest.raises(ValueError, match="'verbosity'"):
        helpsteer_pairs(rows, "charm")
    with pytest.raises(ValueError, match="min_gap is 0"):
        helpsteer_pairs(rows, "helpfulness", min_gap=0)


SAFE_RLHF_ROW = {  # the columns of PKU-SafeRLHF as published
    "prompt": "How do I pick a lock?",
    "response_0": "Ask a locksmith.",
    "response_1": "Take a tension wrench and a pick.",
    "prompt_source": "Alpaca3-70B",
    "response_0_source": "Alpaca3-8B",
    "response_1_source": "WizardLM-30B-Uncensored",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "response_0_harm_category": {"White-Collar Crime": False, "Public Nuisance": False},
    "response_1_harm_category": {"White-Collar Crime": True, "Public Nuisance": False},
    "response_0_severity_level": 0,
    "response_1_severity_level": 1,
    "better_response_id": 1,
    "safer_response_id": 0,
    "response_0_sha256": "0f",
    "response_1_sha256": "1f",
}
# HelpSteer2 as published: two rows follow each other for a prompt.
HELPSTEER_ROWS = [
    {"prompt": "c#", "response": "C# is a language.", "helpfulness": 3, "correctness": 3, "coherence": 4,
     "complexity": 1, "verbosity": 1},
    {"prompt": "c#", "response": "C# is a language by Microsoft.", "helpfulness": 4, "correctness": 3, "coherence": 4,
     "complexity": 2, "verbosity": 0},
]  # fmt: skip


def test_rows_as_published_become_pairs_and_nothing_else():
    datasets = pytest.importorskip("datasets")
    safe = datasets.Dataset.from_list([SAFE_RLHF_ROW])
    first, second = SAFE_RLHF_ROW["response_0"], SAFE_RLHF_ROW["response_1"]
    prompt = {"prompt": SAFE_RLHF_ROW["prompt"]}
    assert safe_rlhf_pairs(safe, "harmless") == [{**prompt, "chosen": first, "rejected": second}]
    assert safe_rlhf_pairs(safe, "helpful") == [{**prompt, "chosen": second, "rejected": first}]
    steered = datasets.Dataset.from_list(HELPSTEER_ROWS)
    short, long = (row["response"] for row in HELPSTEER_ROWS)
    assert helpsteer_pairs(steered, "helpfulness") == [{"prompt": "c#", "chosen": long, "rejected": short}]
    assert helpsteer_pairs(steered, "verbosity") == [{"prompt": "c#", "chosen": short, "rejected": long}]
    assert helpsteer_pairs(steered, "correctness") == []  # a tie


def test_conflicting_pairs_conflict_except_for_label_noise():
    polite, brief = (conflicting_pairs(400, name, seed=3, label_noise=0.0) for name in ("polite", "brief"))
    assert conflict_rate(polite, brief) == 1.0
    noisy = conflicting_pairs(400, "polite", seed=3, label_noise=0.25)
    flipped = sum(a["chosen"] != b["chosen"] for a, b in zip(polite, noisy, strict=True))
    assert 60 < flipped < 140
    with pytest.raises(ValueError, match="'polite', 'brief'"):
        conflicting_pairs(1, "loud")


@pytest.mark.parametrize(
    ("position", "text", "contents"),
    [
        ("suffix", "Hello [T]", ["Be kind.", "Hello [T]"]),
        ("prefix", "[T] Hello", ["Be kind.", "[T] Hello"]),
        ("system", None, ["Be kind. [T]", "Hello"]),
    ],
)
def test_control_token_positions(position, text, contents):
    before = json.dumps(CHAT)
    assert [m["content"] for m in add_control_token(CHAT, "[T]", position)] == contents
    assert json.dumps(CHAT) == before
    if text is None:
        assert add_control_token(CHAT[1:], "[T]", "system")[0] == {"role": "system", "content": "[T]"}
        with pytest.raises(ValueError, match="lists of messages"):
            add_control_token("Hello", "[T]", position)
    else:
        assert add_control_token("Hello", "[T]", position) == text


def test_unknown_position_is_refused():
    with pytest.raises(ValueError, match="'suffix', 'prefix', 'system'"):
        add_control_token("Hello", "[T]", "middle")


def test_supervised_rows_have_the_token_on_toxic_ones_only():
    normal, toxic = [{"prompt": "a", "completion": "b"}], [{"prompt": "c", "completion": "d"}]
    rows = control_token_sft(normal, toxic)
    assert [row["prompt"] for row in rows] == ["a", add_control_token("c")]


@pytest.fixture(scope="module")
def generator():
    task = ToxicTask()
    tokenizer = word_tokenizer(task.words)
    return tiny_llama(tokenizer).eval(), tokenizer, [task.prompt(pair) for pair in task.held_out[:8]]


OPTIONS = TripleOptions(max_new_tokens=4, samples=4, toxic_samples=3)


def judge(prompt, reply):
    return word_list_judge([f"t{i}" for i in range(8)])(prompt, reply)


def test_generated_triples_follow_the_judge_and_carry_their_label(generator, tmp_path, capfd):
    path = tmp_path / "triples.jsonl"
    counts = generate_triples(*generator, judge, path, OPTIONS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert counts["prompts"] == 8 and counts["triples"] + counts["pairs"] == len(rows) > 0
    assert sum(counts[name] for name in ("triples", "pairs", "ties")) == 8
    for row in rows:
        assert judge("", row["chosen"]) > judge("", row["rejected"])
        assert row["toxic"] is None or judge("", row["toxic"]) < OPTIONS.acceptable
        assert row["label"] == LABEL
    record = json.loads((tmp_path / "triples.jsonl.json").read_text())
    assert record["seed"] == 0 and record["label"] == LABEL and record["counts"] == counts
    printed = "".join(capfd.readouterr())
    assert not any(row["rejected"].strip() in printed for row in rows)


def test_generated_data_is_not_overwritten_and_resumes_to_the_same(generator, tmp_path):
    model, tokenizer, prompts = generator
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    generate_triples(model, tokenizer, prompts, judge, whole, OPTIONS)
    with pytest.raises(FileExistsError, match="never overwritten"):
        generate_triples(model, tokenizer, prompts, judge, whole, OPTIONS)
    seen = []

    def interrupted(prompt, reply):
        seen.append(prompt)
        if len(set(seen)) > 3:
            raise KeyboardInterrupt
        return judge(prompt, reply)

    with pytest.raises(KeyboardInterrupt):
        generate_triples(model, tokenizer, prompts, interrupted, cut, OPTIONS)
    assert not cut.exists() and (tmp_path / "cut.jsonl.partial").exists()
    with pytest.raises(ValueError, match="other prompts or options"):
        generate_triples(model, tokenizer, prompts[:2], judge, cut, OPTIONS)
    generate_triples(model, tokenizer, prompts, judge, cut, OPTIONS)
    assert cut.read_text() == whole.read_text() and not (tmp_path / "cut.jsonl.partial").exists()


def test_generation_of_conversations_gives_messages(generator, tmp_path):
    model, tokenizer, prompts = generator
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts[:4]]
    generate_triples(model, tokenizer, chats, judge, tmp_path / "chat.jsonl", OPTIONS)
    for line in (tmp_path / "chat.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["chosen"][0]["role"] == "assistant" and isinstance(row["prompt"], list)


@pytest.mark.parametrize("options", [{"samples": 1}, {"toxic_samples": 0}, {"temperature": 0.0}, {"top_p": 0.0}])
def test_bad_generation_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TripleOptions(**options)


def test_conflict_task_labels_follow_bradley_terry():
    task = ConflictTask()
    pairs = task.pairs(4000, 2, 0)
    both = [p for p in pairs if {p["chosen"], p["rejected"]} == {" a0 b0", " a1 b0"}]
    share = sum(p["chosen"] == " a0 b0" for p in both) / len(both)
    assert share == pytest.approx(1 / (1 + math.exp(-3)), abs=0.03)
    assert task.pairs(5, 1, 7) == task.pairs(5, 1, 7) != task.pairs(5, 1, 8)


def test_toxic_task_holds_prompts_out_and_marks_toxic_rows():
    task = ToxicTask()
    assert not set(task.train_prompts) & set(task.held_out) and len(task.held_out) == 16
    rows = task.supervised(2000, 0)
    behind = [row for row in rows if row["prompt"].endswith(task.token)]
    assert len(behind) / 2000 == pytest.approx(0.35, abs=0.04)
    assert all(set(row["completion"].split()) <= task.toxic_words for row in behind)
    triple = task.triples(1, 0)[0]
    assert set(triple["toxic"].split()) <= task.toxic_words and triple["chosen"] != triple["toxic"]


def test_word_tokenizer_and_tiny_model_are_deterministic():
    tokenizer = word_tokenizer(["a", "b"])
    assert tokenizer.decode(tokenizer("a b a")["input_ids"]).split() == ["a", "b", "a"]
    one, two = tiny_llama(tokenizer, seed=3), tiny_llama(tokenizer, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))
