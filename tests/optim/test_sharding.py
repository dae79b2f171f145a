import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_ext import FAdam

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path):
    """FSDP2 in every mode and path, resume through a full state dict, other placements, what is refused."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(tmp_path / "store")], **options)
        for rank in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


def test_flattened_parameters_of_fsdp1_are_refused_before_a_state_is_made():
    param = nn.Parameter(torch.ones(4))
    param._fsdp_flattened = True
    param.grad = torch.ones(4)
    optimizer = FAdam([param])
    with pytest.raises(RuntimeError, match="FSDP1's flattened shards"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4))


def test_fsdp1_still_marks_its_parameters_by_that_name():
    """Contract with torch 2.13: the mark that `hf_ext.optim.sharding.check_whole` reads."""
    from torch.distributed.fsdp import _common_utils

    assert _common_utils.FSDP_FLATTENED == "_fsdp_flattened"
