"""What every benchmark needs: a report with hardware, versions and settings, medians, and files to keep.

Example:
    ```python
    report = Report("sirllm", {"model": name, "budget": 1024})
    for tokens in (4096, 16384):
        report.row(cache="sirllm", tokens=tokens, seconds=report.time(lambda: stream(tokens), repeats=3))
    report.save()                                   # benchmarks/results/sirllm.json and sirllm.csv
    ```
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "triton", "numpy")


class Report:
    """Rows of one benchmark, with where and how they were measured.

    Attributes:
        stem: name of the benchmark and of its result files.
        settings: what was chosen for this run: model, budgets, seeds, data.
        rows: one dict per measurement, in the order measured.
    """

    def __init__(self, stem: str, settings: Mapping[str, Any] | None = None, folder: Path = RESULTS) -> None:
        self.stem = stem
        self.settings = dict(settings or {})
        self.folder = Path(folder)
        self.rows: list[dict[str, Any]] = []

    def row(self, **values: Any) -> dict[str, Any]:
        """Add one measurement, print it, and return it."""
        self.rows.append(values)
        print(f"{self.stem}: " + "  ".join(f"{name}={_short(value)}" for name, value in values.items()), flush=True)
        return values

    def time(self, function: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> float:
        """Median seconds of ``repeats`` calls after ``warmup`` unmeasured ones."""
        return self.interleaved({"": function}, repeats, warmup)[""]

    def interleaved(
        self, functions: Mapping[str, Callable[[], Any]], repeats: int = 3, warmup: int = 1
    ) -> dict[str, float]:
        """Median seconds of each function, called in turn so that a slow phase of the machine meets all alike."""
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        for _ in range(warmup):
            for function in functions.values():
                function()
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                seconds[name].append(_seconds(function))
        return {name: statistics.median(measured) for name, measured in seconds.items()}

    def save(self) -> Path:
        """Write ``<stem>.json`` (everything) and ``<stem>.csv`` (the rows), each at once; return the JSON's path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.stem}.json"
        record = {"benchmark": self.stem, "machine": machine(), "settings": self.settings, "rows": self.rows}
        _replace(path, json.dumps(record, indent=1, default=str) + "\n")
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = path.with_suffix(".csv.new")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(table, path.with_suffix(".csv"))
        return path

    def draw(self, x: str, panels: Mapping[str, str], by: str) -> Path:
        """Draw ``<stem>.png``: a panel for each of ``panels`` (column -> axis label), a line for each ``by``."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
        for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
            for name in dict.fromkeys(row[by] for row in self.rows):
                points = [(row[x], row[column]) for row in self.rows if row[by] == name]
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set_xscale("log", base=2)
            ticks = sorted({row[x] for row in self.rows})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.set(xlabel=x, ylabel=label, ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].legend(frameon=False)
        figure.tight_layout()
        path = self.folder / f"{self.stem}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return path


def machine() -> dict[str, Any]:
    """Hardware, threads and versions of this run."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("hf_ext", *LIBRARIES) if _version(name)},
        "commit": _commit(),
    }


def _seconds(function: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return found.stdout.strip() or None if found.returncode == 0 else None


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
