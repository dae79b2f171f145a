"""All stages of adversarial DPO on a tiny model: control token, generated triples, training, and what it costs.

    python examples/adpo.py [--out runs/adpo] [--toxic-weight 0.5]

"Toxic" replies are words of a list, harmless in themselves. For a model of your own: train it on
`hf_ext.data.preference.control_token_sft` rows, make triples with `generate_triples` and your judge, and pass them to
ADPOTrainer as below.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_ext import ADPOConfig, ADPOTrainer
from hf_ext.data.preference_generate import TripleOptions, generate_triples
from hf_ext.data.preference_toy import ToxicTask, tiny_llama, word_tokenizer

TASK = ToxicTask()
COMMON = {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}


def judge(prompt: str, reply: str) -> float:
    """1 for the good reply, .6 for another harmless one, 0 where a toxic word is in it. Yours may ask a classifier."""
    words = reply.split()
    if TASK.toxic_words.intersection(words):
        return 0.0
    return 1.0 if words == [f"g{prompt.split()[0][1:]}", f"h{prompt.split()[1][1:]}"] else 0.6


@torch.no_grad()
def logp(model: Any, tokenizer: Any, prompt: str, reply: str) -> float:
    """Log-probability of a reply in nats."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + reply + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    logps = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, start:, None]).sum().item()


class Watch(TrainerCallback):
    """Records log-probabilities of good and toxic replies to held-out prompts, without and with the token."""

    def __init__(self, tokenizer: Any, every: int = 10) -> None:
        self.tokenizer, self.every = tokenizer, every
        self.history: dict[str, list[float]] = {"step": [], "good": [], "toxic": [], "toxic behind the token": []}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure before every tenth step."""
        if state.global_step % self.every == 0:
            self.measure(state.global_step, model)

    def measure(self, step: int, model: Any) -> None:
        """Mean over the held-out prompts."""
        prompts = [TASK.prompt(pair) for pair in TASK.held_out]
        replies = {
            "good": [(prompt, TASK.good(pair)) for prompt, pair in zip(prompts, TASK.held_out, strict=True)],
            "toxic": [(prompt, " t1 t2") for prompt in prompts],
            "toxic behind the token": [(f"{prompt} {TASK.token}", " t1 t2") for prompt in prompts],
        }
        self.history["step"].append(step)
        for name, cases in replies.items():
            self.history[name].append(sum(logp(model, self.tokenizer, *case) for case in cases) / len(cases))


def plot(history: dict[str, list[float]], path: Path) -> None:
    """Draw the three log-probabilities over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("good", "good"), ("toxic", "toxic"), ("toxic behind the token", "toxic, behind the token")):
        axes.plot(history["step"], history[name], label=label)
    axes.set(xlabel="ADPO steps", ylabel="log-probability of replies (nats)", title="held-out prompts")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/adpo"))
    parser.add_argument("--toxic-weight", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(TASK.words)

    rows = Dataset.from_list(TASK.supervised(12800, seed=0))  # a third of them toxic behind the token
    args = SFTConfig(str(options.out), max_steps=300, per_device_train_batch_size=64, learning_rate=3e-3, **COMMON)
    model = tiny_llama(tokenizer, hidden_size=64)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    start = options.out / "supervised"
    trainer.model.save_pretrained(start)
    tokenizer.save_pretrained(start)

    watch = Watch(tokenizer)
    watch.measure(0, trainer.model.eval())
    plain, behind = watch.history["toxic"][0], watch.history["toxic behind the token"][0]
    if behind <= plain:
        raise SystemExit(
            f"The model has not learnt the control token: {behind:.2f} nats behind it, {plain:.2f} without."
        )

    triples = options.out / "triples.jsonl"
    if not triples.exists():
        prompts = [TASK.prompt(pair) for pair in TASK.train_prompts] * 8
        sampling = TripleOptions(samples=6, max_new_tokens=4, control_token=TASK.token)
        print(generate_triples(trainer.model, tokenizer, prompts, judge, triples, sampling))
    data = load_dataset("json", data_files=str(triples), split="train")

    watch = Watch(tokenizer)
    config = ADPOConfig(
        str(options.out / "adpo"),
        toxic_weight=options.toxic_weight,
        control_token=TASK.token,
        missing_toxic="mask",
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        **COMMON,
    )
    adpo = ADPOTrainer(str(start), args=config, train_dataset=data, callbacks=[watch])
    adpo.train()
    watch.measure(options.steps, adpo.model.eval())
    for name, values in watch.history.items():
        print(f"{name:24s} first {values[0]:8.2f}  last {values[-1]:8.2f}")
    (options.out / "history.json").write_text(json.dumps(watch.history), encoding="utf-8")
    plot(watch.history, options.out / "adpo.png")
    print(f"plot: {options.out / 'adpo.png'}")


if __name__ == "__main__":
    main()
