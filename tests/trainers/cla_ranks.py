"""Run by python or torchrun: heals a tiny converted model for three steps, and writes losses, wrappers and weights.

Arguments: the folder to write to, rows a process, and an FSDP version or 0.
"""

import sys
from pathlib import Path

import torch
from fsdp_on_cpu import fsdp_config, use_fsdp_on_cpu, weights, wrappers

from hf_ext import convert_to_cla
from hf_ext.testing import tiny_model
from hf_ext.trainers.cla_distill import CLADistillTrainer
from hf_ext.trainers.cla_distill_config import CLADistillArguments


def main(folder, rows, fsdp):
    options = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "trainable": "all",
        "seed": 5,
    }
    if fsdp:
        use_fsdp_on_cpu()
        options |= {"fsdp": True, "fsdp_config": fsdp_config(fsdp)}
    teacher = tiny_model("llama")
    for parameter in teacher.parameters():
        parameter.data.mul_(4)
    text = torch.randint(3, 128, (12, 32), generator=torch.Generator().manual_seed(0))
    student = convert_to_cla(teacher, {"sharing_factor": 2})
    data = [{"input_ids": row} for row in text]
    trainer = CLADistillTrainer(student, teacher, CLADistillArguments(**options), train_dataset=data)
    trainer.train()
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrappers": wrappers(trainer.model_wrapped),
        "weights": weights(trainer.model_wrapped),
    }
    if trainer.is_world_process_zero():
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
