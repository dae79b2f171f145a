"""Healing the low-rank terms of a quantised model: perplexity on several kinds of text, before and after.

    hf-ext quantize --bits 3 --rank 8 --calibration FOLDER --out out/reallm-3
    python benchmarks/reallm_heal.py --base out/reallm-3 --train FOLDER --text wiki.test.raw pydoc gsm8k.jsonl

``pydoc`` stands for the language reference that comes with Python; of a ``.jsonl`` file all strings are taken. The
state is kept in ``--work``, so an interrupted run goes on. Text trained on must not be related to the text measured.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _run import Report
from _texts import read_text


def main() -> None:
    """Heal, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="the full-precision model; the embedded one by default")
    parser.add_argument("--base", required=True, nargs="+", help="folders of quantised models")
    parser.add_argument("--train", required=True, help="text file or folder to train on")
    parser.add_argument("--text", required=True, nargs="+", help="texts to measure on")
    parser.add_argument("--steps", type=int, default=128, help="steps of one window of 512 tokens")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--work", default="out/reallm-heal", help="where states are kept")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from hf_ext.default_model import load_model
    from hf_ext.quant.distill import DistillOptions, distill
    from hf_ext.quant.integrity import bits_on_disk
    from hf_ext.quant.linear import set_decode_mode

    settings = {name: value for name, value in vars(arguments).items() if name not in ("work", "base")}
    settings |= {"train": Path(arguments.train).name, "text": [Path(text).stem for text in arguments.text]}
    report = Report("reallm_heal", settings)
    teacher, tokenizer = load_model(arguments.model)
    options = DistillOptions(
        block_epochs=0, steps=arguments.steps, windows=arguments.steps, lr=arguments.lr, precision="bfloat16"
    )
    report.row(model="float32", bits_linear=32.0, tokens=0, **_perplexities(teacher, tokenizer, arguments))
    for base in arguments.base:
        name, bits = Path(base).name, round(bits_on_disk(base)["linear"], 3)
        model = AutoModelForCausalLM.from_pretrained(base)
        set_decode_mode(model, "once")
        report.row(model=name, bits_linear=bits, tokens=0, **_perplexities(model, tokenizer, arguments))
        begin = time.process_time()
        losses = distill(model, teacher, arguments.train, tokenizer, options, Path(arguments.work, name))
        report.row(
            model=f"{name}, healed",
            bits_linear=bits,
            tokens=len(losses) * options.window_length,
            **_perplexities(model, tokenizer, arguments),
            cpu_minutes=round((time.process_time() - begin) / 60, 1),
            loss_first=round(sum(losses[:16]) / len(losses[:16]), 4),
            loss_last=round(sum(losses[-16:]) / len(losses[-16:]), 4),
        )
        report.save()


@torch.no_grad()
def _perplexities(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    from hf_ext.evaluation import perplexity, tokenize

    found = {}
    for text in arguments.text:
        ids = tokenize(tokenizer, read_text(text))
        measured = perplexity(model, ids, arguments.window, max_windows=arguments.windows)
        found[Path(text).stem] = round(measured.perplexity, 2)
    return found


if __name__ == "__main__":
    main()
