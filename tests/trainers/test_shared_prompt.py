"""One row for all responses to a prompt, against each row on its own."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from hf_ext.testing import FAMILIES, tiny_model
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.shared_prompt import SharedPrompt, can_share_prompt, make_layout
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRAINERS = {"SPO": (SPOTrainer, SPOConfig, {"prev_betas": [0.1]}), "ADPO": (ADPOTrainer, ADPOConfig, {})}


def triples(examples: int = 3, longest_prompt: int = 9, longest_reply: int = 5) -> tuple[dict, torch.Tensor]:
    """Rows of (chosen, rejected, third) of uneven lengths and their examples.

    The third prompt goes on where the others end, begins differently, or is missing. One reply is cut away whole.
    """
    draw = random.Random(0)

    def tokens(longest: int) -> list[int]:
        return [draw.randint(3, 120) for _ in range(draw.randint(1, longest))]

    prompts = [tokens(longest_prompt) for _ in range(examples)]
    sequences = [(prompt, tokens(longest_reply)) for _ in range(2) for prompt in prompts]
    sequences[1] = (sequences[1][0], [])
    sequences += [(prompts[0] + [99], tokens(longest_reply)), ([98] + prompts[2], tokens(longest_reply))]
    inputs = collate(sequences)
    return inputs, torch.tensor([*range(examples), *range(examples), 0, 2])


def collate(sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) + len(reply) for prompt, reply in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, reply) in enumerate(sequences):
        ids[i, : len(prompt + reply)] = torch.tensor(prompt + reply)
        mask[i, : len(prompt + reply)] = 1
        labels[i, len(prompt) : len(prompt + reply)] = torch.tensor(reply)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shared(model, examples, monkeypatch) -> SharedPrompt:
    monkeypatch.setattr(SharedPrompt, "_pays", lambda *args: True)
    return SharedPrompt(model, examples)


def assert_same_answers(model, inputs, examples, monkeypatch) -> None:
    """All fields of the fused head and the gradient of a weighted sum of log-probabilities."""
    gradients, answers = [], []
    for scorer in (model, shared(model, examples, monkeypatch)):
        model.zero_grad()
        answers.append(scorer(**inputs, use_cache=False, fused_lm_head=True))
        (answers[-1].log_probs.sum(1) * torch.arange(1, len(examples) + 1)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for field in FIELDS:
        torch.testing.assert_close(*(getattr(answer, field) for answer in answers), rtol=1e-4, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4)


# transformers has no sdpa attention for Gemma 2, whose attention logits are capped.
CASES = [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager") if (family, kind) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_family_answers_as_row_by_row(family, attention, monkeypatch):
    windowed = family in ("mistral", "gemma2", "gemma3_text")
    model = tiny_model(family, attn_implementation=attention, **({"sliding_window": 32} if windowed else {}))
    assert can_share_prompt(model) and model.config._attn_implementation == attention
    add_fused_lm_head(model, outputs=FIELDS)
    assert_same_answers(model, *triples(), monkeypatch)


def test_against_numpy_logits_of_each_row(monkeypatch):
    model = tiny_model("llama").double()
    add_fused_lm_head(model)
    inputs, examples = triples()
    found = shared(model, examples, monkeypatch)(**inputs, fused_lm_head=True).log_probs.sum(1).detach().numpy()
    for row, (ids, mask, labels) in enumerate(zip(*inputs.values(), strict=True)):
        length, start = int(mask.sum()), int((labels != -100).int().argmax()) if (labels != -100).any() else 0
        with torch.no_grad():
            logits = model(ids[None, :length]).logits[0].numpy()
        logps = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        expected = sum(logps[i - 1, ids[i]] for i in range(start, length)) if start else 0.0
        assert found[row] == pytest.approx(expected, rel=1e-5)


def test_the_layout_by_hand():
    """Prompt 1 2 3 with replies 4 5 and 6, and prompt 1 2 9 3 with reply 7: the last shares the first two tokens."""
    inputs = collate([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([1, 2, 9, 3], [7])])
    layout = make_layout(*inputs.values(), torch.tensor([0, 0, 0]))
    assert layout.pack(inputs["input_ids"], 0).tolist() == [[1, 2, 3, 4, 5, 3, 6, 9, 3, 7]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 2, 3, 4]]
    assert layout.branches.tolist() == [[0, 0, 1, 1, 1, 2, 2, 3, 3, 3]]
    seen = [[column for column in range(10) if row[column]] for row in layout.attention_mask()[0, 0].tolist()]
    assert seen[4] == [0, 1, 2, 3, 4] and seen[6] == [0, 1, 5, 6] and seen[9] == [0, 1, 7, 8, 9]


def test_an_empty_prompt_shares_nothing_and_predicts_no_first_token(monkeypatch):
    model = tiny_model("llama")
    add_fused_lm_head(model, outputs=FIELDS)
    assert_same_answers(model, collate([([], [4, 5]), ([], [6, 7, 8])]), torch.tensor([0, 0]), monkeypatch)


def test_cross_layer_attention_and_adapters(preference, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(preference.folder(1), hf_ext={"cla": {"sharing_factor": 2}})
    add_fused_lm_head(model, outputs=FIELDS)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert can_share_prompt(model)
    inputs, examples = triples()
    inputs["input_ids"] %= 40
    assert_same_answers(model, inputs, examples, monkeypatch)


def test_who_cannot_share():
    model = tiny_model("llama")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not can_share_prompt(get_peft_model(tiny_model("llama"), prompts))
    for change in ({"_attn_implementation": "flash_attention_2"}, {"layer_types": ["full_attention", "conv"]}):
        changed = tiny_model("llama")
        for name, value in change.items():
            setattr(changed.config, name, value)
        assert not can_share_prompt(changed)
    composite = tiny_model("llama")
    composite.config = SimpleNamespace(get_text_config=lambda config=composite.config: config)
    assert not can_share_prompt(composite)
    model._is_stateful = True
    assert not can_share_prompt(model)


@pytest.mark.parametrize("change", ["left padding", "another input", "sliding window", "long replies", "logits"])
def test_what_goes_to_the_model_as_it_is(change):
    model, (inputs, examples) = tiny_model("llama"), triples(longest_prompt=60)
    add_fused_lm_head(model)
    options = {"fused_lm_head": True}
    if change == "left padding":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    elif change == "another input":
        options["output_router_logits"] = False
    elif change == "sliding window":
        model.config.sliding_window = 8
    elif change == "long replies":
        inputs, examples = collate([([3, 4], [5] * 200), ([3, 4], [6] * 200)]), torch.tensor([0, 0])
    else:
        options = {}
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    SharedPrompt(model, examples)(**inputs, **options)
    assert widths == [inputs["input_ids"].shape]


def test_sharing_by_itself_when_it_costs_less():
    model, (inputs, examples) = tiny_model("llama"), triples(longest_prompt=60)
    add_fused_lm_head(model)
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    SharedPrompt(model, examples)(**inputs, fused_lm_head=True)
    assert widths[0] < inputs["input_ids"].numel()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"precompute_ref_log_probs": True}])
@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_the_same_with_and_without(preference, tmp_path, monkeypatch, name, changes, kind):
    """Losses and every logged metric of four steps; prompts are long enough that sharing pays without force."""
    rows = preference.rows(12).map(lambda row: {"prompt": " ".join(["w1 w2 w3 w4"] * 8) + " " + row["prompt"]})
    cls, config, own = TRAINERS[name]
    extra = {"prev_policies": [preference.folder(0)]} if name == "SPO" else {}
    if kind == "lora":
        extra["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    calls = []
    pack = SharedPrompt._pays
    monkeypatch.setattr(SharedPrompt, "_pays", lambda *args: calls.append(pack(*args)) or calls[-1])
    logs = []
    for share in (False, True):
        args = config(**preference.options(tmp_path, max_steps=4, share_prompt=share, **own, **changes))
        trainer = cls(preference.folder(1), args=args, train_dataset=rows, **extra)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        assert bool(calls) == share and all(calls)
    for one, other in zip(*logs, strict=True):
        timed = {key for key in one if "runtime" in key or "per_second" in key or key == "step_time"}
        kept = [{key: value for key, value in log.items() if key not in timed} for log in (one, other)]
        assert kept[0] == pytest.approx(kept[1], rel=2e-3, abs=2e-4)
