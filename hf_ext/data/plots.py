"""Pictures of a decomposition and of a curriculum."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_ext.data.statistics import BucketStatistics


def plot_statistics(statistics: BucketStatistics, path: str | Path) -> Path:
    """Draw the tokens of each bucket, with the average sequence and context length, into an image file."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    lengths = list(statistics.tokens)
    axes.bar([str(length) for length in lengths], [statistics.tokens[length] for length in lengths])
    axes.set(xlabel="sequence length (tokens)", ylabel="tokens")
    axes.set_title(
        f"{statistics.total_tokens:,} tokens, average sequence {statistics.average_sequence_length:.0f}, "
        f"context {statistics.average_context_length:.0f}",
        fontsize=9,
    )
    return _save(pyplot, figure, path)


def plot_schedule(sampler: Any, path: str | Path, epoch: int | None = None) -> Path:
    """Draw the sequence length of every step of an epoch, and its mean over a fortieth of the epoch.

    Args:
        sampler: a `BucketBatchSampler`.
        path: image file.
        epoch: default the sampler's own.
    """
    pyplot = _pyplot()
    schedule = sampler.schedule(epoch)
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    axes.scatter(np.arange(len(schedule)), schedule, s=3, alpha=0.5, label="one step")
    window = max(1, len(schedule) // 40)
    means = np.convolve(schedule, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(len(means)) + window / 2, means, color="black", linewidth=1, label=f"mean of {window} steps")
    axes.set_yscale("log", base=2)
    axes.set(xlabel="optimizer step", ylabel="sequence length (tokens)")
    axes.set_title(f"{sampler.tokens_per_batch:,} tokens a step, {sampler.cycles} cycles", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    return _save(pyplot, figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Drawing needs matplotlib: pip install "hf_ext[demo]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, path: str | Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return Path(path)
