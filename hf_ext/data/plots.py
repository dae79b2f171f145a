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
    """Draw the sequence length of every step of an epoch, its running mean, and where cycles begin.

    Args:
        sampler: a `BucketBatchSampler`.
        path: image file.
        epoch: default the sampler's own.
    """
    pyplot = _pyplot()
    schedule = sampler.schedule(epoch)
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    axes.scatter(np.arange(len(schedule)), schedule, s=4, alpha=0.6, label="one step")
    window = max(1, len(schedule) // sampler.cycles // 5)
    means = np.convolve(schedule, np.ones(window) / window, mode="valid")
    middles = np.arange(len(means)) + (window - 1) / 2
    axes.plot(middles, means, color="black", linewidth=1, label=f"mean of {window} steps")
    for cycle in range(1, sampler.cycles):
        begin = int((sampler.batches * cycle // sampler.cycles).sum())
        axes.axvline(begin - 0.5, color="grey", linewidth=0.5, linestyle=":")
    axes.set_yscale("log", base=2)
    axes.set_yticks(sampler.lengths, [str(length) for length in sampler.lengths])
    axes.set(xlabel="optimizer step", ylabel="sequence length (tokens)")
    axes.set_title(f"{sampler.tokens_per_batch:,} tokens a step, {sampler.cycles} cycles", fontsize=9, loc="right")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
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
