"""DDP and FSDP with two gloo processes on the CPU: the same parameters as one process with the same global batch.

Every test looks at the class of the trained module, since accelerate drops FSDP on CPUs (see fsdp_on_cpu.py). Saving
is part of it but with FSDP1, whose full state dict crashes PyTorch on CPUs, under DPOTrainer too.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")
WORKER = Path(__file__).with_name("preference_ranks.py")
METRICS = ("loss", "rewards/margins", "logps/chosen")
CASES = [f"{method}{kind}" for method in ("spo", "adpo") for kind in ("", "_lora", "_stored", "_stored_lora")]
CASES += ["adpo_masked"]  # few rows have a toxic response, so one process can have none where the other has some
# How the two processes are wrapped -> (FSDP version, the class that the trained model then has).
WRAPPERS = {
    "ddp": (0, "DistributedDataParallel"),
    "fsdp1": (1, "FullyShardedDataParallel"),
    "fsdp2": (2, "FSDPModule"),
}


@pytest.fixture(scope="module")
def launch(preference, tmp_path_factory):
    """``launch(processes, fsdp version)``: the folder with all cases, of one start of the worker."""
    folder = tmp_path_factory.mktemp("distributed")
    preference.rows(24).save_to_disk(folder / "rows")

    @functools.cache
    def run(processes: int, fsdp: int) -> Path:
        output = folder / f"{processes} processes, fsdp {fsdp}"
        output.mkdir()
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
            command += ["--rdzv-endpoint=localhost:0"]
        command += [WORKER, output, preference.folder(0), preference.folder(1), folder / "rows", 4 // processes, fsdp]
        with (output / "stderr.txt").open("w") as stderr:
            subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=stderr, timeout=500)
        return output

    return run


def assert_same_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)


def record(folder: Path) -> dict:
    """What the first process wrote of a case that no process failed in."""
    errors = "\n".join(path.read_text() for path in folder.glob("error*"))
    assert not errors, errors
    assert (folder / "rank 0.json").exists(), (folder.parent / "stderr.txt").read_text()[-3000:]
    return json.loads((folder / "rank 0.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(launch, case, wrapper):
    fsdp, kind = WRAPPERS[wrapper]
    folders = launch(1, 0) / case, launch(2, fsdp) / case
    one, two = map(record, folders)
    assert (one["wrappers"], two["wrappers"]) == ([], [kind])
    for a, b in zip(one["logged"], two["logged"], strict=True):
        assert set(a) == set(b)
        assert [b[name] for name in METRICS] == pytest.approx([a[name] for name in METRICS], rel=1e-4, abs=1e-5)
    assert two["eval"]["eval_loss"] == pytest.approx(one["eval"]["eval_loss"], rel=1e-4)
    assert_same_weights(*(torch.load(folder / "weights.pt") for folder in folders))
    if fsdp != 1:
        assert_same_weights(*(load_file(next(folder.glob("*.safetensors"))) for folder in folders))
