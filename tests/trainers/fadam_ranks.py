"""One process of a run under torch.distributed.run: the host's Trainer with FAdam, without or with FSDP."""

import json
import sys

import torch
from transformers import Trainer, TrainingArguments

from hf_ext.testing import tiny_model


def main(output: str, batch: str, fsdp: str, resume: str) -> None:
    torch.set_num_threads(1)
    ids = torch.randint(3, 128, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = {"fsdp": "full_shard", "fsdp_config": json.loads(fsdp)} if fsdp != "none" else {}
    args = TrainingArguments(
        output,
        optim="fadam",
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=int(batch),
        learning_rate=1e-2,
        weight_decay=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **options,
    )
    trainer = Trainer(tiny_model().train(), args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=f"{output}/checkpoint-2" if resume == "resume" else None)
    if trainer.is_world_process_zero():
        print("LOSSES", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    main(*sys.argv[1:])
