"""DDP and FSDP with two gloo processes on the CPU: the same parameters as one process with the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import load_from_disk
from peft import LoraConfig
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer

case, base, second, rows, output, batch, fsdp = sys.argv[1:8]
options = dict(output_dir=output, bf16=False, gradient_checkpointing=False, report_to="none", max_steps=3,
               per_device_train_batch_size=int(batch), learning_rate=1e-3, logging_steps=1, save_strategy="no",
               use_cpu=True, disable_tqdm=True, seed=5)
if fsdp != "none":
    options |= dict(fsdp="full_shard", fsdp_config=json.loads(fsdp))
if case.endswith("stored"):
    options |= dict(precompute_ref_log_probs=True)
rows = load_from_disk(rows)
extra = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if "lora" in case else {}
if case.startswith("spo"):
    trainer = SPOTrainer(second, args=SPOConfig(**options, prev_betas=[0.1]), train_dataset=rows,
                         eval_dataset=rows, prev_policies=[base], **extra)
else:
    trainer = ADPOTrainer(second, args=ADPOConfig(**options), train_dataset=rows, eval_dataset=rows, **extra)
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(output)
if trainer.is_world_process_zero():
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    json.dump({"logged": logged, "eval": metrics}, open(output + "/logged.json", "w"))
"""


def run(preference, tmp_path: Path, case: str, processes: int, fsdp: str = "none") -> Path:
    output = tmp_path / f"{case}-{processes}-{fsdp != 'none'}"
    output.mkdir()
    rows = tmp_path / "rows"
    if not rows.exists():
        preference.rows(24).save_to_disk(rows)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
    launch = [*launch, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if processes > 1 else [sys.executable]
    command = [*launch, str(script), case, preference.folder(0), preference.folder(1), str(rows), str(output)]
    done = subprocess.run([*command, str(4 // processes), fsdp], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(folder.glob("*.safetensors")))


def compare(one: Path, two: Path) -> None:
    single, double = (json.loads((folder / "logged.json").read_text()) for folder in (one, two))
    for a, b in zip(single["logged"], double["logged"], strict=True):
        assert set(a) == set(b)
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5)
    assert double["eval"]["eval_loss"] == pytest.approx(single["eval"]["eval_loss"], rel=1e-4)
    ours, theirs = weights(one), weights(two)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["spo", "spo stored", "spo lora", "adpo", "adpo stored", "adpo lora"])
def test_two_ddp_processes_equal_one(preference, tmp_path, case):
    compare(run(preference, tmp_path, case, 1), run(preference, tmp_path, case, 2))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("case", ["spo", "adpo"])
def test_two_fsdp_processes_equal_one(preference, tmp_path, case, version):
    config = {
        "fsdp_version": version,
        "state_dict_type": "FULL_STATE_DICT",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "sync_module_states": False,  # accelerate wants an accelerator for it; both processes load the same weights
        "cpu_ram_efficient_loading": False,
    }
    compare(run(preference, tmp_path, case, 1), run(preference, tmp_path, case, 2, json.dumps(config)))
