"""`BucketedTrainer`: one bucket and constant tokens a step, the host's loss, resuming to the bit, bad input."""

import json
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch
from torch import _dynamo
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_linear_schedule_with_warmup

from hf_ext.data.collate import BucketCollator
from hf_ext.data.cost import training_flops
from hf_ext.data.decompose import decompose
from hf_ext.testing import tiny_model
from hf_ext.trainers.bucketed_config import BucketedArguments, BucketedTrainingArguments
from hf_ext.trainers.bucketed_trainer import BucketedTrainer, BucketedTrainerMixin

datasets.disable_progress_bars()
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


def documents(count=30, seed=0, longest=70):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 128, n).tolist() for n in rng.integers(1, longest, count)]
    return datasets.Dataset.from_dict({"input_ids": ids})


def arguments(folder, **options):
    small = {"bucket_min_length": 8, "bucket_max_length": 32, "bucket_cycles": 2, "per_device_train_batch_size": 1}
    return BucketedTrainingArguments(str(folder), **{**QUIET, **small, "learning_rate": 1e-3, **options})


class Recording(BucketedTrainer):
    """Keeps the ids of every micro-batch."""

    def training_step(self, model, inputs, *rest):
        self.seen = [*getattr(self, "seen", []), inputs["input_ids"].clone()]
        return super().training_step(model, inputs, *rest)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_every_step_is_one_bucket_of_constant_tokens(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2, include_num_input_tokens_seen="all")
    trainer = Recording(tiny_model(), args, train_dataset=documents())
    trainer.train()
    steps = trainer.bucket_sampler.steps
    assert trainer.state.global_step == trainer.state.max_steps == 2 * steps > 10
    assert trainer.state.num_input_tokens_seen == 2 * steps * 64
    schedule = np.concatenate([trainer.bucket_sampler.schedule(epoch) for epoch in (0, 1)])
    assert len(set(schedule)) == 3
    for step, length in enumerate(schedule):
        for batch in trainer.seen[2 * step : 2 * step + 2]:
            assert batch.shape == (32 // length, length)
    assert trainer.num_examples(trainer.get_train_dataloader()) == sum(64 // n for n in schedule[:steps])


def test_equals_a_plain_loop_over_the_sampler(tmp_path):
    rows = decompose(documents(), min_length=8, max_length=32)
    args = arguments(tmp_path, gradient_accumulation_steps=2, num_train_epochs=1)
    trainer = BucketedTrainer(tiny_model(), args, train_dataset=rows)
    trainer.train()
    model, sampler = tiny_model().train(), trainer.bucket_sampler
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    schedule = get_linear_schedule_with_warmup(optimizer, 0, sampler.steps)
    for step in range(sampler.steps):
        parts = [BucketCollator()([rows[row] for row in sampler.batch(2 * step + part)]) for part in range(2)]
        targets = sum(part["labels"][:, 1:].numel() for part in parts)
        for part in parts:
            logits = model(input_ids=part["input_ids"]).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, part["labels"][:, 1:].flatten(), reduction="sum")
            (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights(trainer) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("where", ["in the first epoch", "between epochs", "in the second epoch"])
def test_resumes_to_the_bit(tmp_path, accumulation, where):
    data, options = documents(), {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    straight = Recording(tiny_model(), arguments(tmp_path / "a", **options), train_dataset=data)
    straight.train()
    steps = straight.bucket_sampler.steps
    save = {"in the first epoch": steps // 2, "between epochs": steps, "in the second epoch": steps + 2}[where]
    options |= {"save_strategy": "steps", "save_steps": save, "save_total_limit": None}
    stopped = Recording(tiny_model(), arguments(tmp_path / "b", **options), train_dataset=data)
    stopped.train()
    checkpoint = tmp_path / "b" / f"checkpoint-{save}"
    state = json.loads((checkpoint / "bucket_state.json").read_text())
    assert (state["epoch"], state["step"], state["micro_batch"]) == (save // steps, save % steps, 0)
    resumed = Recording(tiny_model(seed=1), arguments(tmp_path / "b", **options), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    left = straight.seen[save * accumulation :]
    assert len(resumed.seen) == len(left) > 0
    assert all(torch.equal(a, b) for a, b in zip(resumed.seen, left, strict=True))
    assert torch.equal(weights(resumed), weights(straight))


def test_a_changed_dataset_or_curriculum_is_refused_on_resume(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    BucketedTrainer(tiny_model(), arguments(tmp_path, **options), train_dataset=documents()).train()
    other = BucketedTrainer(tiny_model(), arguments(tmp_path, **options), train_dataset=documents(seed=1))
    with pytest.raises(ValueError, match=r"The saved order does not fit: .* was .* and is now"):
        other.train(resume_from_checkpoint=True)
    shrink = arguments(tmp_path, bucket_curriculum="shrink-p2", **options)
    with pytest.raises(ValueError, match="curriculum was 'grow-p2' and is now 'shrink-p2'"):
        BucketedTrainer(tiny_model(), shrink, train_dataset=documents()).train(resume_from_checkpoint=True)
    anew = arguments(tmp_path, ignore_data_skip=True, **{**options, "max_steps": 5})
    BucketedTrainer(tiny_model(), anew, train_dataset=documents(seed=1)).train(resume_from_checkpoint=True)
    assert "the epoch's curriculum begins anew" in caplog.text
    (tmp_path / "checkpoint-5" / "bucket_state.json").unlink()
    longer = arguments(tmp_path, **{**options, "max_steps": 6})
    BucketedTrainer(tiny_model(), longer, train_dataset=documents()).train(resume_from_checkpoint=True)
    assert "has no bucket_state.json" in caplog.text


def test_logs_and_flops(tmp_path):
    trainer = Recording(tiny_model(), arguments(tmp_path, logging_steps=3, max_steps=6), train_dataset=documents())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for number, log in enumerate(logs):
        lengths = [batch.shape[1] for batch in trainer.seen[3 * number : 3 * number + 3]]
        assert log["sequence_length"] == pytest.approx(np.mean(lengths))
        assert log["attention_flops"] == 12 * 4 * 64 * 32 * sum(lengths)
        assert log["tokens_per_second"] > 0
        by_length = {int(name[5:]): value for name, value in log.items() if name.startswith("loss_")}
        assert by_length.keys() == set(lengths)
        assert np.mean([by_length[length] for length in lengths]) == pytest.approx(log["loss"], abs=1e-4)
    shape = {int(n): 32.0 * sum(b.shape[1] == n for b in trainer.seen) for n in (8, 16, 32)}
    assert trainer.state.total_flos == pytest.approx(training_flops(tiny_model(), shape), rel=1e-6)


def test_streams(tmp_path):
    data = documents(60)
    options = {"max_steps": 12, "bucket_window_steps": 5, "gradient_accumulation_steps": 2}
    straight = Recording(tiny_model(), arguments(tmp_path, **options), train_dataset=data.to_iterable_dataset())
    straight.train()
    assert len(straight.seen) == 24
    for first, second in zip(straight.seen[::2], straight.seen[1::2], strict=True):
        assert first.shape == second.shape and first.numel() == 32
    options |= {"save_strategy": "steps", "save_steps": 7}
    Recording(tiny_model(), arguments(tmp_path, **options), train_dataset=data.to_iterable_dataset()).train()
    resumed = Recording(tiny_model(), arguments(tmp_path, **options), train_dataset=data.to_iterable_dataset())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.seen, straight.seen[14:], strict=True))
    assert torch.equal(weights(resumed), weights(straight))


def test_workers_do_not_change_a_stream(tmp_path):
    seen = []
    for workers in (0, 2):
        args = arguments(tmp_path, max_steps=6, bucket_window_steps=5, dataloader_num_workers=workers)
        stream = documents(60).to_iterable_dataset(num_shards=2)
        trainer = Recording(tiny_model(), args, train_dataset=stream)
        trainer.train()
        seen.append(trainer.seen)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_a_tokenizers_eos_ends_documents_and_is_learned_even_as_padding(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"</s>": 2, "a": 3}, "a")), eos_token="</s>", pad_token="</s>"
    )
    data = datasets.Dataset.from_dict({"input_ids": [[5] * 7] * 8})
    options = {"bucket_max_length": 8, "max_steps": 1}
    trainer = BucketedTrainer(
        tiny_model(), arguments(tmp_path, **options), train_dataset=data, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [[5] * 7 + [2]] and "attention_mask" not in batch
    off = arguments(tmp_path, bucket_append_eos=False, **options)
    without = BucketedTrainer(tiny_model(), off, train_dataset=data, processing_class=tokenizer)
    assert len(without.bucket_rows()) == 0


def test_positions_in_the_document(tmp_path):
    data = datasets.Dataset.from_dict({"input_ids": [list(range(3, 51))] * 4})
    options = {"bucket_document_positions": True, "bucket_mixture": {16: 1}}
    trainer = BucketedTrainer(tiny_model(), arguments(tmp_path, **options), train_dataset=data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.equal(batch["position_ids"], batch["input_ids"] - 3) and batch["position_ids"][0, 0] == 32
    trainer.train()
    short = tiny_model(max_position_embeddings=32)
    with pytest.raises(ValueError, match="within the model's 32 positions, got a piece that begins at 32"):
        BucketedTrainer(short, arguments(tmp_path, **options), train_dataset=data).train()


def test_evaluation_is_the_hosts(tmp_path):
    held_out = datasets.Dataset.from_dict({"input_ids": [[4, 5, 6, 7]] * 3, "labels": [[4, 5, 6, 7]] * 3})
    ours = BucketedTrainer(tiny_model(), arguments(tmp_path), train_dataset=documents(), eval_dataset=held_out)
    theirs = Trainer(tiny_model(), TrainingArguments(str(tmp_path), **QUIET), eval_dataset=held_out)
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]


def test_a_graph_for_each_length(tmp_path):
    """As many graphs as lengths, however many targets a batch has; and no more of them after resuming."""
    _dynamo.reset()
    counts = _dynamo.utils.counters["stats"]
    options = {"torch_compile": True, "torch_compile_backend": "eager", "bucket_remainder": "pad", "max_steps": 14}
    options |= {"save_strategy": "steps", "save_steps": 7}
    trainer = Recording(tiny_model(), arguments(tmp_path, **options), train_dataset=documents())
    before = counts["unique_graphs"]
    trainer.train()
    assert trainer.accelerator.state.dynamo_plugin.dynamic is False
    assert _dynamo.config.recompile_limit >= 6 + 8
    lengths = {batch.shape[1] for batch in trainer.seen}
    assert len(lengths) == 3
    assert counts["unique_graphs"] - before == len(lengths)
    _dynamo.reset()  # a new process
    resumed = Recording(tiny_model(), arguments(tmp_path, **options), train_dataset=documents())
    before = counts["unique_graphs"]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert len(resumed.seen) == 7
    assert counts["unique_graphs"] - before == len({batch.shape[1] for batch in resumed.seen})
    assert torch.equal(weights(resumed), weights(trainer))


def sft_trainer(tmp_path, data, **options):
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    @dataclass
    class BucketedSFTConfig(BucketedArguments, trl.SFTConfig):
        pass

    class BucketedSFTTrainer(Recording, BucketedTrainerMixin, trl.SFTTrainer):
        pass

    words = Tokenizer(models.WordLevel({"</s>": 2, **{f"w{n}": n for n in range(3, 120)}}, "w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    small = {"bucket_min_length": 8, "bucket_max_length": 32, "per_device_train_batch_size": 2, "max_length": None}
    config = BucketedSFTConfig(
        str(tmp_path), **{**QUIET, **small, "bf16": False, "num_train_epochs": 1, "logging_steps": 1, **options}
    )
    return BucketedSFTTrainer(tiny_model(), args=config, train_dataset=data, processing_class=tokenizer)


def test_sft_trainer_learns_completions_only(tmp_path):
    data = datasets.Dataset.from_list(
        [{"prompt": "w5 " * 4, "completion": " w7" * (9 + n % 20)} for n in range(40) if (n % 20 + 14) % 8 != 1]
    )
    trainer = sft_trainer(tmp_path, data, bucket_remainder="pad")
    trainer.train()
    assert trainer.state.global_step == trainer.bucket_sampler.steps > 3
    assert all(batch.numel() == 64 for batch in trainer.seen)
    rows = trainer.bucket_rows()
    learned = [
        (i, label) for row in rows for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0
    ]
    assert {i for i, _ in learned} == {7, 2} and all(i == label for i, label in learned)
    assert sum(i == 2 for i, _ in learned) == len(data)  # every document's EOS is learned once
    logs = trainer.state.log_history
    assert logs[2]["num_tokens"] == 3 * 64 and "mean_token_accuracy" in logs[2] and "sequence_length" in logs[2]


def test_sft_trainer_on_a_stream(tmp_path):
    rows = [{"prompt": "w5 " * 4, "completion": " w7" * (9 + n % 20)} for n in range(40)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    trainer = sft_trainer(tmp_path, stream, bucket_remainder="pad", bucket_window_steps=4, max_steps=6)
    labels = [batch["labels"] for batch in trainer.get_train_dataloader()]
    assert {int(label) for batch in labels for label in batch.flatten()} == {-100, 7, 2}
    trainer.train()
    assert len(trainer.seen) == 6 and len({batch.shape[1] for batch in trainer.seen}) > 1
    assert all(batch.numel() == 64 for batch in trainer.seen)


def test_answers_that_lose_their_end_are_warned_of(tmp_path, caplog):
    data = datasets.Dataset.from_list([{"prompt": "w5 " * 4, "completion": " w7" * 9} for _ in range(8)])
    rows = sft_trainer(tmp_path, data).bucket_rows()
    assert all(2 not in row for row in rows["labels"])  # 14 tokens with EOS: the last six are dropped
    assert "leaves out the end of nearly every document" in caplog.text
    caplog.clear()
    sft_trainer(tmp_path, data, bucket_remainder="pad").bucket_rows()
    assert not caplog.text


def test_sft_options_that_undo_buckets(tmp_path):
    data = datasets.Dataset.from_list([{"text": "w5 w6"}])
    with pytest.raises(ValueError, match="max_length=1024 would cut documents"):
        sft_trainer(tmp_path, data, max_length=1024)
    with pytest.raises(ValueError, match="packing must be False"):
        sft_trainer(tmp_path, data, packing=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_min_length": 12}, "min_length must be a power of two, got 12"),
        ({"bucket_min_length": 64, "bucket_max_length": 32}, "min_length must not be above max_length"),
        ({"bucket_cycles": 0}, "bucket_cycles must be a positive integer, got 0"),
        ({"bucket_curriculum": "grow"}, "'grow' is no curriculum"),
        ({"bucket_mixture": "even"}, "bucket_mixture must be one of natural, equal or a dict, got 'even'"),
        ({"bucket_mixture": {"a": 1}}, "bucket_mixture must give a number for each length in tokens, got {'a': 1}"),
        ({"bucket_curriculum": '{"8": 1,'}, "bucket_curriculum must give a number for each length in tokens"),
        ({"bucket_odds_mode": "x"}, "bucket_odds_mode must be one of"),
        ({"bucket_remainder": "x"}, "remainder must be one of drop, pad"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be 'random'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches must be off"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches must be off"),
    ],
)
def test_arguments_in_words(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_data_in_words(tmp_path):
    def train(data, model=None, **options):
        BucketedTrainer(model or tiny_model(), arguments(tmp_path, **options), train_dataset=data).train()

    with pytest.raises(ValueError, match="training requires a train_dataset"):
        train(None)
    with pytest.raises(ValueError, match=r"must be a datasets\.Dataset"):
        train([{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="no rows: no document reaches the shortest bucket"):
        train(documents(3, longest=6))
    with pytest.raises(ValueError, match="must not be above the model's 16 positions, got 32"):
        train(documents(), tiny_model(max_position_embeddings=16))
    with pytest.raises(ValueError, match="have up to 64 tokens, but bucket_max_length is 32"):
        train(decompose(documents(), min_length=8, max_length=64))
    with pytest.raises(ValueError, match="names the length 64, but there is no such bucket"):
        train(documents(), bucket_curriculum={8: 1, 16: 1, 32: 1, 64: 1})
    with pytest.raises(ValueError, match="needs BucketedTrainingArguments"):
        BucketedTrainer(tiny_model(), TrainingArguments(str(tmp_path), **QUIET))


def test_odds_and_weights_as_json_text(tmp_path):
    args = arguments(
        tmp_path, bucket_curriculum='{"8": 1, "16": 2, "32": 1}', bucket_mixture={"8": 1, "16": 1, "32": 2}
    )
    assert args.bucket_curriculum == {8: 1, 16: 2, 32: 1} and args.bucket_mixture == {8: 1, 16: 1, 32: 2}
    assert arguments(tmp_path, bucket_max_length=None).bucket_max_length is None


def test_the_longest_bucket_defaults_to_what_the_model_has_positions_for(tmp_path):
    trainer = BucketedTrainer(tiny_model(max_position_embeddings=100), arguments(tmp_path, bucket_max_length=None))
    assert trainer._longest_bucket() == 64
