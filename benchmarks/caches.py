"""Compressed caches on a real model: perplexity and needles against bytes, bytes against tokens, and speed.

Parts, each with a result file of its own in benchmarks/results:

- ``quality``: prefill 1,024 tokens of WikiText-2 through each cache, score the next 256; a five-digit key hidden in
  prose is asked for, with the question inside and outside the compressed prompt. Peers of the host run in the same
  process when ``benchmarks/.venv-peers`` holds optimum-quanto and hqq.
- ``bytes``: what each cache holds after 256 to 4,096 tokens.
- ``speed``: prefill seconds and tokens a second of decoding, interleaved, median. Run it alone on the machine.
- ``plot``: the picture of the first part.

```bash
python benchmarks/caches.py quality --data wikitext2/wiki.test.part1.raw
python benchmarks/caches.py speed --tokens 2048
```
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _peers  # noqa: F401  (first of all: it extends the path)
import torch
from _run import RESULTS, Report
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, QuantizedCache

from hf_ext import make_cache
from hf_ext.caches.base import HfExtCache
from hf_ext.default_model import load_model

PREFILL, SCORED, STRIDE = 1024, 256, 4000
Make = Callable[[], Any]


def grouped(states: Tensor, bits: int) -> Tensor:
    """Asymmetric round-to-nearest over the last dimension, rebuilt."""
    low, high = states.amin(-1, keepdim=True), states.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return ((states - low) / step).round() * step + low


class KIVICache(DynamicCache):
    """KIVI's groups (arXiv 2402.02750), simulated: rebuilt numbers are stored, ``bits_per_number`` is what they cost.

    Keys in groups of ``group`` tokens of one channel, values in groups of channels of one token, float16 scale and
    offset each; the last ``group`` tokens stay as they are. The prompt is quantised after it ran, as in KIVI.
    """

    def __init__(self, config: Any, bits: int, group: int) -> None:
        super().__init__(config=config)
        self.bits, self.group = bits, group
        self.bits_per_number = bits + 32 / group

    def quantise(self) -> None:
        """Quantise everything but the last group."""
        for layer in self.layers:
            end = max(layer.keys.shape[2] // self.group - 1, 0) * self.group
            keys, values = layer.keys[:, :, :end], layer.values[:, :, :end]
            by_channel = keys.transpose(2, 3).unflatten(-1, (-1, self.group))
            layer.keys[:, :, :end] = grouped(by_channel, self.bits).flatten(-2).transpose(2, 3)
            width = min(self.group, values.shape[-1])
            layer.values[:, :, :end] = grouped(values.unflatten(-1, (-1, width)), self.bits).flatten(-2)

    def bytes(self) -> int:
        """What KIVI would store: packed groups, and one group in float16."""
        total = 0.0
        for layer in self.layers:
            per_token = 2 * layer.keys[:, :, 0].numel()
            end = max(layer.keys.shape[2] // self.group - 1, 0) * self.group
            total += per_token * (end * self.bits_per_number / 8 + (layer.keys.shape[2] - end) * 2)
        return int(total)


def methods(model: Any, peers: bool = True) -> dict[str, Make]:
    """Every cache of the comparison."""
    ours: dict[str, Any] = {
        "decoquant-8": {"type": "decoquant", "bits": 8},
        "decoquant-4": {"type": "decoquant", "bits": 4},
        "decoquant-2": {"type": "decoquant", "bits": 2},
        "decoquant-4 uniform (released)": {"type": "decoquant", "bits": 4, "method": "uniform"},
        "pyramid_infer 0.75": {"type": "pyramid_infer", "target_ratio": 0.75},
        "pyramid_infer 0.45": {"type": "pyramid_infer", "target_ratio": 0.45, "recent_ratio": 0.1},
        "pyramid_infer_cache 0.45": {"type": "pyramid_infer_cache", "target_ratio": 0.45, "recent_ratio": 0.1},
        "pyramid 0.75 + decoquant-4": [{"type": "pyramid_infer", "target_ratio": 0.75}, {"type": "decoquant"}],
        "pyramid 0.75 + decoquant-2": [
            {"type": "pyramid_infer", "target_ratio": 0.75},
            {"type": "decoquant", "bits": 2},
        ],
    }
    for kind in ("snapkv", "pyramid_kv", "h2o", "tova", "knorm"):
        for ratio in (0.75, 0.45):
            ours[f"{kind} {ratio}"] = {"type": kind, "budget": ratio}
    ours["snapkv 0.45 + decoquant-4"] = [{"type": "snapkv", "budget": 0.45}, {"type": "decoquant"}]
    ours["sink_window 0.45"] = {"type": "sink_window", "window_size": int(0.45 * PREFILL) - 4, "sink_size": 4}
    made: dict[str, Make] = {"dense": lambda: DynamicCache(config=model.config)}
    made |= {name: (lambda config=config: make_cache(model, config)) for name, config in ours.items()}
    for bits, group in ((4, 32), (4, 64), (2, 32), (2, 64)):
        made[f"KIVI groups {bits}-bit/{group}"] = lambda bits=bits, group=group: KIVICache(model.config, bits, group)
    if peers:
        made |= host_backends(model)
    # The comparisons that matter most come first, so that a run that is cut short has them.
    first = ("dense", "decoquant-4", "decoquant-2", "KIVI groups 4-bit/64", "KIVI groups 2-bit/64")
    first += ("KIVI groups 2-bit/32", "host quanto-4 axis -1", "host hqq-4", "pyramid_infer 0.75", "snapkv 0.75")
    first += ("pyramid_kv 0.75", "pyramid 0.75 + decoquant-4", "pyramid 0.75 + decoquant-2", "pyramid_infer 0.45")
    first += ("snapkv 0.45", "pyramid_kv 0.45", "KIVI groups 4-bit/32", "host quanto-2 axis -1", "host hqq-2")
    return {name: made[name] for name in (*first, *made) if name in made}


def host_backends(model: Any) -> dict[str, Make]:
    """The host's quantised caches that can be had here."""
    made: dict[str, Make] = {}
    wanted = {"host fp8": {"backend": "fp8"}}
    for bits in (4, 2):
        wanted[f"host quanto-{bits}"] = {"backend": "quanto", "nbits": bits}
        wanted[f"host quanto-{bits} axis -1"] = {"backend": "quanto", "nbits": bits, "axis_key": -1, "axis_value": -1}
        wanted[f"host hqq-{bits}"] = {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1}
    for name, options in wanted.items():
        try:
            QuantizedCache(config=model.config, **options)
        except ImportError as error:
            print(f"caches: {name} is left out: {str(error).splitlines()[0]}")
            continue
        made[name] = lambda options=options: QuantizedCache(config=model.config, **options)
    return made


def cache_bytes(cache: Any) -> int:
    """Bytes of what a cache holds, codes, scales and everything else."""
    if isinstance(cache, HfExtCache):
        return cache.nbytes()
    if isinstance(cache, KIVICache):
        return cache.bytes()
    return sum(tensor_bytes(value) for layer in cache.layers for value in vars(layer).values())


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in a value, whatever a backend wraps them in."""
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    inner = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]
    if any(isinstance(part, Tensor) for part in inner):
        return sum(map(tensor_bytes, inner))
    return value.numel() * value.element_size()


@torch.no_grad()
def feed(model: Any, ids: Tensor, cache: Any, keep: int = 1) -> Tensor:
    """Logits ``[keep, V]`` after the last tokens of ``ids [T]``; a simulated quantiser does its work afterwards."""
    logits: Tensor = model(ids[None], past_key_values=cache, logits_to_keep=keep).logits[0]
    if isinstance(cache, KIVICache) and ids.numel() > 64:
        cache.quantise()
    return logits


def continuation(model: Any, ids: Tensor, make: Make, windows: int) -> dict[str, float]:
    """Perplexity of ``SCORED`` tokens after a prefill of ``PREFILL``, and the bytes held before they were read."""
    nats, held = 0.0, 0
    for window in range(windows):
        x, cache = ids[window * STRIDE : window * STRIDE + PREFILL + SCORED], make()
        first = feed(model, x[:PREFILL], cache)
        held += cache_bytes(cache)
        with torch.no_grad():
            rest = model(x[None, PREFILL:-1], past_key_values=cache).logits[0]
        nats += functional.cross_entropy(torch.cat([first, rest]), x[PREFILL:], reduction="sum").item()
    return {"perplexity": math.exp(nats / (windows * SCORED)), "bytes": held / windows}


def needle(
    model: Any, tokenizer: Any, prose: str, make: Make, depth: float, key: str, inside: bool
) -> dict[str, float]:
    """Log-likelihood (nats) of the hidden key, whether it is the greedy answer, and its correct leading digits."""
    words = prose.split()
    cut = int(len(words) * depth)
    hidden = f" The secret key is {key}. Remember it: {key} is the secret key. "
    context = "\n".join(["Read this text.", " ".join(words[:cut]) + hidden + " ".join(words[cut:])])
    question, answer = "\nWhat is the secret key? The secret key is", " " + key
    cache = make()
    encode = lambda text: tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]  # noqa: E731
    if inside:
        first = feed(model, encode(context + question), cache)
    else:
        feed(model, encode(context), cache)
        first = feed(model, encode(question), cache)
    target = encode(answer)
    with torch.no_grad():
        rest = model(target[None, :-1], past_key_values=cache).logits[0]
    logits = torch.cat([first, rest])
    right = (logits.argmax(-1) == target).tolist()
    return {
        "nats": functional.cross_entropy(logits, target, reduction="sum").item(),
        "hit": float(all(right)),
        "leading": float([*right, False].index(False)) / len(right),
    }


def needles(model: Any, tokenizer: Any, text: str, make: Make, keys: int) -> dict[str, float]:
    """Means over keys and depths, question inside and outside the compressed prompt."""
    rng, out = random.Random(0), {}
    trials = [(str(rng.randrange(10000, 99999)), depth) for _ in range(keys) for depth in (0.1, 0.5, 0.9)]
    prose = " ".join(text.split()[3000:3520])
    for where in ("inside", "outside"):
        found = [needle(model, tokenizer, prose, make, d, key, where == "inside") for key, d in trials]
        for name in ("nats", "hit", "leading"):
            out[f"needle_{where}_{name}"] = sum(f[name] for f in found) / len(found)
    return out


def run_quality(arguments: argparse.Namespace) -> None:
    """The table of quality against bytes; what an earlier run measured is kept."""
    model, tokenizer = load_model(arguments.model)
    text = Path(arguments.data).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    settings = {"model": arguments.model or "SmolLM2-135M-Instruct", "prefill": PREFILL, "scored": SCORED}
    report = resume("caches_quality", {**settings, "windows": arguments.windows, "keys": arguments.keys})
    per_token = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    for name, make in methods(model).items():
        if any(row["cache"] == name for row in report.rows) or (arguments.only and arguments.only not in name):
            continue
        try:
            row = continuation(model, ids, make, arguments.windows)
            row |= needles(model, tokenizer, text, make, arguments.keys)
        except (ValueError, RuntimeError, AssertionError) as error:
            print(f"caches: {name} failed: {str(error).splitlines()[0]}", flush=True)
            continue
        report.row(cache=name, of_float16=row["bytes"] / (per_token * PREFILL), **row)
        report.save()


def run_bytes(arguments: argparse.Namespace) -> None:
    """Bytes held after a prompt, for every cache."""
    model, tokenizer = load_model(arguments.model)
    ids = tokenizer(Path(arguments.data).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    report = resume("caches_bytes", {"model": arguments.model or "SmolLM2-135M-Instruct"})
    names = ("dense", "decoquant-8", "decoquant-4", "decoquant-2", "pyramid_infer 0.75", "pyramid 0.75 + decoquant-4")
    made = methods(model, peers=False)
    for tokens in (256, 512, 1024, 2048, 4096):
        for name in names:
            if any(row["cache"] == name and row["tokens"] == tokens for row in report.rows):
                continue
            cache = made[name]()
            feed(model, ids[:tokens], cache)
            report.row(cache=name, tokens=tokens, bytes=cache_bytes(cache))
            report.save()


def run_speed(arguments: argparse.Namespace) -> None:
    """Prefill once, then interleaved single-token steps of every cache, all started from the same prompt."""
    model, tokenizer = load_model(arguments.model)
    text = Path(arguments.data).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][: arguments.tokens]
    batch = ids.expand(arguments.batch, -1)
    made = methods(model)
    names = arguments.caches.split(",") if arguments.caches else ["dense", "decoquant-4", "host quanto-4"]
    report = resume("caches_speed", {"model": arguments.model or "SmolLM2-135M-Instruct"})
    caches, prefill, steps = {}, {}, {name: [] for name in names}
    with torch.no_grad():
        model(batch[:, :64], logits_to_keep=1)
        for name in names:
            caches[name] = made[name]()
            start = time.perf_counter()
            model(batch, past_key_values=caches[name], logits_to_keep=1)
            prefill[name] = time.perf_counter() - start
        token = batch[:, -1:]
        for step in range(arguments.steps + 4):
            for name in names:
                start = time.perf_counter()
                model(token, past_key_values=caches[name])
                if step >= 4:
                    steps[name].append(time.perf_counter() - start)
    for name in names:
        # Packing in blocks makes single steps uneven, so the mean of all stands beside the median.
        ordered = sorted(steps[name])
        mean = sum(ordered) / len(ordered)
        report.row(
            cache=name,
            batch=arguments.batch,
            steps=arguments.steps,
            tokens=arguments.tokens,
            prefill_seconds=prefill[name],
            median_step_ms=1e3 * ordered[len(ordered) // 2],
            mean_step_ms=1e3 * mean,
            tokens_per_second=arguments.batch / mean,
            bytes=cache_bytes(caches[name]),
        )
    report.save()


def run_plot(arguments: argparse.Namespace) -> None:
    """Perplexity and needles against bytes."""
    import matplotlib.pyplot as plt

    rows = json.loads((RESULTS / "caches_quality.json").read_text(encoding="utf-8"))["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5))
    for axis, value, label in (
        (axes[0], "perplexity", "perplexity of the next 256 tokens"),
        (axes[1], "needle_inside_nats", "nats of a hidden five-digit key"),
    ):
        for row in rows:
            host = row["cache"].startswith(("host", "KIVI"))
            color = "black" if row["cache"] == "dense" else "tab:orange" if host else "tab:blue"
            axis.scatter(row["of_float16"], row[value], color=color, s=18)
            axis.annotate(row["cache"], (row["of_float16"], row[value]), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
        axis.set(xlabel="bytes relative to float16", ylabel=label, xscale="log", yscale="log")
    figure.tight_layout()
    figure.savefig(RESULTS / "caches_quality.png", dpi=110)


def resume(stem: str, settings: dict[str, Any]) -> Report:
    """A report that goes on where an earlier run with the same settings stopped."""
    report, path = Report(stem, settings), RESULTS / f"{stem}.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["settings"] == settings:
            report.rows = old["rows"]
    return report


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "bytes", "speed", "plot"])
    parser.add_argument("--data", default="wiki.test.part1.raw", help="a text file")
    parser.add_argument("--model", help="folder or hub name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--keys", type=int, default=2)
    parser.add_argument("--only", help="measure only caches whose name contains this")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--caches", help="names, separated by commas")
    arguments = parser.parse_args()
    {"quality": run_quality, "bytes": run_bytes, "speed": run_speed, "plot": run_plot}[arguments.part](arguments)


if __name__ == "__main__":
    main()
