import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ext import ReALLMConfig, install, uninstall
from hf_ext.quant.adapter import adapter_to_low_rank, low_rank_to_adapter, prepare_for_training
from hf_ext.quant.linear import ReALLMLinear, quantized_layers
from hf_ext.testing import ragged_batch, tiny_model

peft = pytest.importorskip("peft")
ReALLMLoraLinear = pytest.importorskip("hf_ext.patches.reallm_lora").ReALLMLoraLinear
IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reallm")
    tiny_model().save_pretrained(path / "plain")
    config = ReALLMConfig(bits=3, rank=3)
    AutoModelForCausalLM.from_pretrained(path / "plain", quantization_config=config).save_pretrained(path / "base")
    return path


@pytest.fixture
def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def logits(model):
    with torch.no_grad():
        return model(**ragged_batch([9, 5])).logits


def randomised(model, seed=0):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_a_fresh_adapter_starts_as_the_base_and_comes_back_from_disk(base, folder, tmp_path, dora, targets):
    before = logits(base)
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    assert sum(type(module).__name__ == "ReALLMLoraLinear" for module in model.modules()) == (
        28 if targets == "all-linear" else 8
    )
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-3)
    expected = logits(randomised(model))
    assert (expected - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_the_low_rank_term_becomes_an_adapter_and_back(base, folder, tmp_path):
    expected = logits(base)
    model = low_rank_to_adapter(base)
    assert all(layer.shape.rank == 0 for layer in quantized_layers(model).values())
    assert all(module.scaling == {"default": 1} for module in model.modules() if isinstance(module, ReALLMLoraLinear))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    stripped = model.unload()
    stripped.save_pretrained(tmp_path / "codes")
    assert (logits(stripped) - expected).abs().max() > 1e-4
    codes = AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    again = peft.PeftModel.from_pretrained(codes, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(adapter_to_low_rank(again)), expected, atol=1e-5, rtol=1e-4)


def test_ranks_may_differ_between_layers(base):
    layers = list(quantized_layers(base).values())
    layers[0].set_low_rank(None, None)
    layers[1].set_low_rank(torch.randn(5, layers[1].in_features), torch.randn(layers[1].out_features, 5) * 0.01)
    expected = logits(base)
    model = low_rank_to_adapter(base)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_a_plain_adapter_merges_without_loss_and_comes_off_again(base, tmp_path):
    before = logits(base)
    kept = {
        name: {part: tensor.clone() for part, tensor in layer.parts.items()}
        for name, layer in quantized_layers(base).items()
    }
    model = randomised(peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")))
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, atol=2e-5, rtol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    for name, layer in quantized_layers(model).items():
        original = kept[name.removeprefix("base_model.model.").removesuffix(".base_layer")]
        assert layer.parts.keys() == original.keys()
        assert all(torch.equal(tensor, original[part]) for part, tensor in layer.parts.items())
    merged = model.merge_and_unload()
    assert all(type(module) is not torch.nn.Linear or name == "lm_head" for name, module in merged.named_modules())
    torch.testing.assert_close(logits(merged), adapted, atol=2e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged), atol=0, rtol=0)


def test_two_adapters_can_be_switched(base):
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    randomised(model)
    first = logits(model)
    model.set_adapter("b")
    second = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), first) and not torch.equal(first, second)


def test_what_cannot_be_done_is_refused_and_changes_nothing(base):
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the base weight"):
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))


def test_dora_is_not_merged(base):
    model = randomised(peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], use_dora=True)))
    expected = logits(model)
    with pytest.raises(ValueError, match="DoraLinearVariant, which is no low-rank term, so it cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


def test_a_broken_adapter_is_not_merged_safely(base):
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds values that are not finite"):
        model.merge_and_unload(safe_merge=True)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "labels": IDS[index]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains_the_low_rank_term_alone(base, tmp_path, checkpointing):
    model = prepare_for_training(low_rank_to_adapter(base), gradient_checkpointing=checkpointing)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=5e-2, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1,
        gradient_checkpointing=checkpointing, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name


def test_checkpointing_gives_the_same_gradients(base):
    model = prepare_for_training(low_rank_to_adapter(base)).train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for expected, actual in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_sft_trainer_accepts_it(base, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    trainer = trl.SFTTrainer(low_rank_to_adapter(base), arguments, train_dataset=rows, processing_class=tokenizer)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def test_buckets_train_it(base, tmp_path):
    datasets = pytest.importorskip("datasets")
    from hf_ext import BucketedTrainer, BucketedTrainingArguments

    model = prepare_for_training(low_rank_to_adapter(base))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = BucketedTrainingArguments(
        str(tmp_path), bucket_min_length=8, bucket_max_length=16, bucket_cycles=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=1, max_steps=3,
    )  # fmt: skip
    documents = datasets.Dataset.from_dict(
        {"input_ids": [row[:length].tolist() for row in IDS for length in (11, 16)]}
    )
    BucketedTrainer(model, arguments, train_dataset=documents).train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name


def test_uninstalling_gives_peft_its_own_function_back(base):
    import peft.tuners.lora.model as host

    wrapped = host.dispatch_default
    uninstall()
    try:
        assert host.dispatch_default is not wrapped and host.dispatch_default.__module__ == "peft.tuners.lora.layer"
    finally:
        install()
    assert isinstance(next(iter(quantized_layers(base).values())), ReALLMLinear)


def test_plain_layers_are_left_to_peft():
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear"


def test_importing_hf_ext_does_not_import_peft():
    code = "import sys, hf_ext; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
