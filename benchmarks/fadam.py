"""FAdam beside AdamW: time and memory of a step, convergence of a small language model, a spike in the gradients.

    python benchmarks/fadam.py step [--peer DIR]     # DIR: a folder with pytorch_optimizer 4.1.0, to time it too
    python benchmarks/fadam.py parity --peer DIR     # seconds
    python benchmarks/fadam.py convergence           # about ten minutes on one core; goes on where it stopped
    python benchmarks/fadam.py updates               # FAdam's steps beside AdamW's on the same gradients
    python benchmarks/fadam.py spike

Times are process CPU time on one thread, the optimizers taking turns at every repeat. The text is that of
``pydoc_data.topics``, which every Python has, as bytes; the last tenth is held out.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from _fadam_task import Task, train
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
VARIATIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FAdam", {"clip": 0.5}),
    ("FAdam", {"weight_decay": 0.01}),
    ("FAdam", {"weight_decay": 0.03}),
    ("AdamW", {"weight_decay": 0.03}),
    ("AdamW", {"weight_decay": 0.3}),
    ("FAdam", {"head_clip": 5.0}),
    ("FAdam", {"clip": None, "decay_cap": 10.0}),
    ("FAdam", {"max_norm": math.inf}),
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
                ratio_of_medians=statistics.median(times[label]) / statistics.median(times[base]),
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


def convergence(report: Report, task: Task, options: argparse.Namespace) -> None:
    """Both optimizers on one grid and seed 0, the best settings of each on other seeds, then other options there."""
    finished = _finished(report)
    seeds = range(1, options.seeds + 1)

    def run(part: str, name: str, lr: float, beta2: float, seed: int, **varied: Any) -> float:
        row: dict[str, Any] = {"part": part, "optimizer": _label(name, **varied)}
        row |= {"lr": lr, "beta2": beta2, "seed": seed}
        done = finished.pop(tuple(row.values()), None)
        if done is None:
            _, loss, rms = train(task, name, lr, beta2, seed, **varied)
            done = {**row, "held_out_nats": loss, "weight_rms": rms}
        report.row(**done)
        _save(report, list(finished.values()))
        return float(done["held_out_nats"])

    best = {}
    for name in OPTIMIZERS:
        grid = itertools.product(options.learning_rates, options.beta2s)
        tuned = sorted((run("grid", name, lr, beta2, 0), lr, beta2) for lr, beta2 in grid)
        compared = []
        for _, lr, beta2 in tuned[: options.finalists]:
            losses = [run("compare", name, lr, beta2, seed) for seed in seeds]
            compared.append((statistics.mean(losses), lr, beta2, losses))
        best[name] = min(compared)
    base = best["AdamW"][-1]
    for name, (_, rate, decay_rate, losses) in best.items():
        report.row(part="best", optimizer=name, lr=rate, beta2=decay_rate, **_paired(losses, base))
    report.save()
    if options.vary:
        for name, varied in VARIATIONS:
            _, rate, decay_rate, _ = best[name]
            losses = [run("vary", name, rate, decay_rate, seed, **varied) for seed in seeds]
            report.row(
                part="vary", optimizer=_label(name, **varied), lr=rate, beta2=decay_rate, **_paired(losses, base)
            )


def _label(name: str, **varied: Any) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in varied.items())])


def _paired(losses: list[float], base: list[float]) -> dict[str, Any]:
    """Mean loss over the seeds, and its difference from ``base`` on the same seeds with its standard error."""
    differences = [loss - other for loss, other in zip(losses, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    mean = statistics.mean(differences)
    return {"seed": "mean", "held_out_nats": statistics.mean(losses), "minus_adamw": mean, "standard_error": error}


def updates(report: Report, task: Task, lr: float, beta2: float) -> None:
    """Along a training with AdamW, the steps that FAdam would take on the same gradients: their size and direction.

    Steps are without weight decay and divided by the learning rate. Means over the steps after the warm-up, a row
    for each tensor.
    """
    shadows = {"FAdam": {}, "FAdam without clip": {"clip": None}}
    found: dict[str, dict[str, list[float]]] = {}

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names, params = zip(*model.named_parameters(), strict=True)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        copies = {label: [nn.Parameter(p.detach().clone()) for p in params] for label in shadows}
        others = {
            label: FAdam(copies[label], lr=1.0, betas=(0.9, beta2), weight_decay=0, **varied)
            for label, varied in shadows.items()
        }
        before: list[Tensor] = []

        def shadow(*_: Any) -> None:
            before[:] = [p.detach().clone() for p in params]
            for label, other in others.items():
                for copy, p in zip(copies[label], params, strict=True):
                    copy.grad = p.grad
                other.step()

        def measure(*_: Any) -> None:
            rate = optimizer.param_groups[0]["lr"]
            for index, (name, p, old) in enumerate(zip(names, params, before, strict=True)):
                step = (old - p.detach()) / rate - decays[id(p)] * old
                row = found.setdefault(name, {})
                row.setdefault("AdamW_rms", []).append(_rms(step))
                for label, other in others.items():
                    momentum = other.state[copies[label][index]]["momentum"]  # the step at learning rate 1
                    row.setdefault(f"{label}_rms", []).append(_rms(momentum))
                    cosine = torch.cosine_similarity(step.flatten(), momentum.flatten(), dim=0).item()
                    row.setdefault(f"{label}_cosine", []).append(cosine)

        optimizer.register_step_pre_hook(shadow)
        optimizer.register_step_post_hook(measure)

    train(task, "AdamW", lr, beta2, 1, watch=watch)
    for name, columns in found.items():
        means = {column: statistics.mean(values[task.steps // 10 :]) for column, values in columns.items()}
        report.row(lr=lr, beta2=beta2, tensor=name, **means)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _finished(report: Report) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The trainings of this task that an earlier run has saved, also one with another grid."""
    path = report.folder / f"{report.stem}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    task = [field.name for field in fields(Task)]
    if any(record.get("settings", {}).get(name) != report.settings[name] for name in task):
        return {}
    names = ("part", "optimizer", "lr", "beta2", "seed")
    return {tuple(row.get(name) for name in names): row for row in record["rows"] if row["seed"] != "mean"}


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
    parser.add_argument("part", choices=("parity", "step", "convergence", "updates", "spike"))
    parser.add_argument("--peer", help="a folder with pytorch_optimizer 4.1.0")
    parser.add_argument("--suffix", default="", help="of the names of the results")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--finalists", type=int, default=3, help="settings of each optimizer that the seeds compare")
    parser.add_argument("--vary", action="store_true", help="then the best setting of each with other options")
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
        convergence(report, task, options)
    elif options.part == "updates":
        for lr, beta2 in itertools.product(options.learning_rates, options.beta2s):
            updates(report, task, lr, beta2)
    else:
        spikes(report, task)
    report.save()


if __name__ == "__main__":
    main()
