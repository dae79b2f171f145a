import os

import pytest
import torch

# Under pytest-xdist every worker is a process of its own: one thread each keeps two workers on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
