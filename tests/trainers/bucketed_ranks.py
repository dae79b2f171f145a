"""Run by torchrun on two gloo processes: trains with buckets, and writes what each rank saw and the final weights."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
from fsdp_on_cpu import fsdp_config, use_fsdp_on_cpu, weights, wrappers

from hf_ext.testing import tiny_model
from hf_ext.trainers.bucketed_config import BucketedTrainingArguments
from hf_ext.trainers.bucketed_trainer import BucketedTrainer


class Recording(BucketedTrainer):
    seen: list

    def training_step(self, model, inputs, *rest):
        self.seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *rest)


def documents():
    rng = np.random.default_rng(0)
    return datasets.Dataset.from_dict(
        {"input_ids": [rng.integers(3, 128, n).tolist() for n in rng.integers(1, 70, 40)]}
    )


def sharded_model(folder):
    """FSDP2 at load time, the host's way without accelerate."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        tiny_model().save_pretrained(f"{folder}/model")
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", distributed_config=DistributedConfig(fsdp_size=2))


def run(folder, resume=None, streamed=False, model=None, **options):
    args = BucketedTrainingArguments(
        folder,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        bucket_min_length=8,
        bucket_max_length=32,
        bucket_cycles=2,
        bucket_window_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=4,
        include_num_input_tokens_seen="all",
        num_train_epochs=2,
        **options,
    )
    data = documents().to_iterable_dataset() if streamed else documents()
    trainer = Recording(model or tiny_model(), args, train_dataset=data)
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    steps = trainer.bucket_sampler.steps if trainer.bucket_sampler else None
    logs = [log for log in trainer.state.log_history if "sequence_length" in log]
    found = {
        "seen": trainer.seen,
        "steps": steps,
        "global_step": trainer.state.global_step,
        "logs": logs,
        "tokens": trainer.state.num_input_tokens_seen,
        "wrappers": wrappers(trainer.model_wrapped),
    }
    return found, weights(trainer.model_wrapped)


def refusal(folder, **options):
    """The sentence that training ends with."""
    try:
        run(folder, **options)
    except RuntimeError as error:
        return str(error)
    return "trained"


def main(folder):
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    never = {"save_strategy": "no"}
    straight, expected = run(f"{folder}/a", **never)
    save = straight["steps"] + 1  # in the second epoch
    saving = {"save_strategy": "steps", "save_steps": save}
    run(f"{folder}/b", **saving)
    resumed, resumed_weights = run(f"{folder}/b", resume=f"{folder}/b/checkpoint-{save}", **saving)
    streamed, _ = run(f"{folder}/c", streamed=True, max_steps=6, **never)
    fadam, expected_fadam = run(f"{folder}/d", optim="fadam", **never)
    found = {"straight": straight, "resumed": resumed, "save": save, "streamed": streamed, "fadam": fadam,
             "same": torch.equal(expected, resumed_weights)}  # fmt: skip

    def compare(name, wanted, **options):
        found[name], got = run(f"{folder}/{name}", **options, **never)
        found[name]["error"] = (got - wanted).abs().max().item()

    compare("sharded", expected, model=sharded_model(folder))
    use_fsdp_on_cpu()
    for version in (1, 2):
        compare(f"fsdp{version}", expected, fsdp=True, fsdp_config=fsdp_config(version))
    compare("fsdp2_fadam", expected_fadam, fsdp=True, fsdp_config=fsdp_config(2), optim="fadam")
    found["fsdp1_fadam"] = refusal(f"{folder}/e", fsdp=True, fsdp_config=fsdp_config(1), optim="fadam", **never)
    if dist.get_rank() == 0:
        torch.save({"adamw": expected, "fadam": expected_fadam}, f"{folder}/weights.pt")
    Path(f"{folder}/rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
