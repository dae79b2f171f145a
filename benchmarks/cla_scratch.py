"""From scratch at equal tokens: dense MQA, CLA2, and dense MQA with the cache bytes of CLA2 (half the head size).

Run: python benchmarks/cla_scratch.py --work FOLDER [--layers 4] [--steps 300] [--learning-rates 3e-3 4.5e-3]
The models and the text are those of examples/cla_train.py (bytes of the Python manual); the loss is measured on a held
out tenth. A seed fixes the order of the text, so arms of one seed read the same rows and their losses are compared in
pairs. Every finished run is kept in FOLDER; run again, it goes on. Writes benchmarks/results/cla_scratch.json and .csv
(cla_scratch_8 and so on for another number of layers).
"""

import argparse
import importlib.util
import itertools
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _notes import Notes
from _run import Report

spec = importlib.util.spec_from_file_location("cla_train", Path(__file__).parent.parent / "examples" / "cla_train.py")
assert spec is not None and spec.loader is not None
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

HELD_OUT = len(example.TEXT) // 10
SHARED = "CLA2 MQA, head 16"
ARMS: dict[str, dict[str, Any]] = {
    SHARED: {"flags": {"cla": {"sharing_factor": 2}}},
    "dense MQA, head 16": {"flags": None},
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
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 4.5e-3])
    parser.add_argument("--noted", action="store_true", help="report what FOLDER holds and train nothing")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="CLA2 must be among them")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name in ("layers", "steps")}
    notes = Notes(args.work / "notes.json", settings)
    held_out, example.TEXT = example.TEXT[:HELD_OUT], example.TEXT[HELD_OUT:]

    def run(arm: str, rate: float, seed: int) -> float:
        model = example.build(**ARMS[arm], num_hidden_layers=args.layers, seed=seed)
        example.train(model, args.steps, rate, seed)
        return held_out_loss(model, held_out)

    losses: dict[tuple[str, float], list[float]] = {}
    for rate, arm, seed in itertools.product(args.learning_rates, args.arms, range(args.seeds)):
        key = f"{arm} {rate} {seed}"
        if args.noted and key not in notes.found:
            continue
        measured = notes.once(key, partial(run, arm, rate, seed))
        losses.setdefault((arm, rate), []).append(measured)
    mean = {key: statistics.mean(found) for key, found in losses.items()}
    best = {arm: min(args.learning_rates, key=lambda rate, arm=arm: mean[arm, rate]) for arm in args.arms}
    settings["tokens"] = args.steps * example.ROWS * example.LENGTH
    stem = "cla_scratch" if args.layers == 4 else f"cla_scratch_{args.layers}"
    report = Report(stem, {**settings, "seeds": args.seeds, "learning_rates": args.learning_rates})
    for (arm, rate), found in losses.items():
        model = example.build(**ARMS[arm], num_hidden_layers=args.layers)
        pairs = [own - shared for own, shared in zip(found, losses[SHARED, best[SHARED]], strict=False)]
        report.row(
            model=arm,
            learning_rate=rate,
            best=rate == best[arm],
            bytes_per_token=model.kv_bytes_per_token(),
            parameters=model.num_parameters(),
            seeds=len(found),
            loss=mean[arm, rate],
            lowest=min(found),
            highest=max(found),
            above_cla2=statistics.mean(pairs),
            pairs=" ".join(f"{pair:+.4f}" for pair in pairs),
        )
    report.save()


if __name__ == "__main__":
    main()
