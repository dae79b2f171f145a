"""How many tokens each layer may keep: schedules as pure functions of the layer, the number of layers and a length.

PyramidInfer (arXiv 2405.12532) keeps fewer tokens the deeper a layer lies; a layer works on what the one before it
kept. PyramidKV (arXiv 2406.02069) shares one budget out linearly. Both are here, with the released settings.
"""

import functools
import math
import re
from dataclasses import dataclass, replace

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class PyramidSchedule:
    """The released schedule of PyramidInfer for a prompt.

    Attributes:
        decay: the ratio that the deepest layer would keep of what the layer before it kept (the paper's p).
        recent_ratio: share of the prompt's latest tokens that always stay, and that vote.
        min_context: older tokens below which nothing more is dropped.
        interval: layers between two cuts.
        clamp: a cut that would go below ``min_context`` stops there; released is to leave that cut out, which makes
            what is kept jump up where the decay falls.
        flat_from: not in the paper: from this layer on (1 is the second) every layer keeps the share ``decay`` of the
            older tokens, and nothing is dropped before; 0 for the released cosine.
    """

    decay: float = 0.9
    recent_ratio: float = 0.2
    min_context: int = 64
    interval: int = 1
    clamp: bool = False
    flat_from: int = 0

    def window(self, length: int) -> int:
        """Latest tokens of a prompt of ``length`` that stay and vote: ``1 + int(recent_ratio * length)``."""
        return min(1 + int(self.recent_ratio * length), length)

    def keep_ratio(self, layer: int, layers: int) -> float:
        """Share of its older tokens that ``layer`` hands on: 1 at first, falling as a cosine to ``decay``."""
        return (1 - self.decay) * (math.cos(math.pi * layer / layers) + 1) / 2 + self.decay

    def hand_on(self, context: int, length: int, layer: int, layers: int) -> int:
        """How many of ``context`` older tokens ``layer`` hands on, for a prompt of ``length``."""
        older = max(length - self.window(length), 0)
        least = min(self.min_context, older)
        if self.flat_from:
            return context if layer + 1 < self.flat_from else min(max(int(self.decay * older), least), context)
        ratio = self.keep_ratio(layer, layers)
        if layer % self.interval or context <= least or ratio >= 1:
            return context
        kept = int(context * ratio)
        if kept > least:
            return kept
        return least if self.clamp else context

    def lengths(self, length: int, layers: int) -> list[int]:
        """Tokens each layer stores for a prompt of ``length``."""
        window = self.window(length)
        context, stored = length - window, []
        for layer in range(layers):
            stored.append(context + window)
            context = self.hand_on(context, length, layer, layers)
        return stored

    def kept(self, length: int, layers: int) -> float:
        """Share of the keys and values of all layers that stays."""
        return sum(self.lengths(length, layers)) / (layers * length)


@functools.lru_cache(maxsize=256)
def solve_decay(target: float, length: int, layers: int, schedule: PyramidSchedule | None = None) -> PyramidSchedule:
    """The schedule that keeps the share ``target`` of a prompt of ``length``, found by bisection.

    Raises:
        ValueError: even the steepest decay keeps more than ``target``.
    """
    base = schedule or PyramidSchedule()

    def with_decay(decay: float) -> PyramidSchedule:
        return replace(base, decay=decay, clamp=True)

    low, high = 0.0, 1.0
    least = with_decay(low).kept(length, layers)
    if least > target:
        raise ValueError(
            f"target_ratio {target} cannot be reached for {length} tokens: the first layers, the recent tokens "
            f"({base.recent_ratio:.0%}) and min_context ({base.min_context}) alone keep {least:.3f}. A lower "
            f"recent_ratio keeps less."
        )
    if target >= 1:
        return with_decay(1.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if with_decay(middle).kept(length, layers) > target else (middle, high)
    return with_decay(low)


def generation_keep(layer: int, layers: int, block: int = 16, ratio: float = 0.9, decay: float = 0.1) -> int:
    """How many of ``block`` generated tokens PyramidInfer keeps in ``layer``: most in the first, one in the last."""
    share = ratio * (math.cos(math.pi * layer / layers) + 1) / 2 + decay
    return max(int(block * ratio * share), 1)


def linear_budgets(
    average: int, layers: int, beta: float = 20.0, least: int = 1, most: int | None = None
) -> list[int]:
    """PyramidKV's budgets: from ``2 * average - average / beta`` falling linearly to ``average / beta``.

    They add up to ``average * layers`` but for rounding, and none is below ``least``. Where the first would be above
    ``most`` (a layer cannot keep more than there is), the line is less steep, as in kvpress.
    """
    last = max(int(average / beta), least)
    if most is not None:
        last = max(last, 2 * average - most)
    first = max(2 * average - last, last)
    if layers == 1:
        return [average]
    return [max(round(first - (first - last) * layer / (layers - 1)), least) for layer in range(layers)]


def parse_bytes(text: str) -> int:
    """Bytes that a size such as ``"64MiB"`` or ``"1.5 GB"`` names.

    Raises:
        ValueError: it names none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f'a size in bytes must look like "64MiB" or "1.5GB", got {text!r}.')
    return int(float(found[1]) * UNITS[found[2]])


def check_budget(budget: int | float | str) -> None:
    """Raise `ValueError` unless this is a whole number of tokens, a ratio in (0, 1] or a size in bytes."""
    if isinstance(budget, str):
        parse_bytes(budget)
    elif isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"budget must be a number of tokens, a ratio or a size such as '64MiB', got {budget!r}.")
    elif isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"a budget that is a ratio must be above 0 and at most 1, got {budget}.")
    elif isinstance(budget, int) and budget < 1:
        raise ValueError(f"a budget of tokens must be at least 1, got {budget}.")
