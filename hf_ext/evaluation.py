"""Perplexity of a causal language model on a text: tokenised once, in windows, with any cache.

The text's tokens ``x_1 ... x_T`` are cut into windows of W tokens that begin S tokens apart (S = W: not overlapping).
A window scores those of its tokens that no earlier window scored and that have a token before them in the window:
``nats = -log P(x_i | the window's tokens before i)``. Perplexity is ``exp(mean nats)``. With S = W every window but a
shorter last one scores W - 1 tokens, which is the usual "non-overlapping windows" figure; a smaller S gives every
token more context and costs W / S times as much.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

ROWS = 256  # rows of logits turned into float32 at once, so that no second [T, V] tensor is made


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        nats: mean negative log-likelihood of a scored token.
        tokens: how many tokens were scored.
        windows: how many windows they came from.
    """

    nats: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """``exp(nats)``; infinite where that exceeds a float."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """The token ids ``[T]`` of a whole text, with whatever special tokens the tokenizer puts around a text."""
    ids = tokenizer(text, verbose=False)["input_ids"]  # not verbose: a text longer than the context is meant
    return torch.tensor(ids, dtype=torch.long)


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """``(begin, end, scored_from)`` of every window of a text of ``length`` tokens; together they score each once.

    Example:
        ```python
        windows(10, 4, 4)   # [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
        windows(10, 4, 2)   # [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
        ```
    """
    found: list[tuple[int, int, int]] = []
    scored = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        first = max(scored, begin + 1)
        if first < end:
            found.append((begin, end, first))
        scored = end
        if end == length:
            break
    return found


def perplexity(
    model: Any,
    ids: Tensor,
    window: int = 2048,
    stride: int | None = None,
    *,
    cache: Callable[[], Any] | None = None,
    chunk: int | None = None,
    max_windows: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Measure perplexity.

    Args:
        model: a causal language model of transformers; evaluated in eval mode and left in the mode it had.
        ids: ``[T]`` or ``[1, T]`` token ids of the whole text, for example from `tokenize`.
        window: W, tokens a window.
        stride: S, tokens from one window's beginning to the next's; ``window`` when None.
        cache: makes a new cache for each window, for example ``lambda: make_cache(model, "sirllm")``; the window is
            then read through it in chunks, so a bounded cache can have windows longer than the model's context.
        chunk: tokens a forward, 64 with a cache (a token never sees what was evicted before its chunk) and the whole
            window without.
        max_windows: measure only that many windows from the beginning.
        progress: show a progress bar.

    Raises:
        ValueError: the text is too short, a size is out of range, or the window exceeds the model's context.
    """
    ids = ids.reshape(-1)
    stride = window if stride is None else stride
    chunk = chunk or (64 if cache is not None else window)
    _check(model, ids, window, stride, chunk, max_windows, cache is not None)
    todo = windows(len(ids), window, stride)[:max_windows]
    total, tokens, training = 0.0, 0, model.training
    model.eval()
    try:
        with tqdm(total=sum(end - begin for begin, end, _ in todo), unit="tokens", disable=not progress) as bar:
            for begin, end, first in todo:
                made = None if cache is None else cache()
                total += _window_nats(model, ids[begin:end], first - begin, made, chunk, bar)
                tokens += end - first
                bar.set_postfix(perplexity=f"{Perplexity(total / tokens, tokens, 1).perplexity:.2f}")
    finally:
        model.train(training)
    return Perplexity(total / tokens, tokens, len(todo))


@torch.no_grad()
def _window_nats(model: Any, ids: Tensor, first: int, cache: Any, chunk: int, bar: Any) -> float:
    """Sum of nats of ``ids[first:]``, reading ``ids`` in forwards of ``chunk`` tokens."""
    ids = ids.to(model.device)[None]
    if cache is None and chunk < ids.shape[1]:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    use = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    total = 0.0
    for begin in range(0, ids.shape[1], chunk):
        end = min(begin + chunk, ids.shape[1])
        logits = model(input_ids=ids[:, begin:end], **use).logits[0]
        targets = ids[0, begin + 1 : end + 1]
        skip = max(first - 1 - begin, 0)
        total += _sum_nats(logits[: len(targets)][skip:], targets[skip:])
        bar.update(end - begin)
    return total


def _sum_nats(logits: Tensor, targets: Tensor) -> float:
    """Sum of ``-log softmax(logits)[target]`` over rows, ``[T, V]`` and ``[T]``, a few rows at a time."""
    pieces = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return sum(functional.cross_entropy(row.float(), target, reduction="sum").item() for row, target in pieces)


def _check(
    model: Any, ids: Tensor, window: int, stride: int, chunk: int, max_windows: int | None, bounded: bool
) -> None:
    if len(ids) < 2:
        raise ValueError(f"perplexity needs a text of at least 2 tokens, got {len(ids)}.")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to the window ({window}), got {stride}.")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}.")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1, got {max_windows}.")
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not bounded and longest and min(window, len(ids)) > longest:
        raise ValueError(f"window must be at most the model's context of {longest} tokens, got {window}.")
