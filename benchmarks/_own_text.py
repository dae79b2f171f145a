"""Text that the model writes itself, kept between runs."""

import os
from pathlib import Path
from typing import Any

import torch


def own_text(
    model: Any, tokenizer: Any, windows: int, length: int, work: str | Path, seed: int = 0, batch: int | None = None
) -> torch.Tensor:
    """Token ids ``[windows, length]`` behind the token that separated documents in training.

    Written ``batch`` windows at a time, each batch from the next seed; None writes all at once.
    """
    batch = batch or windows
    seeds = range(seed, seed + -(-windows // batch))
    return torch.cat([_kept(model, tokenizer, batch, length, work, each) for each in seeds])[:windows]


def _kept(model: Any, tokenizer: Any, windows: int, length: int, work: str | Path, seed: int) -> torch.Tensor:
    from hf_ext.quant.calibration import sampled_windows

    kept = Path(work, f"own-{windows}x{length}-{seed}.pt")
    if not kept.exists():
        start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        torch.save(sampled_windows(model, windows, length, start, seed), unfinished)
        unfinished.replace(kept)
    return torch.load(kept)
