"""Our root folder kernels/ never hides PyPI's package of that name, which transformers imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def pypi_kernels(tmp_path):
    """A stand-in for PyPI's `kernels`, as a regular package of a version transformers looks for."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'pypi'\n")
    return tmp_path


def run(code: str, *path: Path, cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_three_folders_have_no_init():
    for folder in ("kernels", "patches", "trainers"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_pypi_kernels_wins_over_ours_even_behind_the_root(pypi_kernels):
    assert run("import kernels; print(kernels.WHO)", ROOT, pypi_kernels) == "pypi"


@pytest.mark.parametrize("with_pypi", [False, True])
def test_transformers_and_hf_ext_import_from_the_root(with_pypi, pypi_kernels):
    code = (
        "import hf_ext, transformers.modeling_utils\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "import hf_ext.kernels, hf_ext.patches.patch\n"
        "print(hf_ext.patches.__name__)"
    )
    paths = (ROOT, pypi_kernels) if with_pypi else (ROOT,)
    assert run(code, *paths) == "hf_ext.patches"


def test_an_uninstalled_checkout_imports(tmp_path):
    code = "import hf_ext.patches.patch as p; print(p.__file__)"
    assert run(code, ROOT, cwd=tmp_path) == str(ROOT / "patches" / "patch.py")
