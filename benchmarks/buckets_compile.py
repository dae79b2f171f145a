"""torch.compile in `BucketedTrainer`, one graph a bucket length: does it pay on a CPU, and after how many steps?

    python benchmarks/buckets_compile.py        # minutes on one thread, most of them the compiler's

Small Llamas of several widths on the interpreter's own library. The compiled run stops half-way and is resumed with a
new model and no graph in memory, as a new process would be; the compiler's files on disk are there. Steps are CPU
seconds of this process, without the first of every length; compiling is the wall time of those first ones, because the
compiler runs processes of its own.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from _bucket_arms import as_dataset, corpus
from _run import Report
from buckets import llama
from torch import _dynamo

from hf_ext.trainers.bucketed_config import BucketedTrainingArguments
from hf_ext.trainers.bucketed_trainer import BucketedTrainer


class Timed(BucketedTrainer):
    """Notes CPU and wall seconds of every forward and backward pass, by length."""

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:
        """As the trainer's, timed."""
        cpu, wall = time.process_time(), time.perf_counter()
        loss = super().training_step(model, inputs, *rest)
        spent = time.process_time() - cpu, time.perf_counter() - wall
        self.spent = getattr(self, "spent", {})
        self.spent.setdefault(inputs["input_ids"].shape[1], []).append(spent)
        return loss


def run(
    what: str, hidden: int, documents: Any, folder: str, options: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """Train once: seconds by length, graphs and what compiling took."""
    _dynamo.reset()
    graphs = _dynamo.utils.counters["stats"]["unique_graphs"]
    args = BucketedTrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=3e-3, logging_steps=1000, seed=0,
        bucket_min_length=options.shortest, bucket_max_length=options.longest, bucket_mixture="equal",
        per_device_train_batch_size=options.tokens_per_step // options.longest, max_steps=options.steps,
        bucket_append_eos=False, save_strategy="steps", save_steps=options.steps // 2,
        torch_compile=more.pop("torch_compile"),
    )  # fmt: skip
    trainer = Timed(llama(hidden, options.layers, 4, options.longest, 0), args, train_dataset=documents)
    trainer.train(**more)
    steady = {n: statistics.median(cpu for cpu, _ in spent[1:]) for n, spent in sorted(trainer.spent.items())}
    first = sum(spent[0][1] for spent in trainer.spent.values()) - sum(steady.values())
    return {
        "hidden": hidden,
        "what": what,
        "steps": sum(map(len, trainer.spent.values())),
        "lengths": len(trainer.spent),
        "graphs": _dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "first_steps_extra_seconds": first,
        **{f"step_seconds_{length}": seconds for length, seconds in steady.items()},
        "mean_step_seconds": statistics.mean(steady.values()),
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def compare(report: Report, hidden: int, documents: Any, folder: str, options: argparse.Namespace) -> None:
    """Three runs of one width: plain, compiled, compiled and resumed; and the steps that pay the compiler back."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiler"
    plain = run("plain", hidden, documents, f"{folder}/plain", options, torch_compile=False)
    report.row(**plain)
    half = f"{folder}/graphs/checkpoint-{options.steps // 2}"
    for what, start in (("compiled", {}), ("resumed", {"resume_from_checkpoint": half})):
        found = run(what, hidden, documents, f"{folder}/graphs", options, torch_compile=True, **start)
        saved = plain["mean_step_seconds"] - found["mean_step_seconds"]
        pays = found["first_steps_extra_seconds"] / saved if saved > 0 else None
        report.row(**found, speed_up=plain["mean_step_seconds"] / found["mean_step_seconds"], pays_after_steps=pays)
        report.save()


def main() -> None:
    """Compare every width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with .txt documents (default: the interpreter's library)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256], help="widths")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shortest", type=int, default=512)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    documents = as_dataset(corpus(options.data, 60).train)
    report = Report("buckets_compile", vars(options))
    for hidden in options.hidden:
        with tempfile.TemporaryDirectory() as folder:
            compare(report, hidden, documents, folder, options)


if __name__ == "__main__":
    main()
