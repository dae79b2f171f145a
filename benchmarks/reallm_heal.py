"""Healing a quantised model in the bits it has: perplexity on several kinds of text, before and after.

    hf-ext quantize --budget 3.3 --calibration FOLDER --out out/reallm-3
    python benchmarks/reallm_heal.py --base out/reallm-3 --train FOLDER --text wiki.test.raw pydoc gsm8k.jsonl

``pydoc`` stands for the language reference that comes with Python; of a ``.jsonl`` file all strings are taken. Half of
the windows come from ``--train`` and half are the model's own writing, in turn. What is healed is saved, loaded again
and then measured, so that roundings count. Everything is kept in ``--work``: an interrupted run goes on where it
stopped. Text trained on must not be related to the text measured.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _notes import Notes
from _own_text import own_text
from _run import Report
from _texts import read_text

BATCH = 64  # windows that the model writes at a time
LENGTH = 512  # tokens of a window, one window a step


def main() -> None:
    """Heal, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="the full-precision model; the embedded one by default")
    parser.add_argument("--base", required=True, nargs="+", help="folders of quantised models")
    parser.add_argument("--train", required=True, help="text file or folder to train on")
    parser.add_argument("--text", required=True, nargs="+", help="texts to measure on")
    parser.add_argument("--kinds", nargs="+", default=["low_rank", "scales", "norms"], help="what trains")
    parser.add_argument("--steps", type=int, default=120, help="steps of one window of 512 tokens")
    parser.add_argument("--own-seed", type=int, default=11, help="of the model's own writing, 64 windows a seed")
    parser.add_argument("--lr", type=float, default=5e-4, help="of low-rank factors")
    parser.add_argument("--relative-lr", type=float, default=1e-3, help="of scales and norms, in parts of their size")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="windows of the first text")
    parser.add_argument("--other-windows", type=int, default=1, help="windows of each other text")
    parser.add_argument("--work", default="out/reallm-heal", help="where states, models and rows are kept")
    parser.add_argument("--report", default="reallm_heal", help="name of the result files")
    arguments = parser.parse_args()
    from hf_ext.default_model import load_model

    settings = {name: value for name, value in vars(arguments).items() if name not in ("work", "base", "report")}
    settings |= {"train": Path(arguments.train).name, "text": [Path(text).stem for text in arguments.text]}
    work = Path(arguments.work)
    notes = Notes(work / "notes.json", settings)
    report = Report(arguments.report, settings)
    teacher, tokenizer = load_model(arguments.model)
    report.row(**notes.once("float32", partial(_row, "float32", teacher, tokenizer, arguments)))
    for base in arguments.base:
        name, healed = Path(base).name, work / f"{Path(base).name}-healed"
        report.row(**notes.once(name, partial(_measured, base, tokenizer, arguments)))
        training = notes.once(f"{name} training", partial(_heal, base, teacher, tokenizer, healed, notes, arguments))
        report.row(**notes.once(healed.name, partial(_measured, healed, tokenizer, arguments)), **training)
        report.save()


def _heal(
    base: str, teacher: Any, tokenizer: Any, healed: Path, notes: Notes, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train the model in ``base``, save it in ``healed``; what it took."""
    from transformers import AutoModelForCausalLM

    from hf_ext.quant.distill import DistillOptions, distill

    windows = _windows(teacher, tokenizer, arguments)
    options = DistillOptions(
        train=tuple(arguments.kinds),
        block_epochs=0,
        steps=arguments.steps,
        lr=arguments.lr,
        relative_lr=arguments.relative_lr,
        windows=len(windows),
        window_length=LENGTH,
        save_every=10,
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    with _timed(notes, f"{healed.name} minutes"):
        state = healed.with_name(f"{Path(base).name}-state")
        losses = distill(model, teacher, windows, None, options, state, sys.stderr.isatty())
    model.save_pretrained(healed)
    return {
        "steps": len(losses),
        "windows": len(windows),
        "cpu_minutes": round(notes.found[f"{healed.name} minutes"], 1),
        "loss_first": round(sum(losses[:20]) / len(losses[:20]), 4),
        "loss_last": round(sum(losses[-20:]) / len(losses[-20:]), 4),
    }


def _windows(teacher: Any, tokenizer: Any, arguments: argparse.Namespace) -> torch.Tensor:
    """Text to train on and the model's own, in turn: one window for every step."""
    from hf_ext.quant.calibration import calibration_windows, in_turn

    half = arguments.steps // 2
    own = own_text(teacher, tokenizer, half, LENGTH, arguments.work, arguments.own_seed, BATCH)
    return in_turn(calibration_windows(arguments.train, tokenizer, arguments.steps - half, LENGTH), own)


@contextmanager
def _timed(notes: Notes, name: str) -> Iterator[None]:
    """Add the CPU time within, in minutes, to what earlier, interrupted runs took."""
    begin = time.process_time()
    try:
        yield
    finally:
        notes.write(name, notes.found.get(name, 0.0) + (time.process_time() - begin) / 60)


def _measured(folder: str | Path, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from hf_ext.quant.integrity import bits_on_disk
    from hf_ext.quant.linear import set_decode_mode

    model = AutoModelForCausalLM.from_pretrained(folder)
    set_decode_mode(model, "once")
    return _row(Path(folder).name, model, tokenizer, arguments, bits_on_disk(folder)["linear"])


@torch.no_grad()
def _row(name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace, bits: float = 32.0) -> dict[str, Any]:
    """Bits a weight, and perplexities."""
    from hf_ext.evaluation import perplexity, tokenize

    found: dict[str, Any] = {"model": name, "bits_linear": round(bits, 3)}
    for text in arguments.text:
        ids, first = tokenize(tokenizer, read_text(text)), text == arguments.text[0]
        count = arguments.windows if first else arguments.other_windows
        measured = perplexity(model, ids, arguments.window, max_windows=count)
        found[Path(text).stem] = round(measured.perplexity, 2)
    return found


if __name__ == "__main__":
    main()
