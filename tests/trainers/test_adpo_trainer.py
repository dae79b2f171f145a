"""ADPOTrainer against TRL's DPOTrainer, against float64 NumPy from raw logits, and against itself on other paths."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_ext.data.preference import add_control_token
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.losses import TOXIC_LOSSES
from hf_ext.trainers.shared_prompt import SharedPrompt


def load(preference, seed: int = 0):
    return AutoModelForCausalLM.from_pretrained(preference.folder(seed))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def build(preference, output, rows=None, model=None, reference=None, **options):
    return ADPOTrainer(
        model or load(preference, 1),
        reference if reference is not None or isinstance(model, PeftModel) else load(preference, 0),
        ADPOConfig(**preference.options(output, **options)),
        train_dataset=preference.rows() if rows is None else rows,
        processing_class=preference.tokenizer,
    )


def batch_of(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def batch_loss(trainer) -> float:
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch_of(trainer)).item()


def numpy_logps(model, tokenizer, prompt: str, completion: str, count: int) -> float:
    """Log-probability of the completion's first ``count`` tokens, from the raw logits in float64."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"][: start + count]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    logps = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return sum(logps[i - 1, ids[i]] for i in range(start, len(ids)))


@pytest.mark.parametrize("reference", ["tox", "ref"])
@pytest.mark.parametrize("form", TOXIC_LOSSES)
def test_loss_of_a_batch_equals_numpy_from_raw_logits(preference, tmp_path, form, reference):
    """Uneven lengths, padding and truncation at 9 tokens; relative error 1e-5 (float32 models)."""
    rows, tokenizer = preference.rows(4, 3), preference.tokenizer
    options = {"toxic_loss": form, "toxic_reference": reference, "toxic_beta": 0.3, "toxic_weight": 0.6}
    trainer = build(preference, tmp_path, rows, max_length=9, beta=0.2, **options)
    policy, ref = load(preference, 1).double(), load(preference, 0).double()
    expected = []
    for row in rows:
        prompt, control = row["prompt"], add_control_token(row["prompt"])
        room = 9 - len(tokenizer(prompt)["input_ids"])
        c, r = (
            numpy_logps(policy, tokenizer, prompt, row[side], room)
            - numpy_logps(ref, tokenizer, prompt, row[side], room)
            for side in ("chosen", "rejected")
        )
        room -= reference == "tox"  # the control token takes one of the nine
        under = control if reference == "tox" else prompt
        t = numpy_logps(policy, tokenizer, prompt, row["toxic"], room) - numpy_logps(
            ref, tokenizer, under, row["toxic"], room
        )
        if form == "joint":
            expected.append(np.logaddexp(0, -(0.2 * (c - r) - 0.6 * 0.3 * t)))
        else:
            penalty = 0.3 * t if form == "additive" else -0.3 * (c - t)
            expected.append(np.logaddexp(0, -0.2 * (c - r)) + 0.6 * np.logaddexp(0, penalty))
    assert batch_loss(trainer) == pytest.approx(np.mean(expected), rel=1e-5)


def test_zero_weight_is_dpo_bit_for_bit_and_reads_no_toxic_column(preference, tmp_path):
    rows = preference.rows().remove_columns("toxic")
    ours, theirs = [
        cls(preference.folder(), args=config(**preference.options(tmp_path, max_steps=5), **more), train_dataset=rows)
        for cls, config, more in ((ADPOTrainer, ADPOConfig, {"toxic_weight": 0.0}), (DPOTrainer, DPOConfig, {}))
    ]
    ours.train()
    theirs.train()
    assert losses(ours) == losses(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


@pytest.mark.parametrize(("share_prompt", "rows"), [(False, 12), (True, 4)])
def test_one_forward_of_the_policy_and_no_third_copy(preference, tmp_path, monkeypatch, share_prompt, rows):
    monkeypatch.setattr(SharedPrompt, "_pays", lambda *args: True)
    trainer = build(preference, tmp_path, share_prompt=share_prompt)
    calls = []
    trainer.model.model.register_forward_hook(lambda module, args, output: calls.append(output[0].shape[0]))
    batch_loss(trainer)
    assert calls == [rows]
    adapter = get_peft_model(load(preference), LoraConfig(r=2))
    trainer = build(preference, tmp_path, model=adapter)
    assert trainer.ref_model is None


def test_control_token_moves_the_reference_and_not_the_policy(preference, tmp_path):
    batches = [
        batch_of(build(preference, tmp_path, control_token=token, toxic_reference=kind))
        for token, kind in (("[TOXIC]", "tox"), ("w3", "tox"), ("w3", "ref"))
    ]
    trainer = build(preference, tmp_path)
    references = [trainer._toxic_reference(trainer.ref_model, batch) for batch in batches]
    assert not torch.allclose(references[0], references[1])
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    plain = {name: batches[2][name][8:] for name in ("input_ids", "attention_mask", "completion_mask")}
    from hf_ext.trainers.preference_scoring import completion_logps

    torch.testing.assert_close(completion_logps(trainer.ref_model, plain).detach(), references[2])


def test_adapters_equal_full_models(preference, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(load(preference), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    merged = copy.deepcopy(adapted).merge_and_unload()
    one = build(preference, tmp_path, model=adapted)
    other = build(preference, tmp_path, model=copy.deepcopy(merged), reference=merged)
    assert batch_loss(one) == pytest.approx(batch_loss(other), abs=1e-6)
    one.train()
    assert {n for n, p in one.model.named_parameters() if p.requires_grad} == {
        n for n, _ in one.model.named_parameters() if ".default." in n
    }


def test_precomputed_equals_online_and_the_token_is_in_the_cache_key(preference, tmp_path):
    rows = preference.rows()
    rows.save_to_disk(tmp_path / "rows")  # a dataset on disk keeps its cache between trainers
    rows = Dataset.load_from_disk(tmp_path / "rows")
    for options in ({}, {"control_token": "w3"}, {"control_token_position": "prefix"}, {"toxic_loss": "joint"}):
        online, stored = (
            build(preference, tmp_path, rows, precompute_ref_log_probs=stored, max_steps=3, **options)
            for stored in (False, True)
        )
        online.train()
        stored.train()
        assert losses(online) == pytest.approx(losses(stored), abs=1e-6)


def test_rows_without_a_toxic_response_are_pairs(preference, tmp_path):
    rows = preference.rows(8).to_list()
    for row in rows[::2]:
        row["toxic"] = None
    masked = build(preference, tmp_path, Dataset.from_list(rows), missing_toxic="mask", max_steps=1)
    batch = batch_of(masked)
    present = len(batch["toxic_examples"])
    assert len(batch["input_ids"]) == 8 + present < 12
    masked.train()
    assert masked.state.log_history[0]["adpo/toxic_available"] == pytest.approx(present / 4, abs=0.5)
    with pytest.raises(ValueError, match=r"row 0 .* 'toxic'"):
        build(preference, tmp_path, Dataset.from_list(rows))


def test_every_batch_gathers_the_same_metrics(preference, tmp_path, monkeypatch):
    """Processes whose batches have and lack toxic responses must meet in the same collective operations."""
    rows = preference.rows(8).to_list()
    for row in rows[:4]:
        row["toxic"] = None
    trainer = build(preference, tmp_path, Dataset.from_list(rows), missing_toxic="mask")
    trainer.model.train()
    gathered = []

    def spy(value):
        gathered[-1].append(tuple(value.shape[1:]))
        return value

    monkeypatch.setattr(trainer.accelerator, "gather", spy)
    monkeypatch.setattr(trainer.accelerator, "gather_for_metrics", spy)
    for part in (slice(0, 4), slice(4, 8), slice(2, 6)):
        gathered.append([])
        rows = [trainer.train_dataset[i] for i in range(8)[part]]
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    assert gathered[0] == gathered[1] == gathered[2] and len(gathered[0]) > 10
    logged = trainer._metrics["train"]
    assert logged["adpo/toxic_available"] == [0.0, 1.0, 0.5]
    assert len(logged["rewards/toxic"]) == len(logged["loss/toxic"]) == 2
    toxic = trainer.args.toxic_weight * logged["loss/toxic"][-1] * 0.5  # half of the examples have one
    assert loss.item() == pytest.approx(logged["loss/dpo"][-1] + toxic, rel=1e-6)


def test_the_pair_part_is_dpos_on_the_same_rows(preference, tmp_path):
    trainer = build(preference, tmp_path, toxic_weight=0.5)
    total = batch_loss(trainer)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert total == pytest.approx(metrics["loss/dpo"] + 0.5 * metrics["loss/toxic"], rel=1e-6)
    dpo = build(preference, tmp_path, preference.rows().remove_columns("toxic"), toxic_weight=0.0)
    assert metrics["loss/dpo"] == pytest.approx(batch_loss(dpo), abs=1e-6)


def test_warmup_raises_the_weight_linearly(preference, tmp_path):
    trainer = build(preference, tmp_path, max_steps=4, toxic_weight=2.0, toxic_weight_warmup_ratio=0.5)
    trainer.train()
    logged = [entry["adpo/toxic_weight"] for entry in trainer.state.log_history if "adpo/toxic_weight" in entry]
    assert logged == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_resume_equals_the_uninterrupted_run(preference, tmp_path, kind):
    def start(output):
        torch.manual_seed(0)
        model = get_peft_model(load(preference), LoraConfig(r=2)) if kind == "adapters" else None
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return build(preference, output, model=model, **options)

    whole = start(tmp_path / "whole")
    whole.train()
    resumed = start(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_two_half_batches_accumulate_to_a_whole_one(preference, tmp_path):
    """Rows that all have a toxic response: the mean over two microbatches is the mean over the batch."""
    whole = build(preference, tmp_path, max_steps=3)
    halves = build(preference, tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole.train()
    halves.train()
    assert losses(halves) == pytest.approx(losses(whole), rel=1e-5)
    for one, other in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_images_and_a_moving_reference_with_stored_values_are_refused(preference, tmp_path):
    images = preference.rows(2).map(lambda row: {"image": "x.png"})
    with pytest.raises(ValueError, match="ADPO takes text only"):
        build(preference, tmp_path, images)
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        build(preference, tmp_path, sync_ref_model=True, precompute_ref_log_probs=True)


def test_implicit_prompts_are_what_all_three_responses_share():
    from hf_ext.trainers.adpo_rows import split_prompt

    def split(chosen, rejected, toxic):
        row = split_prompt({"chosen": chosen, "rejected": rejected, "toxic": toxic}, "toxic")
        return [row[name] for name in ("prompt", "chosen", "rejected", "toxic")]

    assert split("Say it. Yes", "Say it. No", "Say it. Argh") == ["Say it.", " Yes", " No", " Argh"]
    assert split("Go on and on", "Go on and off", "Go west") == ["Go", " on and on", " on and off", " west"]
    ask, yes, no, toxic = (
        {"role": role, "content": role + text}
        for role, text in (("user", "?"), ("assistant", "y"), ("assistant", "n"), ("assistant", "t"))
    )
    assert split([ask, yes], [ask, no], [ask, toxic]) == [[ask], [yes], [no], [toxic]]
    assert split_prompt({"chosen": "a b c", "rejected": "a b d", "toxic": None}, "toxic")["toxic"] is None
    with pytest.raises(ValueError, match="does not begin with the prompt"):
        split("Say it. Yes", "Say it. No", "Argh")


def test_implicit_prompts_train(preference, tmp_path):
    rows = preference.rows(8)
    names = ("chosen", "rejected", "toxic")
    implicit = rows.map(lambda row: {name: "w1 w2 " + row["prompt"] + row[name] for name in names})
    trainer = build(preference, tmp_path, implicit.remove_columns("prompt"))
    assert np.isfinite(batch_loss(trainer))


def test_text_is_not_printed(preference, tmp_path, capfd):
    rows = preference.rows(8).map(lambda row: {"toxic": " w7 w7 w7 w7"})
    trainer = build(preference, tmp_path, rows)
    trainer.train()
    trainer.create_model_card()
    out, err = capfd.readouterr()
    assert "w7" not in out + err + (tmp_path / "README.md").read_text()
    assert "2405.12900" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"toxic_loss": "sum"}, "'additive', 'pairwise', 'joint'"),
        ({"loss_type": ["sigmoid", "sft "]}, "loss_type is 'sft '; allowed: 'sigmoid'"),
        ({"toxic_reference": "sft"}, "'tox', 'ref'"),
        ({"toxic_weight": -1.0}, "toxic_weight is -1.0"),
        ({"toxic_weight": float("inf")}, "toxic_weight is inf"),
        ({"toxic_beta": 0.0}, "toxic_beta is 0.0"),
        ({"toxic_margin": -3.0}, "toxic_margin is -3.0"),
        ({"toxic_weight_warmup_ratio": 2.0}, "at most 1"),
        ({"missing_toxic": "skip"}, "'error', 'mask'"),
        ({"control_token": " "}, "control_token is empty"),
        ({"control_token_position": "middle"}, "'suffix', 'prefix', 'system'"),
        ({"toxic_loss": "joint", "loss_type": ["ipo"]}, "joint"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"f_divergence_type": "js_divergence"}, "reverse_kl"),
        ({"toxic_column": "harm"}, "no column 'harm'"),
        ({"max_length": 2}, "(prompt of max_length=2)|(leaves a token)"),
        ({"control_token_position": "system"}, "lists of messages"),
    ],
)
def test_bad_options_are_refused_before_any_step(preference, tmp_path, options, words):
    rows = preference.rows(6).map(lambda row: {"prompt": "w1 w2 w3"})
    with pytest.raises(ValueError, match=words):
        build(preference, tmp_path, rows, **options)
