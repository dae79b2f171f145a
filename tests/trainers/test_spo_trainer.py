"""SPOTrainer against TRL's DPOTrainer, against float64 NumPy from raw logits, and against itself on other paths."""

import copy
import gc
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_ext.trainers.losses import spo_margin_weights
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer


def load(preference, seed: int):
    return AutoModelForCausalLM.from_pretrained(preference.folder(seed))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batch_loss(trainer) -> float:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    return trainer.compute_loss(trainer.model, batch).item()


def same_parameters(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == name2 and torch.equal(value, value2) for (name, value), (name2, value2) in pairs)


def numpy_logps(model, tokenizer, prompt: str, completion: str, max_length: int) -> float:
    """Log-probability of the completion, one row at a time, from the raw logits in float64."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"][:max_length]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    logps = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return sum(logps[i - 1, ids[i]] for i in range(start, len(ids)))


@pytest.mark.parametrize(("rounds", "mode"), [(2, "chain"), (3, "chain"), (3, "recursive"), (3, "naive")])
def test_loss_of_a_batch_equals_numpy_from_raw_logits(preference, tmp_path, rounds, mode):
    """Uneven lengths, padding and truncation at 9 tokens; rounds 2 and 3; relative error 1e-5 (float32 models)."""
    rows, betas = preference.rows(4), [0.1, 0.3][: rounds - 1]
    triangle = [0.7, 0.5, 1.2]
    args = SPOConfig(
        **preference.options(tmp_path, beta=0.2, max_length=9, prev_betas=betas, prev_reward=mode),
        prev_lambdas=triangle[: rounds * (rounds - 1) // 2],
    )
    policies = [load(preference, seed) for seed in range(rounds)]
    trainer = SPOTrainer(
        load(preference, 9),
        policies[-1],
        args,
        train_dataset=rows,
        processing_class=preference.tokenizer,
        prev_policies=policies[:-1],
    )
    table = [[0.7], [0.5, 1.2]][: rounds - 1]
    weights = spo_margin_weights(betas, table, mode)
    models = [*[load(preference, seed).double() for seed in range(rounds)], load(preference, 9).double()]
    expected = []
    for row in rows:
        d = [
            numpy_logps(m, preference.tokenizer, row["prompt"], row["chosen"], 9)
            - numpy_logps(m, preference.tokenizer, row["prompt"], row["rejected"], 9)
            for m in models
        ]
        z = 0.2 * (d[-1] - d[-2]) - sum(w * (d[j + 1] - d[j]) for j, w in enumerate(weights))
        expected.append(np.logaddexp(0, -z))
    assert batch_loss(trainer) == pytest.approx(np.mean(expected), rel=1e-5)


def test_round_one_is_dpo_bit_for_bit(preference, tmp_path):
    ours, theirs = [
        cls(
            preference.folder(),
            args=config(**preference.options(tmp_path, max_steps=5)),
            train_dataset=preference.rows(32),
        )
        for cls, config in ((SPOTrainer, SPOConfig), (DPOTrainer, DPOConfig))
    ]
    ours.train()
    theirs.train()
    assert losses(ours) == losses(theirs)
    assert same_parameters(ours.model, theirs.model)


def test_zero_multiplier_is_sequential_dpo_bit_for_bit(preference, tmp_path):
    args = SPOConfig(**preference.options(tmp_path, max_steps=3), prev_betas=[0.1], prev_lambda=0.0)
    ours = SPOTrainer(preference.folder(1), args=args, train_dataset=preference.rows())
    theirs = DPOTrainer(
        preference.folder(1),
        args=DPOConfig(**preference.options(tmp_path, max_steps=3)),
        train_dataset=preference.rows(),
    )
    ours.train()
    theirs.train()
    assert losses(ours) == losses(theirs) and same_parameters(ours.model, theirs.model)


def three_rounds_of_adapters(preference, tmp_path, **changes):
    """A PeftModel whose adapter is pi_2, the folder of pi_1's adapter, and both merged into full models."""
    merged = {}
    for k in (1, 2):
        model = get_peft_model(load(preference, 0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(k)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        model.save_pretrained(tmp_path / f"adapter{k}")
        merged[k] = model.merge_and_unload()
    peft = PeftModel.from_pretrained(load(preference, 0), tmp_path / "adapter2", is_trainable=True)
    return peft, str(tmp_path / "adapter1"), merged


def test_adapters_equal_full_models_and_only_default_trains(preference, tmp_path):
    peft, first, merged = three_rounds_of_adapters(preference, tmp_path)
    options = {"prev_betas": [0.1, 0.2], "prev_lambda": 0.8}
    args = SPOConfig(**preference.options(tmp_path / "o", **options))
    adapters = SPOTrainer(
        peft, args=args, train_dataset=preference.rows(), processing_class=preference.tokenizer, prev_policies=[first]
    )
    full = SPOTrainer(
        copy.deepcopy(merged[2]),
        merged[2],
        args,
        train_dataset=preference.rows(),
        processing_class=preference.tokenizer,
        prev_policies=[merged[1]],
    )
    assert batch_loss(adapters) == pytest.approx(batch_loss(full), abs=1e-6)
    frozen = {n: p.clone() for n, p in adapters.model.named_parameters() if ".default." not in n}
    before = {n: p.clone() for n, p in adapters.model.named_parameters() if ".default." in n}
    adapters.train()
    assert {n for n, p in adapters.model.named_parameters() if p.requires_grad} == set(before)
    parameters = dict(adapters.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    assert not any(torch.equal(parameters[name], value) for name, value in before.items())
    assert adapters.model.active_adapter == "default"


def test_frozen_models_get_no_gradient_and_do_not_move(preference, tmp_path):
    policies = [load(preference, seed) for seed in (0, 1)]
    before = [copy.deepcopy(policy.state_dict()) for policy in policies]
    args = SPOConfig(**preference.options(tmp_path), prev_betas=[0.1])
    trainer = SPOTrainer(
        load(preference, 1),
        policies[1],
        args,
        train_dataset=preference.rows(),
        processing_class=preference.tokenizer,
        prev_policies=[policies[0]],
    )
    trainer.train()
    for policy, state in zip(policies, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
        assert all(parameter.grad is None for parameter in policy.parameters())


def round_two(preference, output, dataset, precompute: bool, prev_policies="base", **changes):
    args = SPOConfig(
        **preference.options(output, precompute_ref_log_probs=precompute, max_steps=4, **changes), prev_betas=[0.1]
    )
    policies = [preference.folder(0)] if prev_policies == "base" else prev_policies
    return SPOTrainer(preference.folder(1), args=args, train_dataset=dataset, prev_policies=policies)


def test_stored_equals_online_and_a_new_multiplier_reuses_the_columns(preference, tmp_path):
    rows = preference.rows()
    online, stored = (round_two(preference, tmp_path, rows, precompute) for precompute in (False, True))
    online.train()
    stored.train()
    assert losses(online) == pytest.approx(losses(stored), abs=1e-6)
    logged = [{k: v for k, v in t.state.log_history[0].items() if k.startswith("spo/")} for t in (online, stored)]
    assert logged[0] == pytest.approx(logged[1], abs=1e-5) and len(logged[0]) == 5
    columns = stored.train_dataset.column_names
    assert online._frozen and not stored._frozen
    assert {"prev0_chosen_logps", "prev1_rejected_logps"} <= set(columns)
    again = round_two(
        preference, tmp_path, stored.train_dataset, True, None, prev_lambda=0.3
    )  # no frozen policy at hand
    again.train()
    fresh = round_two(preference, tmp_path, rows, False, prev_lambda=0.3)
    fresh.train()
    assert not again._frozen
    assert losses(again) == pytest.approx(losses(fresh), abs=1e-6)
    assert losses(again) != pytest.approx(losses(stored), abs=1e-4)


def test_stored_policies_leave_no_model_in_memory(preference, tmp_path):
    gc.collect()
    before = {id(item) for item in gc.get_objects() if isinstance(item, LlamaForCausalLM)}
    trainer = round_two(preference, tmp_path, preference.rows(4), True)
    alive = [item for item in gc.get_objects() if isinstance(item, LlamaForCausalLM) and id(item) not in before]
    assert [id(item) for item in alive] == [id(trainer.model)]


def test_stored_columns_of_another_model_are_refused(preference, tmp_path):
    stored = round_two(preference, tmp_path, preference.rows(), True)
    dataset = stored.train_dataset
    wrong = [value - 5.0 for value in dataset["prev1_chosen_logps"]]
    dataset = dataset.remove_columns("prev1_chosen_logps").add_column("prev1_chosen_logps", wrong)
    with pytest.raises(ValueError, match="prev1_chosen_logps was computed with another model"):
        round_two(preference, tmp_path, dataset, True, None)


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_resume_equals_the_uninterrupted_run(preference, tmp_path, kind):
    def build(output):
        args = SPOConfig(
            **preference.options(output, max_steps=4, save_strategy="steps", save_steps=2), prev_betas=[0.1]
        )
        if kind == "full":
            return SPOTrainer(
                preference.folder(1), args=args, train_dataset=preference.rows(), prev_policies=[preference.folder(0)]
            )
        peft, _, _ = three_rounds_of_adapters(preference, tmp_path)
        return SPOTrainer(peft, args=args, train_dataset=preference.rows(), processing_class=preference.tokenizer)

    whole = build(tmp_path / "whole")
    whole.train()
    resumed = build(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_parameters(whole.model, resumed.model)
    if kind == "adapters":
        assert resumed.model.active_adapter == "default"


def test_evaluation_names_metrics_by_dimension(preference, tmp_path):
    args = SPOConfig(**preference.options(tmp_path), prev_betas=[0.1])
    sets = {"safe": preference.rows(8, 1), "helpful": preference.rows(8, 2)}
    trainer = SPOTrainer(
        preference.folder(1),
        args=args,
        train_dataset=preference.rows(),
        eval_dataset=sets,
        prev_policies=[preference.folder(0)],
    )
    trainer.train()
    metrics = trainer.evaluate()
    for quantity in ("rewards/margins", "rewards/accuracies", "spo/kept_margin", "spo/kept_accuracy"):
        assert f"eval_safe_{quantity}" in metrics and f"eval_helpful_{quantity}" in metrics
    assert metrics["eval_safe_rewards/margins"] != metrics["eval_helpful_rewards/margins"]
    alone = trainer.evaluate(sets["safe"])
    assert alone["eval_spo/kept_margin"] == pytest.approx(metrics["eval_safe_spo/kept_margin"], abs=1e-6)
    chosen, rejected = trainer.pair_logps(sets["safe"])
    trainer.model, trained = load(preference, 0), trainer.model
    trainer.model, base = (
        trained,
        SPOTrainer(
            preference.folder(0), args=SPOConfig(**preference.options(tmp_path)), train_dataset=preference.rows()
        ).pair_logps(sets["safe"]),
    )
    kept = (chosen - rejected) - (base[0] - base[1])
    assert kept.mean().item() == pytest.approx(metrics["eval_safe_spo/kept_margin"], abs=1e-5)


def test_model_card_and_public_names(preference, tmp_path):
    import hf_ext

    assert hf_ext.SPOTrainer is SPOTrainer and hf_ext.SPOConfig is SPOConfig
    args = SPOConfig(**preference.options(tmp_path), prev_betas=[0.1], dimension="helpful")
    trainer = SPOTrainer(
        preference.folder(1), args=args, train_dataset=preference.rows(4), prev_policies=[preference.folder(0)]
    )
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2405.12739" in card and "| 2 | helpful | 0.1 | [1.0] | chain |" in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prev_betas": [0.1, 0.2], "round_index": 2}, "prev_betas of 1 values"),
        ({"round_index": 3}, "prev_betas of 2 values"),
        ({"round_index": 0}, "counted from 1"),
        ({"prev_betas": [-0.1], "round_index": 2}, "prev_betas is -0.1"),
        ({"prev_lambda": float("nan")}, "prev_lambda is nan"),
        ({"prev_lambda": -1.0}, "prev_lambda is -1.0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"prev_reward": "sum"}, "'chain', 'recursive', 'naive'"),
        ({"loss_type": "sigmod"}, "loss_type is 'sigmod'; allowed: 'sigmoid'"),
        ({"prev_betas": [0.1], "round_index": 2, "prev_lambdas": [1.0, 1.0]}, "prev_lambdas has 2 values"),
        ({"prev_betas": [0.1], "round_index": 2, "loss_type": ["ipo"]}, "loss_type"),
        ({"prev_betas": [0.1], "round_index": 2, "loss_type": ["bco_pair"]}, "loss_type"),
        ({"prev_betas": [0.1], "round_index": 2, "f_divergence_type": "forward_kl"}, "reverse_kl"),
        ({"prev_betas": [0.1], "round_index": 2, "sync_ref_model": True}, "sync_ref_model"),
        ({"manifest": "nowhere"}, "holds no spo_manifest.json"),
        ({"prev_betas": [0.1, 0.1], "round_index": 3}, "needs the policy of round 1"),
        ({"prev_betas": [0.1], "round_index": 2}, "Policy 0 is missing"),
    ],
)
def test_bad_options_are_refused_before_any_step(preference, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        SPOTrainer(
            preference.folder(1),
            args=SPOConfig(**preference.options(tmp_path, **options)),
            train_dataset=preference.rows(4),
        )


def test_plain_config_round_index_defaults(preference, tmp_path):
    assert SPOConfig(**preference.options(tmp_path)).round_index is None
    trainer = SPOTrainer(
        preference.folder(1), args=DPOConfig(**preference.options(tmp_path)), train_dataset=preference.rows(4)
    )
    assert trainer.plan.round_index == 1 and isinstance(trainer.args, SPOConfig)
    assert Path(trainer.args.output_dir) == tmp_path


def test_too_many_policies_and_the_model_itself_are_refused(preference, tmp_path):
    args = SPOConfig(**preference.options(tmp_path), prev_betas=[0.1])
    with pytest.raises(ValueError, match="prev_policies has 2 entries"):
        SPOTrainer(preference.folder(1), args=args, train_dataset=preference.rows(4), prev_policies=["a", "b"])
    model = load(preference, 1)
    with pytest.raises(ValueError, match="Policy 0 is the trained model"):
        SPOTrainer(
            model,
            args=args,
            train_dataset=preference.rows(4),
            processing_class=preference.tokenizer,
            prev_policies=[model],
        )


def test_new_adapter_on_the_base_is_no_second_round(preference, tmp_path):
    """With a fresh adapter the base is the reference of round 2; it cannot be pi_0 too."""
    args = SPOConfig(**preference.options(tmp_path), prev_betas=[0.1])
    with pytest.raises(ValueError, match="also the reference of this round"):
        SPOTrainer(
            preference.folder(1),
            args=args,
            train_dataset=preference.rows(4),
            peft_config=LoraConfig(r=2),
            prev_policies=[None],
        )
