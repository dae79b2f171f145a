"""From scratch at equal tokens: dense MQA, CLA2, and dense MQA with the cache bytes of CLA2 (half the head size).

Run: python benchmarks/cla_scratch.py [--steps 300] [--seeds 3] [--learning-rates 3e-3 4.5e-3]
The models and the text are those of examples/cla_train.py (bytes of the Python manual); the loss is measured on a held
out tenth. Writes benchmarks/results/cla_scratch.json and .csv.
"""

import argparse
import importlib.util
import statistics
from pathlib import Path
from typing import Any

import torch
from _run import Report

spec = importlib.util.spec_from_file_location("cla_train", Path(__file__).parent.parent / "examples" / "cla_train.py")
assert spec is not None and spec.loader is not None
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

HELD_OUT = len(example.TEXT) // 10
ARMS: dict[str, dict[str, Any]] = {
    "dense MQA, head 16": {"flags": None},
    "CLA2 MQA, head 16": {"flags": {"cla": {"sharing_factor": 2}}},
    "dense MQA, head 8": {"flags": None, "head_dim": 8, "num_attention_heads": 8},
}


@torch.no_grad()
def held_out_loss(model: Any, text: torch.Tensor) -> float:
    """Mean nats a byte over rows of the training length."""
    rows = text[: len(text) // example.LENGTH * example.LENGTH].view(-1, example.LENGTH)[:256]
    model.eval()
    return statistics.mean(model(part, labels=part, use_cache=False).loss.item() for part in rows.split(64))


def main() -> None:
    """Train every arm with every seed and learning rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 4.5e-3])
    args = parser.parse_args()
    held_out, example.TEXT = example.TEXT[:HELD_OUT], example.TEXT[HELD_OUT:]
    report = Report("cla_scratch", {**vars(args), "tokens": args.steps * example.ROWS * example.LENGTH})
    for rate in args.learning_rates:
        for name, arm in ARMS.items():
            losses = []
            for seed in range(args.seeds):
                model = example.build(**arm, seed=seed)
                example.train(model, args.steps, rate, seed)
                losses.append(held_out_loss(model, held_out))
            report.row(
                model=name,
                learning_rate=rate,
                bytes_per_token=model.kv_bytes_per_token(),
                parameters=model.num_parameters(),
                loss=statistics.mean(losses),
                lowest=min(losses),
                highest=max(losses),
            )
            report.save()


if __name__ == "__main__":
    main()
