"""Where the time of a training step goes, and what that foretells for sequences of another length."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Operations by the beginning of their names; all others (norms, rotary, activations, the loss, copies) are "rest".
KINDS = {"attention": ("aten::_scaled_dot_product",), "matrix": ("aten::mm", "aten::addmm", "aten::bmm")}
KEY_BLOCK = 512  # PyTorch's CPU kernel of causal attention computes whole blocks of so many keys


def shares_by_kind(step: Callable[[], Any]) -> dict[str, float]:
    """Share of one call's time that goes into attention, products with weights (``matrix``), and the rest."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    spent = dict.fromkeys((*KINDS, "rest"), 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "rest")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time / total for kind, time in spent.items()}


def foretold_seconds(seconds: Mapping[str, float], at: int, length: int) -> float:
    """Seconds of a step at ``length`` from those by kind of as many tokens at length ``at``.

    Beside the FLOP formula: the rest counts, at the same cost at every length; each kind at its own speed; and
    attention to the keys that the kernel computes, masked ones in a block among them.
    """
    growth = _keys_a_query(length) / _keys_a_query(at)
    return sum(spent * (growth if kind == "attention" else 1) for kind, spent in seconds.items())


def _keys_a_query(length: int) -> float:
    """Mean over the queries of a sequence, a power of two; half the length but for the blocks."""
    return length if length <= KEY_BLOCK else (length + KEY_BLOCK) / 2
