"""Bucketed-length training against concat-and-chunk and TRL's packing: loss, time, and what the formula predicts.

Parts, each with its own results file; times are CPU seconds of this process on one thread, so that other work
on the machine does not enter:

    python benchmarks/buckets.py quality    # a small Llama trained on equal tokens, three seeds (about half an hour)
    python benchmarks/buckets.py control    # where the loss is won: other arms of the same experiment
    python benchmarks/buckets.py speed      # seconds a step by length and kind of work, and the speed-up predicted
    python benchmarks/buckets.py overhead   # decomposition, sampler memory and look-up for 100 million sequences
"""

import argparse
import json
import math
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from _bucket_arms import EOS, VOCABULARY, Batch, Corpus, arm_steps, as_dataset, batch_of, buckets, corpus, packs
from _bucket_profile import foretold_seconds, shares_by_kind
from _run import RESULTS, Report

from hf_ext.data.bucket_sampler import BucketBatchSampler
from hf_ext.data.cost import training_flops
from hf_ext.data.decompose import decompose

ARMS = {
    "quality": (
        "concat-chunk",
        "trl-bfd",
        "buckets-equal-grow-p2x8",
        "buckets-natural-grow-p2x8",
        "concat-chunk-equal-time",
        "buckets-equal-uniform",
    ),
    "control": (
        "concat-chunk",
        "same-rows-chunked",  # the rows of the equal mixture, concatenated and cut
        "buckets-equal-grow-p2x8",
        "buckets-natural-grow-p2x8",
        "buckets-equal-pad-grow-p2x8",  # with the ends of documents, which are dropped otherwise
        "buckets-natural-pad-grow-p2x8",
    ),
}
SHAPES = {"attention-heavy": (64, 4, 4), "small": (128, 2, 4), "wide": (256, 2, 4)}  # width, layers, heads
PAPER_TABLE_1 = {256: 1, 512: 1, 1024: 1, 2048: 1, 4096: 1, 8192: 1}  # "at least 256", the paper's main mixture


def llama(hidden: int, layers: int, heads: int, context: int, seed: int) -> Any:
    """A small Llama with the paper's rotary base of 100,000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            rope_theta=1e5,
            use_cache=False,
        )
    )


def loss_sum(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed next-token loss in nats, and the number of targets."""
    targets = int((batch["labels"][:, 1:] != -100).sum())
    return model(**batch).loss * targets, targets


@torch.no_grad()
def validate(model: Any, held_out: list[np.ndarray], context: int) -> dict[str, float]:
    """Mean loss in nats a token of held-out documents (cut at ``context``): all, by document length and place."""
    sums: dict[str, list[float]] = {}
    model.eval()
    for document in held_out:
        ids = torch.from_numpy(np.append(document, EOS)[:context])[None]
        logits = model(input_ids=ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
        kind = "short" if len(document) < 256 else "middle" if len(document) < 1024 else "long"
        parts = {"all": losses, f"{kind}_documents": losses, "first_64": losses[:64], "beyond_1024": losses[1024:],
                 "end": losses[-1:] if len(document) < context else losses[:0]}  # fmt: skip
        for name, part in parts.items():
            total = sums.setdefault(name, [0.0, 0])
            total[0], total[1] = total[0] + float(part.sum()), total[1] + len(part)
    model.train()
    return {f"loss_{name}": total / max(count, 1) for name, (total, count) in sums.items()}


def train(name: str, data: Corpus, options: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """One run of ``steps`` optimizer steps: CPU seconds of training alone, and validation along the way."""
    model = llama(options["hidden"], options["layers"], options["heads"], options["context"], seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"], betas=(0.9, 0.95), weight_decay=0.033)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.01 + 0.495 * (1 + math.cos(math.pi * min(step / steps, 1)))),
    )
    seconds, tokens, curve = 0.0, 0, []
    by_length: dict[int, int] = {}
    batches: Iterator[list[Batch]] = arm_steps(name, data.train, {**options, "steps": steps}, seed)
    for step, micro_batches in zip(range(steps), batches, strict=False):
        start = time.process_time()
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        for batch in micro_batches:
            (loss_sum(model, batch)[0] / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.process_time() - start
        for batch in micro_batches:
            tokens += batch["input_ids"].numel()
            by_length[batch["input_ids"].shape[1]] = (
                by_length.get(batch["input_ids"].shape[1], 0) + batch["input_ids"].numel()
            )
        if (step + 1) % options["validate_every"] == 0 or step + 1 == steps:
            curve.append(
                {"step": step + 1, "cpu_seconds": seconds, **validate(model, data.held_out, options["context"])}
            )
    flops = training_flops(model, by_length, causal=True)
    return {"arm": name, "seed": seed, "steps": step + 1, "tokens": tokens, "cpu_seconds": seconds, "flops": flops,
            "tokens_by_length": by_length, "curve": curve, **curve[-1]}  # fmt: skip


def quality(arguments: argparse.Namespace) -> None:
    """Train every arm on every seed, keep finished runs, and write rows and their means."""
    options = {
        "hidden": 64, "layers": 2, "heads": 4, "lr": 3e-3, "shortest": 64, "context": arguments.context,
        "tokens_per_step": 2 * arguments.context, "steps": arguments.steps,
        "validate_every": max(arguments.steps // 5, 1),
    }  # fmt: skip
    data = corpus(arguments.data, arguments.held_out)
    settings = {**options, "documents": len(data.train), "document_tokens": sum(map(len, data.train)),
                "held_out": len(data.held_out), "seeds": arguments.seeds}  # fmt: skip
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for name in arguments.arms:
        for seed in range(arguments.seeds):
            steps = options["steps"]
            if name == "concat-chunk-equal-time":  # as many steps as fit in the time that the buckets took
                ratio = (
                    runs["buckets-equal-grow-p2x8", seed]["cpu_seconds"] / runs["concat-chunk", seed]["cpu_seconds"]
                )
                steps = round(steps * ratio)
            path = work / f"{name}-{seed}.json"
            if not path.is_file():
                path.write_text(json.dumps(train(name, data, options, seed, steps)))
            runs[name, seed] = json.loads(path.read_text())
            print(
                name,
                seed,
                {k: v for k, v in runs[name, seed].items() if k not in ("curve", "tokens_by_length")},
                flush=True,
            )
    report_quality(runs, settings, arguments)


def report_quality(runs: dict[tuple[str, int], dict[str, Any]], settings: dict[str, Any], arguments: Any) -> None:
    """Rows of every run, means over seeds, speed-ups measured and predicted, and the picture of loss over time."""
    report = Report(f"buckets_{arguments.part}", settings)
    for run in runs.values():
        report.row(**{name: value for name, value in run.items() if name not in ("curve", "tokens_by_length", "step")})
    base = [runs["concat-chunk", seed] for seed in range(arguments.seeds)]
    for name in arguments.arms:
        own = [runs[name, seed] for seed in range(arguments.seeds)]
        losses = [name for name in own[0] if name.startswith("loss_")]
        speed_ups = [
            b["cpu_seconds"] / b["tokens"] * r["tokens"] / r["cpu_seconds"] for b, r in zip(base, own, strict=True)
        ]
        predicted = [b["flops"] / b["tokens"] * r["tokens"] / r["flops"] for b, r in zip(base, own, strict=True)]
        reached = [_seconds_to_loss(r["curve"], b["loss_all"]) for b, r in zip(base, own, strict=True)]
        report.row(
            arm=name, seed="mean",
            tokens=statistics.mean(r["tokens"] for r in own),
            cpu_seconds=statistics.mean(r["cpu_seconds"] for r in own),
            **{loss: statistics.mean(r[loss] for r in own) for loss in losses},
            wins_on_loss=sum(r["loss_all"] <= b["loss_all"] for b, r in zip(base, own, strict=True)),
            speed_up=statistics.median(speed_ups),
            predicted_speed_up=statistics.median(predicted),
            seconds_to_concat_chunk_loss=None if None in reached else statistics.mean(filter(None, reached)),
        )  # fmt: skip
    report.save()
    if arguments.part == "quality":
        _plot(runs, arguments)


def _seconds_to_loss(curve: list[dict[str, float]], loss: float) -> float | None:
    """CPU seconds until validation first reaches ``loss``, linear between validations; None if it never does."""
    before = None
    for point in curve:
        if point["loss_all"] <= loss:
            if before is None or before["loss_all"] == point["loss_all"]:
                return point["cpu_seconds"]
            share = (before["loss_all"] - loss) / (before["loss_all"] - point["loss_all"])
            return before["cpu_seconds"] + share * (point["cpu_seconds"] - before["cpu_seconds"])
        before = point
    return None


def _plot(runs: dict[tuple[str, int], dict[str, Any]], arguments: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in arguments.arms:
        curves = [runs[name, seed]["curve"] for seed in range(arguments.seeds)]
        points = [
            (statistics.mean(p["cpu_seconds"] for p in same), statistics.mean(p["loss_all"] for p in same))
            for same in zip(*curves, strict=False)
        ]
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(
        xlabel="CPU seconds of training",
        ylabel="validation loss (nats a byte)",
        title=f"mean of {arguments.seeds} seeds",
    )
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "buckets_quality.png", dpi=110)


def step_seconds(model: Any, batch: Batch, repeats: int) -> dict[str, float]:
    """Median CPU seconds of a forward and backward pass, after one that is not counted, and their parts by kind."""

    def step() -> None:
        loss_sum(model, batch)[0].backward()
        model.zero_grad()

    measured = []
    for _ in range(repeats + 1):
        start = time.process_time()
        step()
        measured.append(time.process_time() - start)
    seconds = statistics.median(measured[1:])
    return {"seconds": seconds, **{kind: share * seconds for kind, share in shares_by_kind(step).items()}}


def speed(arguments: argparse.Namespace) -> None:
    """Seconds a step at one context of 8192 tokens, by length, and the speed-ups of the mixtures."""
    context, shapes = 8192, {name: SHAPES[name] for name in arguments.shapes}
    report = Report("buckets_speed", {"context": context, "tokens_per_step": context, "shapes": shapes})
    data = corpus(arguments.data, arguments.held_out)
    rows, _ = buckets(data.train, 256, context, context, 0, "drop")
    of_library = {
        1 << int(k): int(n) << int(k) for k, n in zip(*np.unique(rows["bucket"], return_counts=True), strict=True)
    }
    mixtures = {"paper >= 256 (equal)": PAPER_TABLE_1, "library, natural": of_library}
    for shape, (hidden, layers, heads) in shapes.items():
        model = llama(hidden, layers, heads, context, 0).train()
        seconds = {}
        for length in sorted(PAPER_TABLE_1):
            ids = np.random.default_rng(0).integers(0, 256, (context // length, length))
            seconds[length] = step_seconds(model, batch_of(ids), arguments.repeats)
            rate = context / seconds[length]["seconds"]
            report.row(shape=shape, layout="bucket", length=length, **seconds[length], tokens_per_second=rate)
        for name, mixture in mixtures.items():
            report.row(shape=shape, layout="mixture", mixture=name, **speed_ups(model, seconds, mixture, context))
        packed = _packed_row(data, context)
        taken = step_seconds(model, packed, 1)
        rate = packed["input_ids"].numel() / taken["seconds"]
        report.row(shape=shape, layout="trl-bfd row", length=context, **taken, tokens_per_second=rate)
        report.save()


def speed_ups(
    model: Any, seconds: dict[int, dict[str, float]], mixture: dict[int, float], context: int
) -> dict[str, float]:
    """Speed-up of a mixture over rows of ``context`` tokens at equal tokens: measured, and predicted in three ways.

    By the FLOP formula, with attention to the unmasked half or to all; and by the profile of the rows of ``context``
    tokens, which knows what the formula leaves out (see `foretold_seconds`). None looks at shorter sequences.
    """
    total = sum(mixture.values())
    share = {length: tokens / total for length, tokens in mixture.items()}
    base = dict(seconds[context])
    whole = base.pop("seconds")
    predicted = {
        name: training_flops(model, {context: 1.0}, causal) / training_flops(model, share, causal)
        for name, causal in (("causal", True), ("dense", False))
    }
    predicted["profile"] = whole / sum(
        part * foretold_seconds(base, context, length) for length, part in share.items()
    )
    measured = whole / sum(part * seconds[length]["seconds"] for length, part in share.items())
    ratios = {f"of_{name}": measured / value for name, value in predicted.items()}
    return {"speed_up": measured, **{f"predicted_{name}": value for name, value in predicted.items()}, **ratios}


def _packed_row(data: Corpus, context: int) -> Batch:
    rows = (step[0] for step in packs(data.train[:600], context, context, 0))
    return next(row for row in rows if row["input_ids"].shape[1] > 0.95 * context)


def overhead(arguments: argparse.Namespace) -> None:
    """Decomposition from Arrow, and a sampler over 100 million simulated sequences."""
    report = Report("buckets_overhead", {"sequences": arguments.sequences, "documents": 40_000})
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.7, 1.2, 40_000).astype(np.int64) + 1, 200_000)
    with tempfile.TemporaryDirectory() as folder:
        flat = np.split(rng.integers(0, 50_000, int(lengths.sum())), np.cumsum(lengths)[:-1])
        as_dataset(flat).save_to_disk(folder)
        documents = datasets.load_from_disk(folder)
        for options in ({}, {"eos_token_id": 1}, {"eos_token_id": 1, "remainder": "pad"}):
            rates = []
            for repeat in range(arguments.repeats):
                start = time.process_time()
                decompose(documents, batch_size=1000 + repeat, **options)  # another batch size is not in the cache
                rates.append((lengths.sum() + len(lengths)) / (time.process_time() - start))
            report.row(what="decompose", options=str(options), tokens_per_second=statistics.median(rates))
    exponents = rng.choice(np.arange(8, 14, dtype=np.int8), arguments.sequences, p=np.array([32, 16, 8, 4, 2, 1]) / 63)
    start = time.process_time()
    sampler = BucketBatchSampler(exponents.astype(np.int8), 64 * 8192, micro_batches=8)
    created = time.process_time()
    sampler.batch(0)
    planned = time.process_time()
    chosen = rng.integers(0, len(sampler), 20_000).tolist()
    start_look_up = time.process_time()
    for index in chosen:
        sampler.batch(index)
    looked_up = (time.process_time() - start_look_up) / len(chosen)
    epoch = sampler._plan()
    kept = sum(array.nbytes for array in (epoch.rows, epoch.order, epoch.earlier, sampler._exponents))
    tracemalloc.start()
    sampler.set_epoch(1)
    sampler.batch(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    report.row(
        what="sampler",
        sequences=arguments.sequences,
        steps=sampler.steps,
        create_seconds=created - start,
        plan_seconds=planned - created,
        look_up_microseconds=looked_up * 1e6,
        kept_bytes_a_sequence=kept / arguments.sequences,
        peak_planning_bytes_a_sequence=peak / arguments.sequences,
    )
    report.save()


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "control", "speed", "overhead"))
    parser.add_argument("--data", type=Path, help="folder with .txt documents (default: the interpreter's library)")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps finished training runs, to go on after an interrupt"
    )
    parser.add_argument("--arms", nargs="+", choices={arm for arms in ARMS.values() for arm in arms})
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models of the part speed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=100_000_000)
    arguments = parser.parse_args()
    arguments.arms = arguments.arms or ARMS.get(arguments.part)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    {"quality": quality, "control": quality, "speed": speed, "overhead": overhead}[arguments.part](arguments)


if __name__ == "__main__":
    main()
