"""Run by python or torchrun: trains SPO and ADPO in every case, and writes what they logged and saved.

Arguments: the folder to write to, those of pi_0, of pi_1 and of the rows, rows a process, and an FSDP version or 0.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_from_disk
from fsdp_on_cpu import fsdp_config, use_fsdp_on_cpu, wrappers
from peft import LoraConfig
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

CASES = [f"{method}{kind}" for method in ("spo", "adpo") for kind in ("", "_lora", "_stored", "_stored_lora")]
CASES += ["adpo_masked"]


def run(case, output, base, start, rows, batch, fsdp):
    """Three steps with a checkpoint after them, an evaluation and a saved model."""
    options = {
        "output_dir": str(output),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_steps": 3,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no" if fsdp == 1 else "steps",  # FSDP1's full state dict crashes PyTorch on CPUs
        "save_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "precompute_ref_log_probs": "stored" in case,
        "ddp_timeout": 60,
    }
    if fsdp:
        options |= {"fsdp": True, "fsdp_config": fsdp_config(fsdp)}
    if case == "adpo_masked":  # so few toxic responses that a process can have none where the other has some
        rows = rows.map(lambda row, i: {"toxic": None if i % 3 else row["toxic"]}, with_indices=True)
    data = {"train_dataset": rows, "eval_dataset": rows}
    if "lora" in case:
        data["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if case.startswith("spo"):
        trainer = SPOTrainer(start, args=SPOConfig(**options, prev_betas=[0.1]), prev_policies=[base], **data)
    else:
        trainer = ADPOTrainer(start, args=ADPOConfig(**options, missing_toxic="mask"), **data)
    trainer.train()
    metrics = trainer.evaluate()
    if fsdp != 1:
        trainer.save_model(str(output))
    weights = full_weights(trainer, fsdp)
    if trainer.is_world_process_zero():
        torch.save(weights, output / "weights.pt")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"logged": logged, "eval": metrics, "wrappers": wrappers(trainer.model_wrapped)}


def full_weights(trainer, fsdp):
    """All weights of the trained model by name; every process has to ask."""
    if fsdp != 1:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
        named = trainer.model_wrapped.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): value.detach().clone() for name, value in named}


def main(folder, base, start, rows, batch, fsdp):
    disable_progress_bars()
    rows = load_from_disk(rows)
    if fsdp:
        use_fsdp_on_cpu()
    for case in CASES:
        output = Path(folder) / case
        output.mkdir(exist_ok=True)
        rank = os.environ.get("RANK", "0")
        try:
            record = run(case, output, base, start, rows, batch, fsdp)
        except Exception:
            (output / f"error of rank {rank}.txt").write_text(traceback.format_exc())
        else:
            (output / f"rank {rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:7]))
