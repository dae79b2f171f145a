"""Align a model to two preferences that conflict, one round after the other, and plot what is kept of the first.

    python examples/spo.py                                   # tiny model, generated labels, a minute on a CPU
    python examples/spo.py --model NAME --out runs/spo       # any causal model, LoRA, short generated dialogues
    python examples/spo.py --model NAME --safe-rlhf rows.jsonl   # PKU-SafeRLHF rows you have: harmless, then helpful

Compare `--multiplier 0`, which is DPO twice.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset

from hf_ext import SPOConfig, SPOPipeline, SPORound
from hf_ext.data.preference import conflicting_pairs, safe_rlhf_pairs
from hf_ext.data.preference_toy import ConflictTask, tiny_llama, word_tokenizer
from hf_ext.trainers.spo_pipeline import plot_rounds


def tiny_model(folder: Path) -> str:
    """A random two-layer model that knows the words of the generated task."""
    tokenizer = word_tokenizer(ConflictTask.words)
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer).save_pretrained(folder)
    return str(folder)


def dimensions(options: argparse.Namespace) -> dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """Name -> (training pairs, held-out pairs), in the order of the rounds."""
    if options.safe_rlhf:
        rows = [json.loads(line) for line in options.safe_rlhf.read_text(encoding="utf-8").splitlines()]
        pairs = {name: safe_rlhf_pairs(rows, name) for name in ("harmless", "helpful")}
        return {name: (found[: -len(found) // 10], found[-len(found) // 10 :]) for name, found in pairs.items()}
    if options.model:
        return {
            name: (conflicting_pairs(400, name, 0), conflicting_pairs(100, name, 1)) for name in ("polite", "brief")
        }
    task = ConflictTask()
    return {name: (task.pairs(4000, d, 0), task.pairs(500, d, 1)) for d, name in ((1, "first"), (2, "second"))}


def main() -> None:
    """Run the rounds and draw margins and accuracies of both dimensions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder; a tiny random model when not given")
    parser.add_argument("--safe-rlhf", type=Path, help="JSON lines of PKU-SafeRLHF")
    parser.add_argument("--out", type=Path, default=Path("runs/spo"))
    parser.add_argument("--multiplier", type=float, default=1.5, help="lambda, what earlier dimensions weigh")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    extra = {}
    if options.model:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    rounds = [
        SPORound(name, Dataset.from_list(train), Dataset.from_list(held_out))
        for name, (train, held_out) in dimensions(options).items()
    ]
    args = SPOConfig(
        str(options.out),
        prev_lambda=options.multiplier,
        beta=0.1 if options.model else 1.0,
        learning_rate=1e-4 if options.model else 1e-3,
        per_device_train_batch_size=4 if options.model else 64,
        max_steps=options.steps,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    )
    records = SPOPipeline(options.model or tiny_model(options.out / "start"), rounds, args, **extra).run()
    for record in records:
        for name, values in record["dimensions"].items():
            print(
                f"after round {record['round']}: {name:8s} accuracy {values['accuracy']:.3f} "
                f"margin {values['margin']:+.2f} nats"
            )
    plot_rounds(records, str(options.out / "rounds.png"))
    print(f"plot: {options.out / 'rounds.png'}")


if __name__ == "__main__":
    main()
