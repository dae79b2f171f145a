"""Cross-Layer Attention on the real model: parameters, cache bytes, rows that fit, and seconds against dense.

Run: python benchmarks/cla.py size; python benchmarks/cla.py speed
Writes benchmarks/results/cla_size.json and cla_speed.json, with .csv beside them.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from _run import Report
from torch import Tensor

from hf_ext.default_model import load_model
from hf_ext.patches.cla_convert import convert_to_cla

BUDGET = 256 * 2**20  # bytes of keys and values


def stored_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache."""
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)


@torch.no_grad()
def filled(model: Any, ids: Tensor) -> Any:
    """The cache after one forward over ``[1, T]``."""
    return model(ids, logits_to_keep=1).past_key_values


def rows_within(cache: Any, budget: int) -> int:
    """How many rows of this length can be held at once: rows are added to a real cache until it is too large."""
    one = copy.deepcopy(cache)
    rows, grown = 0, one
    while stored_bytes(grown) <= budget:
        rows += 1
        grown = copy.deepcopy(one)
        grown.batch_repeat_interleave(rows + 1)
    return rows


def size() -> None:
    """Parameters and bytes, dense against sharing factors."""
    model, _ = load_model()
    report = Report("cla_size", {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "budget_bytes": BUDGET})
    ids = torch.arange(4096)[None] + 100
    with torch.no_grad():
        same = torch.equal(convert_to_cla(model, {"sharing_factor": 1})(ids[:, :64]).logits, model(ids[:, :64]).logits)
    report.settings["factor 1 bitwise equal to stock"] = same
    for factor in (1, 2, 3, 5):
        one = convert_to_cla(model, {"sharing_factor": factor})
        caches = {tokens: filled(one, ids[:, :tokens]) for tokens in ((512, 4096) if factor < 3 else (512,))}
        report.row(
            sharing_factor=factor,
            parameters=one.num_parameters(),
            bytes_per_token=one.kv_bytes_per_token(),
            bytes_at_512=stored_bytes(caches[512]),
            bytes_at_4096=stored_bytes(caches[4096]) if 4096 in caches else None,
            rows_of_512_in_budget=rows_within(caches[512], BUDGET),
        )
    report.save()


def cpu_seconds(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each function, called in turn: what other programs on the machine do does not count."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for attempt in range(repeats + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            found[name] += [time.process_time() - start] if attempt else []  # the first call warms up
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def speed(tokens: int, repeats: int) -> None:
    """CPU seconds of a prefill, a decoding step and a training step, dense and CLA2 in turn, on one thread."""
    torch.set_num_threads(1)
    model, _ = load_model()
    models = {"dense": model, "cla2": convert_to_cla(model, {"sharing_factor": 2})}
    ids = torch.arange(tokens)[None] + 100
    report = Report(
        "cla_speed", {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "tokens": tokens, "unit": "CPU seconds"}
    )

    def prefill(one: Any) -> None:
        with torch.no_grad():
            one(ids, logits_to_keep=1)

    def decode(one: Any, cache: Any) -> None:
        with torch.no_grad():
            one(ids[:, :1], past_key_values=cache)

    def train(one: Any) -> None:
        one(ids, labels=ids, use_cache=False).loss.backward()
        one.zero_grad()

    caches = {name: filled(one, ids) for name, one in models.items()}
    work = {
        "prefill": {name: lambda one=one: prefill(one) for name, one in models.items()},
        "decode 1 token": {name: lambda one=one, name=name: decode(one, caches[name]) for name, one in models.items()},
        "training step": {name: lambda one=one: train(one) for name, one in models.items()},
    }
    for name, functions in work.items():
        seconds = cpu_seconds(functions, repeats)
        report.row(work=name, **seconds, ratio=seconds["cla2"] / seconds["dense"])
    report.save()


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("size", "speed"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    size() if args.part == "size" else speed(args.tokens, args.repeats)


if __name__ == "__main__":
    main()
