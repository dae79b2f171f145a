"""A table of ways to use `trl.DPOTrainer`, each run with DPOTrainer itself, SPO in rounds 1 and 2, and ADPO."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_ext.data.preference_toy import tiny_llama
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def spo_round_two(model, args, preference, **kwargs):
    """Round 2 as a script would write it: pi_0 is another folder, or the adapters' own base."""
    policies = None if isinstance(model, PeftModel) else [preference.folder(2)]
    return SPOTrainer(model, args=args, prev_policies=policies, **kwargs)


TRAINERS = {
    "DPO": (lambda model, args, preference, **kw: DPOTrainer(model, args=args, **kw), DPOConfig, {}),
    "SPO round 1": (lambda model, args, preference, **kw: SPOTrainer(model, args=args, **kw), SPOConfig, {}),
    "SPO round 2": (spo_round_two, SPOConfig, {"prev_betas": [0.1]}),
    "ADPO": (lambda model, args, preference, **kw: ADPOTrainer(model, args=args, **kw), ADPOConfig, {}),
}


def load(preference):
    return AutoModelForCausalLM.from_pretrained(preference.folder(1))


def messages(rows):
    """The same rows as conversations."""

    def convert(row):
        chat = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected", "toxic")}
        return {"prompt": [{"role": "user", "content": row["prompt"]}], **chat}

    return Dataset.from_list([convert(row) for row in rows])


def implicit(rows):
    """Prompts inside the responses."""
    names = ("chosen", "rejected", "toxic")
    return rows.map(lambda row: {n: "w1 w2 " + row["prompt"] + row[n] for n in names}).remove_columns("prompt")


class Seen(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        Seen.steps += 1


class Int8Linear(nn.Linear):
    """A linear layer whose stored weight is int8 codes with one scale a row: what a quantised base looks like."""

    def __init__(self, source: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        scale = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((source.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def int8_base(preference):
    model = load(preference)
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
    return model


def bitsandbytes_base(preference):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(preference.folder(1, 64), quantization_config=config)  # 64: one block


def experts(preference):
    """A mixture of experts, whose router adds a loss of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=len(preference.tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    torch.manual_seed(1)
    return MixtralForCausalLM(config)


def reallm_config():
    from hf_ext.quant.config import ReALLMConfig

    return ReALLMConfig(bits=4, rank=2)


def reallm_base(preference):
    return AutoModelForCausalLM.from_pretrained(preference.folder(1, 64), quantization_config=reallm_config())


# A quantised base and how to build it; the trainers see nothing of the kind of quantiser.
QUANTIZED = {"int8 linear": int8_base, "bitsandbytes 4-bit": bitsandbytes_base, "ReALLM": reallm_base}

# Usage -> changes to (model, arguments, trainer options, dataset); each a function of the fixtures where it must be.
USAGES = {
    "model as str": {},
    "model as instance": {"model": load},
    "model in memory only": {"model": lambda p: tiny_llama(p.tokenizer, seed=1)},
    "explicit ref_model": {"model": load, "kwargs": lambda p: {"ref_model": load(p)}},
    "mixture of experts": {"model": experts, "kwargs": lambda p: {"ref_model": experts(p)}},
    "peft_config": {"kwargs": {"peft_config": LORA}},
    "PeftModel": {"model": lambda p: get_peft_model(load(p), LORA)},
    **{
        f"quantised base, {name}": {"model": lambda p, base=base: get_peft_model(base(p), LORA)}
        for name, base in QUANTIZED.items()
    },
    "quantised from a path": {"kwargs": lambda p: {"quantization_config": reallm_config(), "peft_config": LORA}},
    "conversational": {"data": messages},
    "implicit prompt": {"data": implicit},
    "streaming": {"data": lambda rows: rows.to_iterable_dataset()},
    "dict of eval datasets": {"kwargs": lambda p: {"eval_dataset": {"a": p.rows(6, 1), "b": p.rows(6, 2)}}},
    "gradient accumulation": {"args": {"gradient_accumulation_steps": 2}},
    "gradient checkpointing, bf16": {"args": {"gradient_checkpointing": True, "bf16": True}},
    "precomputed reference": {"args": {"precompute_ref_log_probs": True}},
    "precomputed reference, PEFT": {"args": {"precompute_ref_log_probs": True}, "kwargs": {"peft_config": LORA}},
    "loss mix": {"args": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}},
    "robust loss": {"args": {"loss_type": "robust", "label_smoothing": 0.1}},
    "hinge loss": {"args": {"loss_type": "hinge"}},
    "WPO weighting": {"args": {"use_weighting": True}},
    "pad to a multiple": {"args": {"pad_to_multiple_of": 8}},
    "short max_length": {"args": {"max_length": 9}},
    "all columns kept": {"args": {"remove_unused_columns": False}},
    "own TRL collator": {"kwargs": {"data_collator": DataCollatorForPreference(pad_token_id=0)}},
    "callback": {"kwargs": {"callbacks": [Seen()]}},
    "compute_metrics": {
        "kwargs": lambda p: {"compute_metrics": lambda prediction: {"n": 1.0}, "eval_dataset": p.rows(4, 1)}
    },
    "plain DPOConfig": {"config": DPOConfig},
    "model_init_kwargs": {"args": {"model_init_kwargs": {"attn_implementation": "eager"}}},
}
# A plain DPOConfig says nothing of a second round.
SKIPPED = {("plain DPOConfig", "SPO round 2")}


# Round 1 runs DPOTrainer's own code (test_spo_trainer.py compares the bits); it and DPOTrainer are the slow half.
HALVES = [pytest.param(name, marks=pytest.mark.slow) if name in ("DPO", "SPO round 1") else name for name in TRAINERS]


@pytest.mark.parametrize("trainer", HALVES)
@pytest.mark.parametrize("usage", USAGES)
def test_usage(preference, tmp_path, usage, trainer):
    if (usage, trainer) in SKIPPED:
        pytest.skip("DPOConfig has no options for a second round")
    build, config, own = TRAINERS[trainer]
    case = USAGES[usage]
    model = case["model"](preference) if "model" in case else preference.folder(1)
    if trainer == "DPO" and usage == "model in memory only":
        pytest.skip("DPOTrainer itself cannot re-load a reference that was never saved")
    options = preference.options(tmp_path, **case.get("args", {}))
    args = case["config"](**options) if "config" in case else config(**options, **own)
    kwargs = case.get("kwargs", {})
    kwargs = kwargs(preference) if callable(kwargs) else kwargs
    rows = case["data"](preference.rows(12)) if "data" in case else preference.rows(12)
    run = build(model, args, preference, train_dataset=rows, **{"processing_class": preference.tokenizer, **kwargs})
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(map(math.isfinite, logged))
    assert any(not torch.equal(p, before[n]) for n, p in run.model.named_parameters() if n in before)
    if "eval_dataset" in kwargs:
        metrics = run.evaluate()
        assert "eval_rewards/margins" in metrics
        assert not isinstance(kwargs["eval_dataset"], dict) or {"eval_a_loss", "eval_b_loss"} <= set(metrics)


@pytest.mark.parametrize("trainer", ["SPO round 2", "ADPO"])
def test_raw_data_can_be_evaluated_after_training(preference, tmp_path, trainer):
    build, config, own = TRAINERS[trainer]
    run = build(
        preference.folder(1),
        config(**preference.options(tmp_path), **own),
        preference,
        train_dataset=preference.rows(),
    )
    run.train()
    assert math.isfinite(run.evaluate(preference.rows(4, 3))["eval_loss"])


def test_conversations_score_as_their_rendered_text(preference, tmp_path):
    """The chat template's own text, given as plain prompt and responses, gives the same loss."""
    rows = preference.rows(4).map(lambda row: {n: row[n].strip() for n in ("chosen", "rejected", "toxic")})
    plain = rows.map(
        lambda row: {
            "prompt": f"<user> {row['prompt']} <assistant>",
            **{n: f" {row[n]} </s>" for n in ("chosen", "rejected", "toxic")},
        }
    )
    losses = []
    for data in (messages(rows), plain):
        run = ADPOTrainer(
            preference.folder(1),
            args=ADPOConfig(**preference.options(tmp_path, toxic_reference="ref")),
            train_dataset=data,
            processing_class=preference.tokenizer,
        )
        batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
        losses.append(run.compute_loss(run.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
