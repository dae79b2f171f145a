import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ext import ReALLMConfig
from hf_ext.quant.adapter import low_rank_to_adapter
from hf_ext.quant.distill import DistillOptions, distill
from hf_ext.quant.integrity import bits_on_disk
from hf_ext.quant.linear import quantized_layers
from hf_ext.testing import tiny_model

IDS = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(4))
SHORT = {"windows": 6, "window_length": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("distill")
    tiny_model().save_pretrained(path / "plain")
    config = ReALLMConfig(bits=2, rank=4)
    AutoModelForCausalLM.from_pretrained(path / "plain", quantization_config=config).save_pretrained(path / "base")
    return path


def student(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


@torch.no_grad()
def gap(model, teacher):
    a, b = (m(IDS).logits.log_softmax(-1) for m in (model, teacher))
    return float((b.exp() * (b - a)).sum(-1).mean())


STORED = {
    "low_rank": ("lr_a", "lr_b", "lr_scale"),
    "scales": ("proj.scales", "sparse_values"),
    "norms": ("norm.weight",),
}


@pytest.mark.parametrize("train", [("low_rank",), ("scales",), ("norms",), ("low_rank", "scales", "norms")])
@pytest.mark.parametrize("stages", [{"block_epochs": 4, "steps": 0}, {"block_epochs": 0, "steps": 30}])
def test_each_stage_brings_the_student_nearer_and_changes_what_it_was_told_to(folder, stages, train):
    model, teacher = student(folder), tiny_model()
    before = gap(model, teacher)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("sparse_values") for name in kept)
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    options = DistillOptions(train, **stages, **SHORT, lr=5e-3, block_lr=5e-3, relative_lr=1e-2)
    distill(model, teacher, IDS, options=options, progress=False)
    assert gap(model, teacher) < (0.8 if "low_rank" in train else 0.97) * before
    after = model.state_dict()
    assert sorted(after) == sorted(kept)
    trained = tuple(name for kind in train for name in STORED[kind])
    outside = ("model.norm.weight",) if stages["steps"] == 0 else ()  # the norm after the last block
    for name, tensor in after.items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name]) != (name.endswith(trained) and name not in outside), name
    assert needed == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        layer.decode_mode == "on_the_fly" and not layer._forward_hooks for layer in quantized_layers(model).values()
    )
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), tiny_model().parameters(), strict=True))


def test_a_healed_model_is_saved_at_not_a_bit_more(folder, tmp_path):
    model = student(folder)
    distill(model, tiny_model(), IDS, options=DistillOptions(block_epochs=0, steps=6, **SHORT), progress=False)
    model.save_pretrained(tmp_path / "healed")
    assert bits_on_disk(tmp_path / "healed")["linear"] == bits_on_disk(folder / "base")["linear"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_adapter_taken_from_a_healed_model_loads_on_its_base(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = student(folder)
    distill(model, tiny_model(), IDS, options=DistillOptions(block_epochs=0, steps=6, **SHORT), progress=False)
    healed = model(IDS).logits
    wrapped = low_rank_to_adapter(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = wrapped.unload()
    base.save_pretrained(tmp_path / "base")
    assert not torch.allclose(base(IDS).logits, healed, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, healed, rtol=1e-4, atol=1e-5)


def test_bfloat16_trains_too_and_keeps_the_stored_types(folder):
    config = ReALLMConfig(bits=1, rank=8)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    before = gap(model, tiny_model())
    options = DistillOptions(block_epochs=0, steps=30, lr=3e-4, precision="bfloat16", **SHORT)
    distill(model, tiny_model(), IDS, options=options, progress=False)
    assert gap(model, tiny_model()) < 0.8 * before
    assert types == {name: tensor.dtype for name, tensor in model.state_dict().items()}


def test_the_loss_is_the_divergence(folder):
    model, teacher = student(folder), tiny_model()
    expected = gap(model, teacher)
    losses = distill(
        model,
        teacher,
        IDS,
        options=DistillOptions(block_epochs=0, steps=6, lr=1e-12, relative_lr=1e-12, **SHORT),
        progress=False,
    )
    assert sum(losses) / 6 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stop", [3, 9])
@pytest.mark.parametrize("same", [False, True])  # with the model of the interrupted run, or with one loaded again
def test_an_interrupted_run_goes_on_to_the_same_result(folder, tmp_path, stop, same, monkeypatch):
    options = DistillOptions(block_epochs=1, steps=8, save_every=2, **SHORT)
    whole, resumed, teacher = student(folder), student(folder), tiny_model()
    losses = distill(whole, teacher, IDS, options=options, progress=False)

    import hf_ext.quant.distill as module

    calls, save = [], module._Run.save

    def interrupted(run):
        save(run)
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._Run, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(resumed, teacher, IDS, options=options, folder=tmp_path, progress=False)
    untouched, base = resumed.state_dict(), student(folder).state_dict()
    assert untouched.keys() == base.keys() and all(torch.equal(untouched[name], base[name]) for name in base)
    model = resumed if same else student(folder)
    again = distill(model, teacher, IDS, options=options, folder=tmp_path, progress=False)
    assert again == pytest.approx(losses)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="belongs to another model, or this one was healed since"):
        distill(model, teacher, IDS, options=options, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="use another folder"):
        distill(student(folder), teacher, IDS, options=DistillOptions(steps=9, **SHORT), folder=tmp_path)


def test_what_cannot_be_trained_is_refused(folder):
    with pytest.raises(ValueError, match="has no low-rank term to train"):
        distill(tiny_model(), tiny_model(), IDS)
    with pytest.raises(ValueError, match=r"at least \[32, 512\]"):
        distill(student(folder), tiny_model(), IDS)
    with pytest.raises(ValueError, match="lr must be above 0, got 0"):
        DistillOptions(lr=0)
    with pytest.raises(ValueError, match="train must name some of low_rank, scales, norms, got \\['codes'\\]"):
        DistillOptions(train=("codes",))
    with pytest.raises(ValueError, match="steps must be a whole number, at least 0, got -1"):
        DistillOptions(steps=-1)
