"""Step time and peak memory of SPO and ADPO over TRL's DPOTrainer: one process, the same data, steps interleaved.

Run: python benchmarks/preference.py [--repeats 30]. Writes benchmarks/results/preference.json and .csv.

Time: every method in one process on the same batch of the same tiny-to-small Llama, one training step (forward,
backward, optimiser) each in turn, medians. Memory: each method in a process of its own, the resident set's peak beyond
what importing and building the model took, so that it counts references, activations and optimiser states.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _preference import QUIET
from _run import Report
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from hf_ext.data.preference_toy import tiny_llama, word_tokenizer
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

HIDDEN, LAYERS, BATCH, WORDS = 256, 4, 4, 2000
PROMPT, REPLY = 24, 40  # tokens
STORED = {"precompute_ref_log_probs": True}
ROUND_TWO = {"prev_betas": [0.1]}
# Name -> (trainer, config, options). "online" keeps the frozen policies at hand, "stored" reads log-probabilities.
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DPO online": (DPOTrainer, DPOConfig, {}),
    "DPO stored": (DPOTrainer, DPOConfig, STORED),
    "SPO round 1 online": (SPOTrainer, SPOConfig, {}),
    "SPO chain online": (SPOTrainer, SPOConfig, ROUND_TWO),
    "SPO stored": (SPOTrainer, SPOConfig, {**ROUND_TWO, **STORED}),
    "ADPO online": (ADPOTrainer, ADPOConfig, {}),
    "ADPO stored": (ADPOTrainer, ADPOConfig, STORED),
}


def rows(count: int = 32) -> list[dict[str, str]]:
    """Random words of equal lengths, so that no method is helped by padding."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(WORDS, (length,), generator=generator).tolist())

    names = ("chosen", "rejected", "toxic")
    return [{"prompt": text(PROMPT), **{name: " " + text(REPLY) for name in names}} for _ in range(count)]


def build(name: str, kind: str, hidden: int = HIDDEN, layers: int = LAYERS) -> Any:
    """A trainer ready for its first step.

    Args:
        name: a key of `METHODS`.
        kind: "full" trains all weights, with frozen models; "lora" adapters on one base.
        hidden: width of the model.
        layers: its depth.
    """
    cls, config, options = METHODS[name]
    tokenizer = word_tokenizer([*(f"w{i}" for i in range(WORDS)), "[TOXIC]"])
    args = config(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=1000, learning_rate=1e-4,
        **{**QUIET, "logging_steps": 1000}, **options,
    )  # fmt: skip
    extra: dict[str, Any] = {}
    model = tiny_llama(tokenizer, hidden, layers)
    if kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    elif not options.get("precompute_ref_log_probs"):
        extra["ref_model"] = tiny_llama(tokenizer, hidden, layers)
    if cls is SPOTrainer and "prev_betas" in options:
        extra["prev_policies"] = [None if kind == "lora" else tiny_llama(tokenizer, hidden, layers, seed=1)]
    data = Dataset.from_list(rows())
    return cls(model, args=args, train_dataset=data, processing_class=tokenizer, **extra)


def stepper(trainer: Any) -> Callable[[], None]:
    """One training step on the trainer's first batch, as its loop does it."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # Trainer sets it in its loop
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def measure_time(report: Report, kind: str, repeats: int) -> None:
    """Median seconds of a step of every method, interleaved."""
    steps = {name: stepper(build(name, kind)) for name in METHODS}
    seconds = report.interleaved(steps, repeats=repeats, warmup=3)
    for name, value in seconds.items():
        report.row(quantity="step", kind=kind, method=name, value=value, over_dpo=value / seconds["DPO online"])


def peak_memory(name: str, kind: str) -> int:
    """Peak resident bytes of building the trainer and three steps, beyond the imports; in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = stepper(build(name, kind, hidden=1024, layers=8))
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure_memory(report: Report, kind: str) -> None:
    """Peak memory of every method, each in a process of its own."""
    peaks = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--memory-of", name, "--kind", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[name] = int(done.stdout.strip().splitlines()[-1])
    for name, value in peaks.items():
        report.row(quantity="memory", kind=kind, method=name, value=value, over_dpo=value / peaks["DPO online"])


def keep_other_rows(report: Report, quantity: str, kind: str) -> None:
    """Carry over what earlier calls measured, so that the parts can run in several short calls."""
    path = report.folder / f"{report.stem}.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))["rows"]
        report.rows = [row for row in stored if (row["quantity"], row["kind"]) != (quantity, kind)]


def main() -> None:
    """Measure one quantity of one kind, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quantity", choices=("step", "memory"), help="only this one")
    parser.add_argument("--kind", choices=("full", "lora"), help="only this one")
    parser.add_argument("--memory-of", choices=tuple(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_memory(options.memory_of, options.kind))
        return
    settings = {"hidden": HIDDEN, "layers": LAYERS, "batch": BATCH, "prompt_tokens": PROMPT, "reply_tokens": REPLY}
    report = Report("preference", {**settings, "repeats": options.repeats, "memory_model": "1024 wide, 8 layers"})
    for kind in [options.kind] if options.kind else ("full", "lora"):
        for quantity in [options.quantity] if options.quantity else ("step", "memory"):
            keep_other_rows(report, quantity, kind)
            if quantity == "step":
                measure_time(report, kind, options.repeats)
            else:
                measure_memory(report, kind)
            report.save()


if __name__ == "__main__":
    main()
