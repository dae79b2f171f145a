"""Where the time of a training step goes, and what that foretells for sequences of another length."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Operations by the beginning of their names; all others (norms, rotary, activations, the loss, copies) are "rest".
KINDS = {"attention": ("aten::_scaled_dot_product",), "matrix": ("aten::mm", "aten::addmm", "aten::bmm")}


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

    Attention grows with the length, as in the FLOP formula; the rest, which the formula leaves out, does not.
    """
    return sum(spent * (length / at if kind == "attention" else 1) for kind, spent in seconds.items())
