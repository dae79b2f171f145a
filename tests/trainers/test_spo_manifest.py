"""The round manifest: what it holds, what it refuses, and that rounds find their policies through it."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from hf_ext.data.preference_toy import tiny_llama, word_tokenizer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_manifest import FILE_NAME, fingerprint, policy_path, read_manifest
from hf_ext.trainers.spo_trainer import SPOTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def train_round(preference, model, output, **options):
    kwargs = {name: options.pop(name) for name in ("peft_config", "prev_policies") if name in options}
    args = SPOConfig(**preference.options(output, **options))
    trainer = SPOTrainer(
        model, args=args, train_dataset=preference.rows(), processing_class=preference.tokenizer, **kwargs
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def rounds(preference, tmp_path_factory):
    """Two finished rounds of full models and two of adapters, in folders full1, full2, lora1, lora2."""
    folder = tmp_path_factory.mktemp("rounds")
    train_round(preference, preference.folder(0), folder / "full1", beta=0.2, dimension="safe")
    train_round(preference, str(folder / "full1"), folder / "full2", manifest=str(folder / "full1"), prev_lambda=0.5)
    train_round(preference, preference.folder(0), folder / "lora1", peft_config=LORA, beta=0.2)
    train_round(preference, preference.folder(0), folder / "lora2", manifest=str(folder / "lora1"), peft_config=LORA)
    return folder


def test_manifest_holds_what_the_next_round_needs(preference, rounds):
    manifest = json.loads((rounds / "full2" / FILE_NAME).read_text())
    assert manifest["base"]["name"] == preference.folder(0)
    first, second = manifest["rounds"]
    assert (first["round"], first["dimension"], first["beta"], first["lambdas"]) == (1, "safe", 0.2, [])
    assert (second["round"], second["beta"], second["lambdas"], second["kind"]) == (2, 0.1, [0.5], "model")
    assert first["policy"] == "../full1" and second["policy"] == "." and first["dataset"]
    read = read_manifest(str(rounds / "full2"))
    assert policy_path(read, 0) == preference.folder(0)
    assert Path(policy_path(read, 1)).samefile(rounds / "full1")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_third_round_runs_from_the_manifest_alone(preference, rounds, tmp_path, kind):
    model = str(rounds / "full2") if kind == "full" else preference.folder(0)
    trainer = train_round(preference, model, tmp_path, manifest=str(rounds / f"{kind}2"))
    assert trainer.plan.round_index == 3 and trainer.plan.betas == (0.2, 0.1) and trainer.plan.needed == [1, 2]
    start = AutoModelForCausalLM.from_pretrained(rounds / "full2") if kind == "full" else None
    if start is not None:
        moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), trainer.model.parameters(), strict=True)]
        assert any(moved)
    else:
        assert set(trainer.model.peft_config) == {"default", "ref", "spo_round_1"}
        assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
            n for n, _ in trainer.model.named_parameters() if ".default." in n
        }


def test_adapter_rounds_start_where_the_last_one_ended(preference, rounds, tmp_path):
    args = SPOConfig(**preference.options(tmp_path), manifest=str(rounds / "lora1"))
    trainer = SPOTrainer(preference.folder(0), args=args, train_dataset=preference.rows(4))
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(preference.folder(0)), rounds / "lora1")
    weights = dict(trainer.model.named_parameters())
    compared = [
        torch.equal(value, weights[name]) and torch.equal(value, weights[name.replace(".default.", ".ref.")])
        for name, value in saved.named_parameters()
        if ".default." in name
    ]
    assert compared and all(compared)


def test_checkpoints_carry_the_manifest(preference, tmp_path):
    train_round(preference, preference.folder(0), tmp_path, save_strategy="steps", save_steps=1)
    assert (tmp_path / "checkpoint-1" / FILE_NAME).is_file() and (tmp_path / FILE_NAME).is_file()


@pytest.mark.parametrize(
    ("model", "manifest", "words"),
    [
        (lambda p, r: p.folder(3), "lora1", "is not the one of"),
        (lambda p, r: p.folder(0), "full1", "not the result of round 1"),
        (lambda p, r: str(r / "full1"), "full2", "not the result of round 2"),
    ],
)
def test_a_model_of_another_base_or_round_is_refused(preference, rounds, tmp_path, model, manifest, words):
    args = SPOConfig(**preference.options(tmp_path), manifest=str(rounds / manifest))
    with pytest.raises(ValueError, match=words):
        SPOTrainer(
            model(preference, rounds),
            args=args,
            train_dataset=preference.rows(4),
            processing_class=preference.tokenizer,
        )


def test_another_tokenizer_or_template_is_refused(preference, rounds, tmp_path):
    tokenizer = word_tokenizer([*(f"w{i}" for i in range(40)), "[TOXIC]"])
    tokenizer.chat_template = "{{ messages }}"
    args = SPOConfig(**preference.options(tmp_path), manifest=str(rounds / "full1"))
    with pytest.raises(ValueError, match="tokenizer or its chat template"):
        SPOTrainer(str(rounds / "full1"), args=args, train_dataset=preference.rows(4), processing_class=tokenizer)


def test_wrong_round_index_and_broken_files_are_refused(preference, rounds, tmp_path):
    args = SPOConfig(**preference.options(tmp_path), manifest=str(rounds / "full1"), round_index=3)
    with pytest.raises(ValueError, match="ends with round 1; the next is round 2"):
        SPOTrainer(str(rounds / "full1"), args=args, train_dataset=preference.rows(4))
    broken = tmp_path / FILE_NAME
    for text, words in (("{", "not a manifest"), ('{"format": 9}', "format 9"), ('{"format": 1}', "not a manifest")):
        broken.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_manifest(str(tmp_path))


def test_fingerprint_sees_weights_and_not_their_float_type(preference):
    model = tiny_llama(preference.tokenizer)
    original = fingerprint(model.state_dict())
    assert fingerprint(model.bfloat16().float().state_dict()) == original
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model.state_dict()) != original
    assert fingerprint({"x": torch.empty(3, device="meta")}) is None
