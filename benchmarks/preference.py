"""Time, multiplications and memory of a step of SPO and ADPO over TRL's DPOTrainer, on the same data.

Run: python benchmarks/preference.py [--repeats 20]. Writes benchmarks/results/preference.json and .csv.

Every method trains the same small Llama on the same batch, for three shares of the prompt, since SPO and ADPO compute
the prompt of an example once ("rows": every response with its prompt, as DPOTrainer does).

step: seconds of a training step (forward, backward, optimiser), medians, all methods in turn in one process.
work: what no other load on the machine can change: floating-point operations of the step's matrix products and
attention (all of a row's square), and the greatest sum of bytes in live tensors, from building the trainer to the
step's end: weights, references, activations, gradients and optimiser states.
"""

import argparse
import json
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from _preference import QUIET
from _run import Report
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from trl import DPOConfig, DPOTrainer

from hf_ext.data.preference_toy import tiny_llama, word_tokenizer
from hf_ext.trainers.adpo_config import ADPOConfig
from hf_ext.trainers.adpo_trainer import ADPOTrainer
from hf_ext.trainers.spo_config import SPOConfig
from hf_ext.trainers.spo_trainer import SPOTrainer

HIDDEN, LAYERS, BATCH, WORDS = 256, 4, 4, 2000
LENGTHS = {"8+56": (8, 56), "24+40": (24, 40), "40+24": (40, 24)}  # tokens of prompt and reply
COMMON = "24+40"
STORED = {"precompute_ref_log_probs": True}
ROUND_TWO = {"prev_betas": [0.1]}
ROWS = {"share_prompt": False}
# Name -> (trainer, config, options). "online" keeps the frozen policies at hand, "stored" reads log-probabilities.
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DPO online": (DPOTrainer, DPOConfig, {}),
    "DPO stored": (DPOTrainer, DPOConfig, STORED),
    "SPO round 1 online": (SPOTrainer, SPOConfig, {}),
    "SPO chain online": (SPOTrainer, SPOConfig, ROUND_TWO),
    "SPO chain online, rows": (SPOTrainer, SPOConfig, {**ROUND_TWO, **ROWS}),
    "SPO stored": (SPOTrainer, SPOConfig, {**ROUND_TWO, **STORED}),
    "ADPO online": (ADPOTrainer, ADPOConfig, {}),
    "ADPO online, rows": (ADPOTrainer, ADPOConfig, ROWS),
    "ADPO stored": (ADPOTrainer, ADPOConfig, STORED),
    "ADPO stored, rows": (ADPOTrainer, ADPOConfig, {**STORED, **ROWS}),
}


def rows(lengths: str, count: int = 32) -> list[dict[str, str]]:
    """Random words of equal lengths, so that no method is helped by padding."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(WORDS, (length,), generator=generator).tolist())

    prompt, reply = LENGTHS[lengths]
    names = ("chosen", "rejected", "toxic")
    return [{"prompt": text(prompt), **{name: " " + text(reply) for name in names}} for _ in range(count)]


def build(name: str, kind: str, lengths: str) -> Any:
    """A trainer ready for its first step.

    Args:
        name: a key of `METHODS`.
        kind: "full" trains all weights, with frozen models; "lora" adapters on one base.
        lengths: a key of `LENGTHS`.
    """
    cls, config, options = METHODS[name]
    tokenizer = word_tokenizer([*(f"w{i}" for i in range(WORDS)), "[TOXIC]"])
    args = config(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=1000, learning_rate=1e-4,
        **{**QUIET, "logging_steps": 1000}, **options,
    )  # fmt: skip
    extra: dict[str, Any] = {}
    model = tiny_llama(tokenizer, HIDDEN, LAYERS)
    if kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    elif not options.get("precompute_ref_log_probs"):
        extra["ref_model"] = tiny_llama(tokenizer, HIDDEN, LAYERS)
    if cls is SPOTrainer and "prev_betas" in options:
        extra["prev_policies"] = [None if kind == "lora" else oldest_policy(tokenizer, options)]
    data = Dataset.from_list(rows(lengths))
    return cls(model, args=args, train_dataset=data, processing_class=tokenizer, **extra)


def oldest_policy(tokenizer: Any, options: dict[str, Any]) -> Any:
    """``pi_0`` as a model, or where its log-probabilities are stored as a folder, so that it can be let go."""
    model = tiny_llama(tokenizer, HIDDEN, LAYERS, seed=1)
    if not options.get("precompute_ref_log_probs"):
        return model
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return folder


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
    """Median seconds of a step of every method, interleaved; adapters at the common lengths only."""
    for lengths in LENGTHS if kind == "full" else (COMMON,):
        steps = {name: stepper(build(name, kind, lengths)) for name in METHODS}
        seconds = report.interleaved(steps, repeats=repeats if lengths == COMMON else max(1, repeats // 2), warmup=2)
        for name, value in seconds.items():
            over_dpo = value / seconds["DPO online"]
            report.row(quantity="seconds", kind=kind, lengths=lengths, method=name, value=value, over_dpo=over_dpo)
        report.save()


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Of the CPU's attention, which PyTorch's counter does not know; from shapes ``[B, H, T, D]``."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """Of its backward."""
    return sdpa_backward_flop_count(gradient, query, key, value)


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


class LiveBytes(TorchDispatchMode):
    """Sums the storages of all tensors made while it is on and still alive; ``peak`` is the greatest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: Any) -> None:
        """Add a storage that is new, and take it off again when it is freed."""
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        """A storage is freed."""
        self.known.discard(key)
        self.now -= size


def work(name: str, kind: str, lengths: str) -> dict[str, int]:
    """Operations of one step, and the peak of live bytes, with the optimiser's states in place."""
    live = LiveBytes()
    with live:
        trainer = build(name, kind, lengths)
        step = stepper(trainer)
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            step()
    return {"flops": counter.get_total_flops(), "bytes": live.peak}


def measure_work(report: Report, kind: str, repeats: int) -> None:
    """Operations and bytes of every method; both are exact, so nothing is repeated."""
    for lengths in LENGTHS if kind == "full" else (COMMON,):
        found = {name: work(name, kind, lengths) for name in METHODS}
        for quantity in ("flops", "bytes"):
            for name, values in found.items():
                over_dpo = values[quantity] / found["DPO online"][quantity]
                value = values[quantity]
                report.row(quantity=quantity, kind=kind, lengths=lengths, method=name, value=value, over_dpo=over_dpo)
        report.save()


MEASURES = {"step": (measure_time, {"seconds"}), "work": (measure_work, {"flops", "bytes"})}


def keep_other_rows(report: Report, quantities: set[str], kind: str) -> None:
    """Carry over what earlier calls measured, so that the parts can run in several short calls."""
    path = report.folder / f"{report.stem}.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))["rows"]
        report.rows = [row for row in stored if row["quantity"] not in quantities or row["kind"] != kind]


def main() -> None:
    """Measure one quantity of one kind, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quantity", choices=tuple(MEASURES), help="only this one")
    parser.add_argument("--kind", choices=("full", "lora"), help="only this one")
    options = parser.parse_args()
    settings = {"hidden": HIDDEN, "layers": LAYERS, "batch": BATCH, "vocabulary": WORDS, "repeats": options.repeats}
    report = Report("preference", settings)
    for kind in [options.kind] if options.kind else ("full", "lora"):
        for name in [options.quantity] if options.quantity else MEASURES:
            measure, quantities = MEASURES[name]
            keep_other_rows(report, quantities, kind)
            measure(report, kind, options.repeats)
            report.save()


if __name__ == "__main__":
    main()
