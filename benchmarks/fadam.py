"""FAdam beside AdamW: time and memory of a step, convergence of a small language model, a spike in the gradients.

    python benchmarks/fadam.py step [--peer DIR]     # DIR: a folder with pytorch_optimizer 4.1.0, to time it too
    python benchmarks/fadam.py parity --peer DIR     # seconds
    python benchmarks/fadam.py convergence           # about ten minutes on one core; goes on where it stopped
    python benchmarks/fadam.py spike

Times are process CPU time on one thread, the optimizers taking turns at every repeat. The text is that of
``pydoc_data.topics``, which every Python has, as bytes; the last tenth is held out.
"""

import argparse
import itertools
import json
import math
import pydoc_data.topics
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from _run import RESULTS, Report
from torch import Tensor, nn

from hf_ext import FAdam

SHAPES = {
    "56 tensors, 1.4M": [(256, 96), (4000, 96), *[(2000, 96)] * 2, *[(96, 96)] * 32, *[(96, 256)] * 12, *[(96,)] * 8],
    "41 tensors, 10.5M": [
        *[(8192, 256), (4096, 256)],
        *[(1024, 1024)] * 2,
        *[(256, 256)] * 16,
        *[(1024, 256)] * 12,
        *[(256, 1024)] * 4,
        *[(256,)] * 5,
    ],
}


OPTIMIZERS = ("AdamW", "FAdam")
VARIATIONS: tuple[dict[str, Any], ...] = (
    {"optim_bits": 8},
    *({"eps_mode": mode} for mode in ("fixed", "rms_min", "rms_max")),
    {"clip": None, "decay_cap": 10.0},
    {"max_norm": math.inf},
)


def parity(report: Report, peer: str, steps: int) -> None:
    """Largest difference of the parameters from pytorch_optimizer 4.1.0 after some steps in float64, by path."""
    sys.path.append(peer)
    from pytorch_optimizer import FAdam as PeerFAdam

    shapes = ((64, 32), (7,), (1,), (2, 3, 4))
    for p, clip in ((0.5, 1.0), (0.5, 0.5), (0.5, 2.0), (1.0, 1.0)):
        for label, path in (("loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
            ours = [param.double().detach().requires_grad_() for param in _parameters(list(shapes))]
            theirs = [param.detach().clone().requires_grad_() for param in ours]
            options = {"weight_decay": 0.1, "clip": clip, "p": p}
            mine = FAdam(ours, **options, **path)
            other = PeerFAdam(theirs, **options, momentum_dtype=torch.float64, fim_dtype=torch.float64)
            generator = torch.Generator().manual_seed(0)
            for step in range(steps):
                for x, y in zip(ours, theirs, strict=True):
                    scale = 1e-3 if step % 3 else 1e-8  # both sides of the stabiliser's minimum
                    x.grad = torch.randn(x.shape, generator=generator, dtype=x.dtype) * scale
                    y.grad = x.grad.clone()
                mine.step()
                other.step()
            difference = max((x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True))
            report.row(path=label, p=p, clip=clip, steps=steps, largest_difference=difference)


def step_costs(report: Report, peer: str | None, repeats: int) -> None:
    """CPU milliseconds of a step and bytes of state a parameter."""
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "AdamW loop": partial(torch.optim.AdamW, foreach=False),
        "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
        "AdamW fused": partial(torch.optim.AdamW, fused=True),
        "FAdam loop": partial(FAdam, foreach=False),
        "FAdam foreach": partial(FAdam, foreach=True),
        "FAdam fused": partial(FAdam, fused=True),
        "FAdam loop, no decay": partial(FAdam, foreach=False, weight_decay=0),
        "FAdam fused, no decay": partial(FAdam, fused=True, weight_decay=0),
        "FAdam fused, rms_min": partial(FAdam, fused=True, eps_mode="rms_min"),
        "FAdam 8-bit": partial(FAdam, optim_bits=8),
    }
    if peer:
        sys.path.append(peer)
        from pytorch_optimizer import FAdam as PeerFAdam

        makers["pytorch_optimizer 4.1.0 FAdam"] = PeerFAdam
    for name, shapes in SHAPES.items():
        optimizers = {label: make(_parameters(shapes)) for label, make in makers.items()}
        times = _process_times({label: optimizer.step for label, optimizer in optimizers.items()}, repeats)
        for label, optimizer in optimizers.items():
            base = "AdamW fused" if "fused" in label else "AdamW loop"
            report.row(
                model=name,
                optimizer=label,
                cpu_ms_min=1e3 * min(times[label]),
                cpu_ms_median=1e3 * statistics.median(times[label]),
                ratio=min(times[label]) / min(times[base]),
                ratio_to=base,
                state_bytes_per_parameter=_state_bytes(optimizer),
            )


def _parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return params


def _process_times(functions: dict[str, Callable[[], Any]], repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(warmup + repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if repeat >= warmup:
                times[name].append(time.process_time() - start)
    return times


def _state_bytes(optimizer: torch.optim.Optimizer) -> float:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for param in params for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in states if value.dim()) / sum(param.numel() for param in params)


def make_optimizer(name: str, model: nn.Module, lr: float, beta2: float, **options: Any) -> torch.optim.Optimizer:
    """AdamW with its customary decay of 0.1, or FAdam with its own of 0.001; vectors are not decayed."""
    decay = 0.1 if name == "AdamW" else 1e-3
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return (torch.optim.AdamW if name == "AdamW" else FAdam)(groups, lr=lr, betas=(0.9, beta2), **options)


@dataclass(frozen=True)
class Task:
    """The language model over bytes, and its training: ``batch`` windows of ``length`` bytes a step."""

    hidden: int
    layers: int
    length: int
    batch: int
    steps: int


def train(
    task: Task,
    name: str,
    lr: float,
    beta2: float,
    seed: int,
    max_norm: float = 1.0,
    spike: int | None = None,
    **options: Any,
) -> tuple[list[float], float, float]:
    """Train the small model; training losses by step, held-out loss (both nats per byte) and RMS of its matrices.

    ``spike`` is the step at which all gradients are replaced by normal noise of standard deviation 100.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=task.hidden,
        intermediate_size=8 * task.hidden // 3,
        num_hidden_layers=task.layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    train_bytes, held_out = _text()
    optimizer = make_optimizer(name, model, lr, beta2, **options)
    cosine = partial(_cosine, warmup=task.steps // 10, steps=task.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    losses = []
    for step, batch in enumerate(_batches(train_bytes, seed, task)):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        if step == spike:
            noise = torch.Generator().manual_seed(0)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=noise) * 100
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    return losses, _held_out_loss(model, held_out, task.length), matrices.square().mean().sqrt().item()


def _cosine(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def _text() -> tuple[Tensor, Tensor]:
    data = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def _batches(data: Tensor, seed: int, task: Task) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        starts = torch.randint(len(data) - task.length, (task.batch, 1), generator=generator)
        yield data[starts + torch.arange(task.length)]


@torch.no_grad()
def _held_out_loss(model: nn.Module, data: Tensor, length: int) -> float:
    windows = len(data) // length
    batches = data[: windows * length].view(windows, length).split(256)
    return sum(len(rows) * model(input_ids=rows, labels=rows).loss.item() for rows in batches) / windows


def convergence(
    report: Report, task: Task, seeds: int, finalists: int, learning_rates: list[float], beta2s: list[float]
) -> None:
    """Both optimizers on one grid and seed 0, the best settings of each on other seeds, then FAdam's options."""
    finished = _finished(report)

    def run(part: str, name: str, lr: float, beta2: float, seed: int, max_norm: float = 1.0, **options: Any) -> float:
        varied = {**({} if max_norm == 1 else {"max_grad_norm": max_norm}), **options}
        label = " ".join([name, *(f"{key}={value}" for key, value in varied.items())])
        row: dict[str, Any] = {"part": part, "optimizer": label, "lr": lr, "beta2": beta2, "seed": seed}
        done = finished.pop(tuple(row.values()), None)
        if done is None:
            _, loss, rms = train(task, name, lr, beta2, seed, max_norm, **options)
            done = {**row, "held_out_nats": loss, "weight_rms": rms}
        report.row(**done)
        _save(report, list(finished.values()))
        return float(done["held_out_nats"])

    best = {}
    for name in OPTIMIZERS:
        grid = itertools.product(learning_rates, beta2s)
        tuned = sorted((run("grid", name, lr, beta2, 0), lr, beta2) for lr, beta2 in grid)
        means = []
        for _, lr, beta2 in tuned[:finalists]:
            losses = [run("compare", name, lr, beta2, seed) for seed in range(1, seeds + 1)]
            means.append((statistics.mean(losses), lr, beta2))
        best[name] = min(means)
    for name, (mean, lr, beta2) in best.items():
        gap = mean - best["AdamW"][0]
        report.row(part="best", optimizer=name, lr=lr, beta2=beta2, seed="mean", held_out_nats=mean, minus_adamw=gap)
    report.save()
    _, lr, beta2 = best["FAdam"]
    for options in VARIATIONS:
        run("vary", "FAdam", lr, beta2, 1, **options)


def _finished(report: Report) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The trainings of this task that an earlier run has saved, also one with another grid."""
    path = report.folder / f"{report.stem}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    task = [field.name for field in fields(Task)]
    if any(record.get("settings", {}).get(name) != report.settings[name] for name in task):
        return {}
    names = ("part", "optimizer", "lr", "beta2", "seed")
    return {tuple(row.get(name) for name in names): row for row in record["rows"] if row["part"] != "best"}


def _save(report: Report, waiting: list[dict[str, Any]]) -> None:
    """Save with the trainings of an earlier run whose turn has not come, so that an interruption loses none."""
    own = report.rows
    report.rows = [*own, *waiting]
    report.save()
    report.rows = own


def spikes(report: Report, task: Task) -> None:
    """One step of noise in place of the gradients, with and without the hosts' clipping of the global norm."""
    curves = {}
    at = task.steps * 2 // 5
    for name in OPTIMIZERS:
        for max_norm in (math.inf, 1.0):
            losses, held_out, _ = train(task, name, 3e-3, 0.999, 0, max_norm, spike=at)
            label = f"{name}, " + ("no global clipping" if math.isinf(max_norm) else "max_grad_norm=1")
            report.row(optimizer=label, before=losses[at], next_step=losses[at + 1], held_out_nats=held_out)
            curves[label] = losses
    _plot(curves, at)


def _plot(curves: dict[str, list[float]], at: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, losses in curves.items():
        smooth = [statistics.mean(losses[max(0, k - 4) : k + 1]) for k in range(len(losses))]
        axes.plot(smooth, label=label, linestyle="--" if "no global" in label else "-", linewidth=1.2)
    axes.axvline(at, color="grey", linewidth=0.8)
    axes.set(
        xlabel="step", ylabel="training loss (nats per byte, mean of 5)", title="Gradients replaced by noise once"
    )
    axes.legend()
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "fadam_spike.png", dpi=100)


def main() -> None:
    """Run one part and save its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("parity", "step", "convergence", "spike"))
    parser.add_argument("--peer", help="a folder with pytorch_optimizer 4.1.0")
    parser.add_argument("--suffix", default="", help="of the names of the results")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finalists", type=int, default=3, help="settings of each optimizer that the seeds compare")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3, 1.2e-2])
    parser.add_argument("--beta2s", type=float, nargs="+", default=[0.95, 0.99, 0.999])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="bytes of a window")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    if options.part == "parity" and not options.peer:
        parser.error("parity needs --peer: a folder with pytorch_optimizer 4.1.0")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="weight_decay")  # the peer's default is compared as it is
    task = Task(options.hidden, options.layers, options.length, options.batch, options.steps)
    report = Report(f"fadam_{options.part}{options.suffix}", vars(options) | {"peer": bool(options.peer)})
    if options.part == "parity":
        parity(report, options.peer, options.steps)
    elif options.part == "step":
        step_costs(report, options.peer, options.repeats)
    elif options.part == "convergence":
        convergence(report, task, options.seeds, options.finalists, options.learning_rates, options.beta2s)
    else:
        spikes(report, task)
    report.save()


if __name__ == "__main__":
    main()
