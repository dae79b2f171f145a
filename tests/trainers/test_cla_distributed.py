"""Healing under DDP and FSDP with two gloo processes on the CPU gives what one process gives with the same batch.

Every test looks at the class of the trained module, since accelerate drops FSDP on CPUs (see fsdp_on_cpu.py).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
WORKER = Path(__file__).with_name("cla_ranks.py")


def heal(folder: Path, processes: int, fsdp: int) -> dict:
    folder.mkdir()
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += list(map(str, (WORKER, folder, 4 // processes, fsdp)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return heal(tmp_path_factory.mktemp("cla") / "alone", 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "wrapper"),
    [(0, "DistributedDataParallel"), (1, "FullyShardedDataParallel"), (2, "FSDPModule")],
    ids=["ddp", "fsdp1", "fsdp2"],
)
def test_two_processes_heal_as_one(alone, tmp_path, fsdp, wrapper):
    two = heal(tmp_path / "two", 2, fsdp)
    assert alone["wrappers"] == [] and two["wrappers"] == [wrapper]
    assert two["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    torch.testing.assert_close(two["weights"], alone["weights"], rtol=1e-3, atol=2e-5)
