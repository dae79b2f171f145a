"""The two silent traps of TRL 1.16 (a re-loaded reference, a bypassed quantised head) and what is relied on of it."""

import inspect
import math

import pytest
import torch
from torch import nn

pytest.importorskip("trl")
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl import __version__ as trl_version

from hf_ext.data.preference_toy import tiny_llama
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.preference_config import LOSS_TYPES
from hf_ext.trainers.preference_scoring import (
    completion_logps,
    effective_weight,
    frozen_copy,
    head_hides_its_weight,
    reload_would_differ,
    sum_logps,
)
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

CLASSES = {"SPO": (SPOTrainer, SPOConfig), "ADPO": (ADPOTrainer, ADPOConfig)}


class CodesHead(nn.Linear):
    """A head that stores int8 codes in ``weight`` and scales them in its forward."""

    def __init__(self, source: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = source.in_features, source.out_features, None
        self.scale = (source.weight.detach().abs().max() / 127).item()
        self.weight = nn.Parameter((source.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def with_quantized_head(preference):
    model = tiny_llama(preference.tokenizer, seed=1)
    model.lm_head = CodesHead(model.lm_head)
    return model


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def build(cls, config, model, preference, output, **options):
    args = config(**preference.options(output, **options))
    return cls(model, args=args, train_dataset=preference.rows(8), processing_class=preference.tokenizer)


def raw_logps(model, batch) -> torch.Tensor:
    """Completion log-probabilities from the model's own logits."""
    with torch.no_grad():
        logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    taken = logps[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (taken * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("name", CLASSES)
def test_reference_keeps_the_flags_of_an_instance(preference, tmp_path, name):
    """At the start the policy is its own reference, so every reward is 0; DPOTrainer re-loads without the flag."""
    flags = {"cla": {"sharing_factor": 2}}

    def policy():
        return AutoModelForCausalLM.from_pretrained(preference.folder(1), hf_ext=flags)

    ours = build(*CLASSES[name], policy(), preference, tmp_path)
    assert ours.ref_model.config.hf_ext is not None
    batch = {k: v for k, v in first_batch(ours).items() if k in ("input_ids", "attention_mask", "completion_mask")}
    torch.testing.assert_close(raw_logps(ours.ref_model, batch), raw_logps(ours.model, batch))
    theirs = build(DPOTrainer, DPOConfig, policy(), preference, tmp_path)
    assert not torch.allclose(raw_logps(theirs.ref_model, batch), raw_logps(theirs.model, batch), atol=1e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_reference_is_the_weights_in_memory_and_stays_frozen(preference, tmp_path, name):
    trainer = build(*CLASSES[name], tiny_llama(preference.tokenizer, seed=4), preference, tmp_path)
    before = {key: value.clone() for key, value in trainer.ref_model.state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.ref_model.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", CLASSES)
def test_stored_references_need_no_copy(preference, tmp_path, name):
    model = tiny_llama(preference.tokenizer, seed=4)
    online, stored = (
        build(*CLASSES[name], frozen_copy(model).requires_grad_(), preference, tmp_path, precompute_ref_log_probs=kept)
        for kept in (False, True)
    )
    online.train()
    stored.train()
    assert online.ref_model is not None and stored.ref_model is None
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (online, stored)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_quantizer_flag_and_missing_path_call_for_a_copy(preference):
    model = AutoModelForCausalLM.from_pretrained(preference.folder(1))
    assert not reload_would_differ(model) and not reload_would_differ(preference.folder(1))
    model.hf_quantizer = object()
    assert reload_would_differ(model)
    assert reload_would_differ(tiny_llama(preference.tokenizer))


def test_copy_of_a_trained_model_answers_with_its_own_weights(preference, tmp_path):
    """A fused forward closes over its model; a plain deep copy would go on answering with the original's weights."""
    trained = build(SPOTrainer, SPOConfig, preference.folder(1), preference, tmp_path).model
    copied = frozen_copy(trained)
    ids = torch.tensor([[7, 8, 9]])
    expected = copied(input_ids=ids).logits
    torch.testing.assert_close(expected, trained(input_ids=ids).logits)
    with torch.no_grad():
        trained.lm_head.weight.zero_()
    torch.testing.assert_close(copied(input_ids=ids).logits, expected)
    assert "fused_lm_head" in trained.forward.__code__.co_varnames


@pytest.mark.parametrize("name", CLASSES)
def test_quantized_head_is_scored_as_it_computes(preference, tmp_path, name):
    trainer = build(*CLASSES[name], with_quantized_head(preference), preference, tmp_path)
    batch = {k: v for k, v in first_batch(trainer).items() if k in ("input_ids", "attention_mask", "completion_mask")}
    expected = raw_logps(trainer.model, batch)
    torch.testing.assert_close(completion_logps(trainer.model, batch).detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(completion_logps(trainer.ref_model, batch).detach(), expected, rtol=1e-4, atol=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    theirs = DPOTrainer(
        with_quantized_head(preference),
        with_quantized_head(preference),
        DPOConfig(**preference.options(tmp_path)),
        train_dataset=preference.rows(8),
        processing_class=preference.tokenizer,
    )
    rows = {name: value[:8] for name, value in batch.items()}
    try:
        bypassed = completion_logps(theirs.model, rows)
    except RuntimeError:
        return  # refused by the matrix product is not silent
    assert (bypassed - raw_logps(theirs.model, rows)).abs().max() > 1


def test_gradient_through_a_quantized_head_is_the_models_own(preference, tmp_path):
    trainer = build(SPOTrainer, SPOConfig, with_quantized_head(preference), preference, tmp_path)
    batch = {k: v for k, v in first_batch(trainer).items() if k in ("input_ids", "attention_mask", "completion_mask")}
    weight = trainer.model.model.norm.weight
    completion_logps(trainer.model, batch).sum().backward()
    fused, weight.grad = weight.grad.clone(), None
    logps = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    taken = logps[:, :-1].gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    (taken * batch["completion_mask"][:, 1:]).sum().backward()
    torch.testing.assert_close(fused, weight.grad, rtol=1e-3, atol=1e-4)


def test_which_heads_hide_their_weight():
    plain = nn.Linear(4, 6)
    assert not head_hides_its_weight(plain)
    assert head_hides_its_weight(CodesHead(nn.Linear(4, 6, bias=False)))

    class Wrapped(nn.Linear):
        pass

    assert not head_hides_its_weight(Wrapped(4, 6))
    tokenizer_free = nn.Embedding(3, 4)
    config = type("Config", (), {"get_text_config": lambda self: type("T", (), {"hidden_size": 4})()})()
    weight, bias = effective_weight(plain, tokenizer_free, config)
    torch.testing.assert_close(weight, plain.weight.detach(), rtol=1e-6, atol=1e-6)
    assert bias is plain.bias


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4, 1.0])
def test_sums_equal_trls(preference, tmp_path, ld_alpha):
    trainer = build(SPOTrainer, SPOConfig, preference.folder(1), preference, tmp_path, ld_alpha=ld_alpha)
    batch = first_batch(trainer)
    expected = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    torch.testing.assert_close(completion_logps(trainer.ref_model, batch, ld_alpha).detach(), expected)


def test_tokens_beyond_the_shared_length_weigh_ld_alpha():
    mask = torch.tensor([[0, 1, 0], [0, 1, 1]])
    assert sum_logps(mask.float(), mask, 0.5).tolist() == [1.0, 1.5]


def test_what_is_relied_on_of_trl():
    """TRL 1.14 to 1.16; written for 1.16.0. A change of any of these names needs a look at the trainers."""
    from trl.data_utils import _tokenize, common_prefix_length, extract_prompt, is_conversational  # noqa: F401
    from trl.models.utils import disable_gradient_checkpointing  # noqa: F401
    from trl.trainer.utils import add_fused_lm_head, hash_module, pad, use_adapter  # noqa: F401

    source = inspect.getsource(DPOTrainer)
    for text in (
        "outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)",
        "if self.precompute_ref_logps:",
        'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]',
        "self._precompute_model_hash",
        "model = self.ref_model or self.model",
    ):
        assert text in source, f"TRL {trl_version} no longer has: {text}"
    assert all(f'loss_type == "{name}"' in source for name in LOSS_TYPES)
    assert source.count('loss_type == "') == len(LOSS_TYPES), f"TRL {trl_version} has other losses than LOSS_TYPES"
    for name in ("_compute_loss", "compute_ref_log_probs", "_precompute_ref_logps", "_prepare_dataset"):
        assert callable(getattr(DPOTrainer, name))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.remove_columns("chosen"), "no column 'chosen'"),
        (
            lambda rows: rows.map(lambda row, i: {"rejected": "" if i == 3 else row["rejected"]}, with_indices=True),
            "row 3 .* 'rejected'",
        ),
        (lambda rows: rows.map(lambda row: {"prompt": " ".join(["w1"] * 50)}), "max_length=40"),
        (lambda rows: rows.map(lambda row: {"chosen": "  "}).to_iterable_dataset(), "'chosen'"),
    ],
)
def test_bad_rows_are_refused_before_any_step(preference, tmp_path, name, change, words):
    cls, config = CLASSES[name]
    with pytest.raises(ValueError, match=words):
        cls(
            preference.folder(1),
            args=config(**preference.options(tmp_path, max_length=40)),
            train_dataset=change(preference.rows(6)),
        )


@pytest.mark.parametrize("name", CLASSES)
def test_some_long_prompts_are_dropped_with_a_sentence(preference, tmp_path, name, caplog):
    rows = preference.rows(6).map(
        lambda row, i: {"prompt": " ".join(["w1"] * 50) if i == 2 else row["prompt"]}, with_indices=True
    )
    cls, config = CLASSES[name]
    trainer = cls(preference.folder(1), args=config(**preference.options(tmp_path, max_length=40)), train_dataset=rows)
    assert len(trainer.train_dataset) == 5
    assert "1 of the 6 rows of the train dataset" in caplog.text


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("adapter", "words"), [("ref", "kept for the frozen copy"), ("mine", "no adapter named")])
def test_reserved_and_missing_adapter_names(preference, tmp_path, name, adapter, words):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(preference.folder(1)), lora, adapter_name=adapter)
    if adapter == "ref":
        model.add_adapter("default", lora)
    with pytest.raises(ValueError, match=words):
        build(*CLASSES[name], model, preference, tmp_path)


def test_loss_starts_at_log_two(preference, tmp_path):
    trainer = build(SPOTrainer, SPOConfig, tiny_llama(preference.tokenizer), preference, tmp_path)
    assert trainer.compute_loss(trainer.model, first_batch(trainer)).item() == pytest.approx(math.log(2), abs=1e-6)
