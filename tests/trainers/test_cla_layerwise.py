import pytest
import torch

from hf_ext import convert_to_cla
from hf_ext.divergence import distillation_kl
from hf_ext.testing import FAMILIES, assert_close, tiny_model

pytest.importorskip("accelerate")

from hf_ext.trainers import cla_layerwise
from hf_ext.trainers.cla_layerwise import heal_layerwise

TEXT = torch.randint(3, 128, (2048,), generator=torch.Generator().manual_seed(0))
OPTIONS = {"window": 64, "passes": 3, "learning_rate": 3e-3}


def dense(family):
    """A tiny model whose predictions hang on its attention."""
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            parameter.data.mul_(6)
    return model


@torch.no_grad()
def kl(student, teacher):
    ids = TEXT[None, -100:]
    return distillation_kl(student(ids).logits, teacher(ids).logits, torch.ones_like(ids).bool(), 1.0).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_the_whole_model_come_nearer(family):
    teacher = dense(family)
    student = convert_to_cla(teacher, {"sharing_factor": 2})
    before, frozen = kl(student, teacher), [name for name, _ in student.named_parameters() if "mlp" in name]
    kept = {name: student.get_parameter(name).clone() for name in frozen}
    original = {name: value.clone() for name, value in teacher.state_dict().items()}
    errors = heal_layerwise(student, teacher, TEXT, **OPTIONS)
    assert set(errors[0]) == {0, 1, 2, 3}
    assert sum(errors[-1].values()) < 0.9 * sum(errors[0].values())
    assert kl(student, teacher) < before
    assert all(torch.equal(value, student.get_parameter(name)) for name, value in kept.items())
    assert all(torch.equal(value, original[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_the_error_is_that_of_the_attention_in_its_place():
    """An unconverted consumer that reads what it made itself has no error but rounding."""
    teacher = dense("llama")
    for name in ("k_proj", "v_proj"):  # both layers make the same of the same input
        first, second = (teacher.model.layers[layer].self_attn.get_submodule(name) for layer in (0, 1))
        second.weight.data.copy_(first.weight)
    for silent in (teacher.model.layers[0].self_attn.o_proj, teacher.model.layers[0].mlp.down_proj):
        silent.weight.data.zero_()
    student = convert_to_cla(teacher, {"kv_source_layers": [0, 0, 2, 3]})
    (errors,) = heal_layerwise(student, teacher, TEXT, window=64, passes=1, learning_rate=1e-12)
    assert errors[0] < 1e-4 and errors[1] < 1e-4
    assert_close("logits", teacher(TEXT[None, :50]).logits, student(TEXT[None, :50]).logits, 1e-3)


def test_an_interrupted_healing_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    teacher = dense("qwen3")
    whole, first, second, third = (convert_to_cla(teacher, {"sharing_factor": 2}) for _ in range(4))
    errors = heal_layerwise(whole, teacher, TEXT, **OPTIONS)
    save = cla_layerwise._Healing.save

    def save_and_stop(self, file):
        save(self, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(cla_layerwise._Healing, "save", save_and_stop)
        heal_layerwise(first, teacher, TEXT, folder=tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == [cla_layerwise.FILE]
    assert heal_layerwise(second, teacher, TEXT, folder=tmp_path, **OPTIONS) == errors
    monkeypatch.setattr(cla_layerwise, "observe", None)  # what is done is read back
    assert heal_layerwise(third, teacher, TEXT, folder=tmp_path, **OPTIONS) == errors
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) and torch.equal(value, third.state_dict()[name])


def test_it_leaves_modes_and_frozen_parameters_as_they_were():
    teacher, student = dense("llama").train(), convert_to_cla(dense("llama"), {"sharing_factor": 2}).train()
    student.model.norm.requires_grad_(False)
    heal_layerwise(student, teacher, TEXT[:128], window=64, passes=1)
    assert teacher.training and student.training and not student.model.norm.weight.requires_grad


def test_what_cannot_be_healed():
    teacher = tiny_model("llama")
    with pytest.raises(ValueError, match="at least 512 tokens, got 0 groups and 2048 tokens"):
        heal_layerwise(teacher, teacher, TEXT)
    with pytest.raises(ValueError, match="got 2 groups and 100 tokens"):
        heal_layerwise(convert_to_cla(teacher, {"sharing_factor": 2}), teacher, TEXT[:100])
