"""Log-probabilities of frozen policies kept in the dataset: two columns for each policy, whatever the multipliers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STORED = ("prev{}_chosen_logps", "prev{}_rejected_logps")
TOLERANCE = 0.02  # of the log-probability, or half a nat: above the rounding of bfloat16, below another model


def has_stored(dataset: Any, k: int) -> bool:
    """Whether the dataset holds the log-probabilities of ``pi_k``."""
    return all(column.format(k) in (getattr(dataset, "column_names", None) or ()) for column in STORED)


def read_stored(dataset: Any, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]`` of chosen and rejected under ``pi_k``."""
    chosen, rejected = (torch.tensor(dataset[column.format(k)], dtype=torch.float32) for column in STORED)
    return chosen, rejected


def refuse_other_model(stored: Sequence[Tensor], seen: Sequence[Tensor], k: int) -> None:
    """Refuse columns that differ from what the model gives for their first rows.

    Raises:
        ValueError: they are of another model, prompt or length, and training would read a wrong margin.
    """
    for column, kept, now in zip(STORED, stored, seen, strict=True):
        kept, now = kept[: len(now)], now.float().cpu()
        if ((kept - now).abs() > (TOLERANCE * now.abs()).clamp_min(0.5)).any():
            raise ValueError(
                f"Column {column.format(k)} was computed with another model, chat template or max_length: it holds "
                f"{kept.tolist()} where this reference gives {now.tolist()}. Remove the column."
            )
