import os

import pytest
import torch

from hf_ext.default_model import INSTALL_COMMAND, cache_folder, default_model_path, load_model, package_gguf

# Under pytest-xdist every worker is a process of its own: one thread each keeps two workers on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def default_folder():
    """Where the converted default model lies."""
    try:
        return default_model_path(online=False)
    except (OSError, ImportError) as error:  # the hook below skips where it is missing; a reader of GGUF may be too
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real_model(default_folder):
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    return load_model()


def pytest_collection_modifyitems(items):
    if package_gguf() is not None or cache_folder().exists():
        return
    skip = pytest.mark.skip(reason=f"SmolLM2-135M-Instruct is not on this machine; run `{INSTALL_COMMAND}`")
    for item in items:
        if item.get_closest_marker("real_model"):
            item.add_marker(skip)
