"""Every example runs, as short as it can be asked to be."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Trained from scratch or tiny: seconds.
QUICK = {
    "adpo": ["--steps", "2"],
    "bucketed_pretrain": ["--data", "TEXT_FOLDER", "--out", "OUT"],
    "cla_train": ["--steps", "2", "--out", "OUT.png"],
    "fadam": ["--steps", "2"],
    "spo": ["--steps", "2", "--out", "OUT"],
}
# On SmolLM2-135M-Instruct: up to minutes.
ON_THE_REAL_MODEL = {
    "cache_generate": [],
    "cla_convert": ["--rank-tokens", "64", "--heal-tokens", "512", "--keep", "0.97", "--out", "OUT"],
    "perplexity": ["--tokens", "256", "--window", "128"],
    "reallm_quantize": ["--calibration", "TEXT", "--windows", "1", "--budget", "3.5", "--out", "OUT"],
    "sirllm": ["--new-tokens", "8"],
}
# Needs what another example writes.
AFTER_ANOTHER = {"reallm_qlora"}


def run(name: str, arguments: list[str], folder: Path) -> str:
    text = folder / "texts" / "text.txt"
    text.parent.mkdir()
    text.write_text("\n\n".join(path.read_text() for path in sorted(EXAMPLES.glob("*.py"))))
    places = {"OUT": "out", "OUT.png": "out.png", "TEXT": str(text), "TEXT_FOLDER": str(text.parent)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *(places.get(word, word) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_listed():
    listed = {*QUICK, *ON_THE_REAL_MODEL, *AFTER_ANOTHER}
    assert listed == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", QUICK)
def test_quick_examples(name, tmp_path):
    assert run(name, QUICK[name], tmp_path).strip()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", ON_THE_REAL_MODEL)
def test_examples_on_the_real_model(name, tmp_path):
    assert run(name, ON_THE_REAL_MODEL[name], tmp_path).strip()
