"""Healing a quantised model in the bits it has: perplexity on several kinds of text, before and after.

    hf-ext quantize --budget 3.3 --calibration FOLDER --out out/reallm-3
    python benchmarks/reallm_heal.py --base out/reallm-3 --train FOLDER --text wiki.test.raw pydoc gsm8k.jsonl

``pydoc`` stands for the language reference that comes with Python; of a ``.jsonl`` file all strings are taken. Half of
the windows come from ``--train`` and half are the model's own writing, in turn. What is healed is saved, loaded again
and then measured, so that roundings count. Everything is kept in ``--work``: an interrupted run goes on where it
stopped. Text trained on must not be related to the text measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
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
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from hf_ext.default_model import load_model

    settings = {name: value for name, value in vars(arguments).items() if name not in ("work", "base", "steps")}
    settings |= {"train": Path(arguments.train).name, "text": [Path(text).stem for text in arguments.text]}
    report = Report("reallm_heal", settings)
    teacher, tokenizer = load_model(arguments.model)
    work = Path(arguments.work)
    report.row(**_kept(work / "float32.json", lambda: _row("float32", None, teacher, tokenizer, arguments)))
    for base in arguments.base:
        name, healed = Path(base).name, work / f"{Path(base).name}-healed"
        found = _kept(work / f"{name}.json", lambda base=base: _measured(base, tokenizer, arguments))  # type: ignore[misc]
        report.row(**found)
        if not healed.exists():
            model = AutoModelForCausalLM.from_pretrained(base)
            told = _heal(model, teacher, tokenizer, work / f"{name}-state", arguments)
            unfinished = healed.with_suffix(".new")
            model.save_pretrained(unfinished)
            (unfinished / "told.json").write_text(json.dumps(told), encoding="utf-8")
            unfinished.replace(healed)
        told = json.loads((healed / "told.json").read_text(encoding="utf-8"))
        found = _kept(healed / "row.json", lambda at=healed: _measured(at, tokenizer, arguments))  # type: ignore[misc]
        report.row(**found, **told)
        report.save()


def _heal(model: Any, teacher: Any, tokenizer: Any, state: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train ``model``; what it took."""
    from hf_ext.quant.calibration import calibration_windows, in_turn
    from hf_ext.quant.distill import DistillOptions, distill

    steps = arguments.steps
    source = (LENGTH, arguments.work, arguments.own_seed, BATCH)
    own = own_text(teacher, tokenizer, steps // 2, *source)
    windows = in_turn(calibration_windows(arguments.train, tokenizer, steps - steps // 2, LENGTH), own)
    options = DistillOptions(
        train=tuple(arguments.kinds),
        block_epochs=0,
        steps=steps,
        lr=arguments.lr,
        relative_lr=arguments.relative_lr,
        windows=len(windows),
        window_length=LENGTH,
        save_every=10,
    )
    with _timed(state / "seconds.json"):
        losses = distill(model, teacher, windows, None, options, state, sys.stderr.isatty())
    return {
        "tokens": len(losses) * LENGTH,
        "cpu_minutes": round(json.loads((state / "seconds.json").read_text(encoding="utf-8")) / 60, 1),
        "loss_first": round(sum(losses[:20]) / len(losses[:20]), 4),
        "loss_last": round(sum(losses[-20:]) / len(losses[-20:]), 4),
    }


@contextmanager
def _timed(file: Path) -> Iterator[None]:
    """Add the CPU time within to what earlier, interrupted runs took."""
    begin = time.process_time()
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else 0
    try:
        yield
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(before + time.process_time() - begin), encoding="utf-8")


def _kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not file.exists():
        row = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _measured(folder: str | Path, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from hf_ext.quant.linear import set_decode_mode

    model = AutoModelForCausalLM.from_pretrained(folder)
    set_decode_mode(model, "once")
    return _row(Path(folder).name, folder, model, tokenizer, arguments)


@torch.no_grad()
def _row(
    name: str, folder: str | Path | None, model: Any, tokenizer: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Bits from the bytes on disk, and perplexities."""
    from hf_ext.evaluation import perplexity, tokenize
    from hf_ext.quant.integrity import bits_on_disk

    found: dict[str, Any] = {"model": name}
    found["bits_linear"] = 32.0 if folder is None else round(bits_on_disk(folder)["linear"], 3)
    for text in arguments.text:
        ids, first = tokenize(tokenizer, read_text(text)), text == arguments.text[0]
        count = arguments.windows if first else arguments.other_windows
        measured = perplexity(model, ids, arguments.window, max_windows=count)
        found[Path(text).stem] = round(measured.perplexity, 2)
    return found


if __name__ == "__main__":
    main()
