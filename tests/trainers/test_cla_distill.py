import json

import pytest
import torch

from hf_ext import convert_to_cla
from hf_ext.testing import assert_close, ragged_batch, tiny_model

pytest.importorskip("accelerate")

from hf_ext.divergence import distillation_kl
from hf_ext.trainers.cla_distill import CLADistillTrainer, counted_tokens, freeze_all_but
from hf_ext.trainers.cla_distill_config import CLADistillArguments
from hf_ext.trainers.cla_heal import heal

TEXT = torch.randint(3, 128, (4000,), generator=torch.Generator().manual_seed(0))
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
WHOLE = {**QUIET, "layer_tokens": 0}  # without healing layer by layer first


@pytest.fixture(scope="module")
def teacher():
    """A tiny model whose predictions hang on its attention."""
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.data.mul_(8 if "self_attn" in name or "lm_head" in name else 1)
    return model


def kl(student, teacher):
    ids = TEXT[None, 17:81]
    with torch.no_grad():
        mask = torch.ones_like(ids, dtype=torch.bool)
        return distillation_kl(student(ids).logits, teacher(ids).logits, mask, 1.0).item()


@pytest.mark.parametrize("weights", [{}, {"hidden_weight": 0.5}, {"kl_weight": 0.0, "label_weight": 1.0}])
def test_healing_brings_the_student_nearer(teacher, tmp_path, weights):
    student = convert_to_cla(teacher, {"sharing_factor": 2})
    before, frozen = kl(student, teacher), student.model.layers[0].mlp.up_proj.weight.clone()
    trainer = heal(
        student, teacher, TEXT, tmp_path, tokens=64 * 40, length=64, rows=2, learning_rate=3e-3, **WHOLE, **weights
    )
    assert weights.get("kl_weight") == 0.0 or kl(student, teacher) < 0.75 * before
    assert torch.equal(frozen, student.model.layers[0].mlp.up_proj.weight)
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_an_interrupted_healing_goes_on_as_if_it_had_not_been(teacher, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 4

    options = {"tokens": 64 * 8, "length": 64, "layer_tokens": 256, "passes": 2, **QUIET}
    whole = convert_to_cla(teacher, {"sharing_factor": 2})
    heal(whole, teacher, TEXT, tmp_path / "whole", **options)
    first = convert_to_cla(teacher, {"sharing_factor": 2})
    heal(first, teacher, TEXT, tmp_path / "parts", callbacks=[Stop()], **options)
    second = convert_to_cla(teacher, {"sharing_factor": 2})
    heal(second, teacher, TEXT, tmp_path / "parts", **options)
    for name, parameter in whole.named_parameters():
        assert_close(name, parameter, second.get_parameter(name), 1e-6)


def test_the_teacher_stays_and_is_not_saved(teacher, tmp_path):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = convert_to_cla(teacher, {"sharing_factor": 2})
    trainer = heal(student, teacher, TEXT, tmp_path, tokens=64 * 4, length=64, save_steps=2, **WHOLE)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    trainer.save_model(str(tmp_path / "final"))
    saved = json.loads((tmp_path / "final" / "config.json").read_text())
    assert saved["fusion_config"]["hf_ext"]["cla"]["sharing_factor"] == 2
    assert not [name for name in trainer.model.state_dict() if "teacher" in name]


def test_what_is_trained(teacher):
    student = convert_to_cla(teacher, {"kv_source_layers": [0, 1, 1, 3]})
    changed = freeze_all_but(student, "changed")
    assert {name.split(".")[2] for name in changed} == {"1", "2"}
    assert any("input_layernorm" in name for name in changed) and not any("mlp" in name for name in changed)
    assert len({name.split(".")[2] for name in freeze_all_but(student, "attention") if "layers" in name}) == 4
    assert len(freeze_all_but(student, "all")) == len(list(student.parameters()))


def test_padding_and_prompts_do_not_count():
    batch = ragged_batch([4, 2])
    labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, -100, 9]])
    counted = counted_tokens(batch["input_ids"], batch["attention_mask"], labels)
    assert counted.tolist() == [[True, True, True, False], [False, False, True, False]]
    assert counted_tokens(batch["input_ids"], None, None).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"kl_weight": -1.0}, "The loss weights must not be negative"),
        ({"kl_weight": 0.0}, "and one of them above 0"),
        ({"trainable": "mlp"}, "trainable must be one of changed, attention, all, got 'mlp'"),
    ],
)
def test_wrong_arguments(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        CLADistillArguments(str(tmp_path), **options)


def test_wrong_pairs(teacher, tmp_path):
    with pytest.raises(ValueError, match="needs a model in which layers share"):
        CLADistillTrainer(teacher, teacher, CLADistillArguments(str(tmp_path), **QUIET))
    other = tiny_model("llama", vocab_size=100)
    with pytest.raises(ValueError, match="one vocabulary, got 128 and 100"):
        CLADistillTrainer(convert_to_cla(teacher, {}), other, CLADistillArguments(str(tmp_path), **QUIET))
    with pytest.raises(ValueError, match="at least one step of 1 x 512 tokens, got a text of 100 tokens"):
        heal(convert_to_cla(teacher, {}), teacher, TEXT[:100], tmp_path, tokens=5000)


def test_trl_sft_trains_it(tmp_path):
    """TRL's SFTTrainer on a shared model, with its own defaults (gradient checkpointing on)."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    student = tiny_model("llama", hf_ext={"cla": {"sharing_factor": 2}})
    before = student.model.layers[0].self_attn.k_proj.weight.clone()
    rows = datasets.Dataset.from_dict({"input_ids": TEXT[:1280].view(20, 64).tolist()})
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **QUIET,
    )

    from tokenizers import Tokenizer as Fast
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(128)}
    raw = Fast(models.WordLevel(words, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w2")
    trainer = trl.SFTTrainer(student, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(before, student.model.layers[0].self_attn.k_proj.weight)
