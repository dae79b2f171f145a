import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_ext import FAdam, FAdamTrainerMixin, fadam_optimizer
from hf_ext.testing import tiny_model


def rows(n=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 12), generator=generator).tolist() * (n // 2)
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * 12} for row in ids]


def arguments(folder, cls=TrainingArguments, **options):
    common = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 1}
    return cls(str(folder), **{**common, "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 6, **options})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bare(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def test_optimizer_cls_and_kwargs_and_the_name_train_alike(tmp_path):
    results = []
    for options in ({}, {"optim": "fadam"}):
        args = arguments(tmp_path, weight_decay=0.01, **options)
        extra = {} if options else {"optimizer_cls_and_kwargs": fadam_optimizer(args)}
        trainer = Trainer(tiny_model().train(), args, train_dataset=rows(), **extra)
        trainer.train()
        optimizer = bare(trainer)
        assert type(optimizer) is FAdam
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
        assert all(group["initial_lr"] == 1e-2 for group in optimizer.param_groups)
        results.append(losses(trainer))
    assert results[0] == results[1]
    assert results[0][-1] < results[0][0]


@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"optim_args": "optim_bits=8"}], ids=["fp32", "bf16", "8-bit"]
)
def test_resume_is_bit_identical(tmp_path, options):
    def trainer():
        args = arguments(tmp_path, optim="fadam", save_steps=3, **options)
        return Trainer(tiny_model().train(), args, train_dataset=rows())

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_accumulation_and_clipping(tmp_path):
    args = arguments(tmp_path, optim="fadam", gradient_accumulation_steps=2, max_grad_norm=0.5, max_steps=3)
    trainer = Trainer(tiny_model().train(), args, train_dataset=rows())
    trainer.train()
    assert all(state["step"] == 3 for state in bare(trainer).state.values())


@pytest.mark.parametrize("tied", [True, False])
def test_mixin_keeps_decay_off_embeddings(tmp_path, tied):
    class FAdamTrainer(FAdamTrainerMixin, Trainer):
        pass

    model = tiny_model(tie_word_embeddings=tied)
    trainer = FAdamTrainer(model, arguments(tmp_path, weight_decay=0.01), train_dataset=rows())
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is FAdam
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert id(model.model.embed_tokens.weight) not in decayed
    assert (id(model.lm_head.weight) in decayed) is not tied
    assert id(model.model.layers[0].mlp.up_proj.weight) in decayed
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    assert total == len(list(model.parameters()))


def test_mixin_refuses_another_optimizer(tmp_path):
    class FAdamTrainer(FAdamTrainerMixin, Trainer):
        pass

    with pytest.raises(ValueError, match="optim='sgd' contradicts FAdamTrainerMixin"):
        FAdamTrainer(tiny_model(), arguments(tmp_path, optim="sgd"), train_dataset=rows()).create_optimizer()


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{k}": k for k in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def text(seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{k}" for k in torch.randint(3, 128, (n,), generator=generator).tolist())


def test_sft_and_dpo_trainers_of_trl(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class FAdamSFTTrainer(FAdamTrainerMixin, SFTTrainer):
        pass

    class FAdamDPOTrainer(FAdamTrainerMixin, DPOTrainer):
        pass

    sft = Dataset.from_list([{"text": text(k)} for k in range(8)])
    pairs = [{"prompt": text(k), "chosen": " " + text(k + 50), "rejected": " " + text(k + 90)} for k in range(8)]
    tasks = [
        (FAdamSFTTrainer, SFTConfig, sft, {}),
        (SFTTrainer, SFTConfig, sft, {"optim": "fadam"}),
        (FAdamDPOTrainer, DPOConfig, Dataset.from_list(pairs), {}),
        (DPOTrainer, DPOConfig, Dataset.from_list(pairs), {"optim": "fadam"}),
    ]
    for trainer_cls, config_cls, dataset, options in tasks:
        args = arguments(tmp_path, config_cls, max_steps=2, bf16=False, **options)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = trainer_cls(
            tiny_model().train(), args=args, train_dataset=dataset, processing_class=word_tokenizer(), peft_config=lora
        )
        trainer.train()
        assert type(bare(trainer)) is FAdam
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert trained
        assert all(p.isfinite().all() for p in trained)
        assert all(state["step"] == 2 for state in bare(trainer).state.values())
