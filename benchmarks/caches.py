"""Compressed caches on a real model: perplexity and needles against bytes, bytes against tokens, and speed.

Parts, each with a result file of its own in benchmarks/results:

- ``quality``: prefill 1,024 tokens of WikiText-2 through each cache, score the next 256; a five-digit key hidden in
  prose is asked for, with the question inside and outside the compressed prompt. Peers of the host run in the same
  process when ``benchmarks/.venv-peers`` holds optimum-quanto and hqq.
- ``bytes``: what each cache holds after 256 to 4,096 tokens, and what fits into a fixed budget.
- ``speed``: prefill seconds and tokens a second of decoding, interleaved. Run it alone on the machine.
- ``steps``: decoding alone, of evicting caches that are at their budget, from random keys and values; takes seconds.
- ``plot``: the picture of the first part.

```bash
python benchmarks/caches.py quality --data wikitext2/wiki.test.part1.raw
python benchmarks/caches.py speed --tokens 2048 --caches "dense,decoquant-4"
```
"""

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _cache_methods import Make, cache_bytes, methods
from _cache_prompt import Prompt
from _run import RESULTS, Report
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from hf_ext import make_cache
from hf_ext.caches.base import HfExtCache
from hf_ext.default_model import load_model

MODEL = "SmolLM2-135M-Instruct"
PREFILL, SCORED, STRIDE = 1024, 256, 4000
NEEDLE = 512  # tokens that are compressed when a needle lies in them
DEPTHS = (0.1, 0.5, 0.9)
BUDGET = 2**30  # bytes of the fixed budget
WARMUP = 4  # steps that are not measured
SIZED = ("dense", "decoquant-8", "decoquant-4", "decoquant-2", "pyramid_infer flat 0.45", "snapkv 0.45",
         "flat 0.75 + decoquant-4", "flat 0.65 + decoquant-2")  # fmt: skip
EVICTING = ("snapkv", "h2o", "tova")
FAMILIES = {
    "black": "dense",
    "tab:blue": "DecoQuant",
    "tab:orange": "quantised by others",
    "tab:green": "PyramidInfer",
    "tab:gray": "evicting",
    "tab:red": "stacks",
    "tab:purple": "kvpress",
}


@torch.no_grad()
def go_on(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits ``[T, V]`` after each of ``ids [T]``; these tokens are added to the compressed prompt as they are."""
    if isinstance(cache, HfExtCache):
        cache.activate_past_recording()
    logits: Tensor = model(ids[None], past_key_values=cache).logits[0]
    return logits


def continuation(model: Any, prompt: Prompt, ids: Tensor, make: Make) -> tuple[Tensor, int]:
    """Log-probabilities ``[SCORED, V]`` of ``ids [SCORED]`` after a prompt, and the bytes held after the prompt.

    The last token is fed, too, though nothing is asked of it: the host's quantised caches fail at odd lengths.
    """
    cache = make()
    first = prompt.read(cache)
    held = cache_bytes(cache)
    logits = torch.cat([first, go_on(model, ids, cache)[:-1]])
    return logits.log_softmax(-1), held


def perplexity(model: Any, windows: list[tuple[Prompt, Tensor]], make: Make, dense: list[Tensor]) -> dict[str, float]:
    """Perplexity, its change against the dense cache with its standard error over windows, divergence and bytes."""
    nats, more, divergence, held = [], [], [], []
    for (prompt, ids), reference in zip(windows, dense, strict=True):
        target = ids[:, None]
        found, size = continuation(model, prompt, ids, make)
        nats.append(-found.gather(1, target).mean())
        more.append(nats[-1] + reference.gather(1, target).mean())
        divergence.append((reference.exp() * (reference - found)).sum(-1).mean())
        held.append(float(size))
    change = torch.stack(more)
    return {
        "perplexity": torch.stack(nats).mean().exp().item(),
        "change": change.mean().expm1().item(),
        "change_error": (change.std() / len(change) ** 0.5).item() if len(change) > 1 else math.nan,
        "divergence": torch.stack(divergence).mean().item(),
        "bytes": statistics.mean(held),
    }


class Needle:
    """A five-digit key in prose, as token ids: compressed with the question behind it, or without."""

    def __init__(self, model: Any, tokenizer: Any, prose: Tensor, key: str, depth: float) -> None:
        def encode(text: str) -> Tensor:
            ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
            return ids

        self.model, self.prose, self.depth = model, prose, depth
        self.head = encode("Read this text.\n")
        self.hidden = encode(f" The secret key is {key}. Remember it: {key} is the secret key.")
        self.question = encode("\nWhat is the secret key? The secret key is")
        self.answer = encode(" " + key)
        self.inside = Prompt(model, torch.cat([self.context(NEEDLE - len(self.question)), self.question]))
        self.outside = Prompt(model, self.context(NEEDLE))

    def context(self, length: int) -> Tensor:
        """The text ``[length]`` with the key at its depth."""
        room = length - len(self.head) - len(self.hidden)
        cut = int(room * self.depth)
        return torch.cat([self.head, self.prose[:cut], self.hidden, self.prose[cut:room]])

    def ask(self, cache: Any, inside: bool) -> dict[str, float]:
        """Nats of the key, and whether it is the greedy answer, with the question inside the prompt or after it."""
        if inside:
            logits = torch.cat([self.inside.read(cache), go_on(self.model, self.answer, cache)])[:-1]
        else:
            self.outside.read(cache)
            asked = go_on(self.model, torch.cat([self.question, self.answer]), cache)
            logits = asked[-len(self.answer) - 1 : -1]
        return {
            "nats": functional.cross_entropy(logits, self.answer, reduction="sum").item(),
            "hit": float(bool((logits.argmax(-1) == self.answer).all())),
        }


def needles(trials: list[Needle], make: Make) -> dict[str, float]:
    """Means over the trials, with the question inside and outside the compressed prompt."""
    out: dict[str, float] = {}
    for where in ("inside", "outside") if trials else ():
        found = [trial.ask(make(), where == "inside") for trial in trials]
        out |= {f"{where}_{name}": statistics.mean(answer[name] for answer in found) for name in ("nats", "hit")}
    return out


def windows_of(
    model: Any, ids: Tensor, length: int, count: int, kind: type[Prompt] = Prompt
) -> list[tuple[Prompt, Tensor]]:
    """``count`` prompts of ``length`` tokens, each with the tokens that follow it."""
    starts = [window * max(STRIDE, length + SCORED) + length for window in range(count)]
    return [(kind(model, ids[at - length : at]), ids[at : at + SCORED]) for at in starts]


def texts(
    model: Any, tokenizer: Any, arguments: argparse.Namespace
) -> tuple[list[tuple[Prompt, Tensor]], list[Needle], dict[str, int]]:
    """Windows of ``arguments.prompt`` tokens with what follows them, hidden keys, and the sizes of both."""
    ids, length, rng = read_ids(tokenizer, arguments), arguments.prompt, random.Random(0)
    windows = windows_of(model, ids, length, arguments.windows)
    keys = [str(rng.randrange(10000, 99999)) for _ in range(arguments.keys)]
    trials = [Needle(model, tokenizer, ids[STRIDE * 10 :], key, depth) for key in keys for depth in DEPTHS]
    sizes = {"prefill": length, "scored": SCORED, "windows": len(windows), "needles": len(trials), "tokens": NEEDLE}
    return windows, trials, sizes


def run_quality(arguments: argparse.Namespace) -> None:
    """The table of quality against bytes; what an earlier run measured is kept."""
    model, tokenizer = load_model(arguments.model)
    windows, trials, sizes = texts(model, tokenizer, arguments)
    made = methods(model)
    dense = [continuation(model, *window, made["dense"])[0] for window in windows]
    stem = "caches_quality" if arguments.prompt == PREFILL else f"caches_quality_{arguments.prompt}"
    report = resume(stem, {"model": arguments.model or MODEL, **sizes})
    per_token = 2 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    for name, make in chosen(made, arguments.caches).items():
        if any(row["cache"] == name for row in report.rows):
            continue
        try:
            row = perplexity(model, windows, make, dense) | needles(trials, make)
        except (ValueError, RuntimeError, AssertionError) as error:
            print(f"caches: {name} failed: {str(error).splitlines()[0]}", flush=True)
            continue
        report.row(cache=name, of_float16=row["bytes"] / (per_token * arguments.prompt), **row)
        report.save()


def read_ids(tokenizer: Any, arguments: argparse.Namespace) -> Tensor:
    """The tokens of the text."""
    text = Path(arguments.data).read_text(encoding="utf-8")
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def chosen(made: dict[str, Make], names: str | None) -> dict[str, Make]:
    """The caches named in ``names``, separated by commas, or all."""
    return made if names is None else {name: made[name] for name in names.split(",")}


def run_bytes(arguments: argparse.Namespace) -> None:
    """Bytes held after a prompt, and how much of it fits into a fixed budget.

    Rows of a batch cost the same bytes each, and so does every further token, so that ``rows_in_budget`` follows from
    one row, and ``context_in_budget`` from a line through the two longest prompts; neither is allocated here.
    """
    model, tokenizer = load_model(arguments.model)
    ids = read_ids(tokenizer, arguments)
    report = Report("caches_bytes", {"model": arguments.model or MODEL, "budget_bytes": BUDGET})
    prompts = [Prompt(model, ids[:tokens]) for tokens in (256, 512, 1024, 2048, 4096)]
    for name, make in chosen(methods(model, peers=False), arguments.caches or ",".join(SIZED)).items():
        held = {}
        for prompt in prompts:
            cache = make()
            prompt.read(cache)
            held[len(prompt.ids)] = cache_bytes(cache)
        per_token = (held[4096] - held[2048]) / 2048
        report.row(
            cache=name,
            **{f"bytes_at_{tokens}": size for tokens, size in held.items()},
            rows_of_2048_in_budget=BUDGET // held[2048],
            context_in_budget=int(4096 + (BUDGET - held[4096]) / per_token),
        )
    report.save()


def run_speed(arguments: argparse.Namespace) -> None:
    """Prefill, then interleaved single-token steps of every cache, all started from the same prompt."""
    model, tokenizer = load_model(arguments.model)
    ids = read_ids(tokenizer, arguments)[None, : arguments.tokens]
    made = chosen(methods(model), arguments.caches)
    stem = f"caches_speed_{arguments.tag}" if arguments.tag else "caches_speed"
    report = resume(stem, {"model": arguments.model or MODEL})
    measured = (arguments.tokens, arguments.batch)  # an earlier run of these is replaced
    report.rows = [row for row in report.rows if (row["tokens"], row["batch"]) != measured]
    caches: dict[str, Any] = {}
    prefills: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        model(ids[:, :64], logits_to_keep=1)
        for name in list(made) * arguments.prefills:
            caches[name] = made[name]()
            start = time.perf_counter()
            model(ids, past_key_values=caches[name], logits_to_keep=1)
            prefills[name].append(time.perf_counter() - start)
        steps = decode(model, caches, arguments.batch, arguments.steps)
    for name, seconds in steps.items():
        # Packing in blocks makes single steps uneven, so the mean of all stands beside the median.
        report.row(
            cache=name,
            batch=arguments.batch,
            tokens=arguments.tokens,
            prefill_seconds=statistics.median(prefills[name]),
            prefills=arguments.prefills,
            median_step_ms=1e3 * statistics.median(seconds),
            mean_step_ms=1e3 * statistics.mean(seconds),
            tokens_per_second=arguments.batch / statistics.mean(seconds),
            steps=arguments.steps,
            bytes=cache_bytes(caches[name]),
        )
    report.save()


def run_steps(arguments: argparse.Namespace) -> None:
    """Interleaved steps of the dense cache after ``tokens`` and of evicting ones that store 0.45 of them."""
    model, _ = load_model(arguments.model)
    text, budget = model.config, int(0.45 * arguments.tokens)
    made: dict[str, Any] = {"dense": DynamicCache(config=text)}
    made |= {f"{kind} 0.45": make_cache(model, kind, budget=budget) for kind in EVICTING}
    for name, cache in made.items():
        length = arguments.tokens if name == "dense" else budget
        prompt = Prompt(model, torch.full((length,), 500))
        heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
        query, keys, values = (torch.randn(1, count, length, text.head_dim) for count in heads)
        prompt.recorded = [(query, keys, values)] * text.num_hidden_layers
        prompt.replay(cache)
    with torch.no_grad():
        steps = decode(model, made, 1, arguments.steps)
    report = Report("caches_steps", {"model": arguments.model or MODEL, "tokens": arguments.tokens, "budget": budget})
    for name, seconds in steps.items():
        report.row(
            cache=name,
            median_step_ms=1e3 * statistics.median(seconds),
            mean_step_ms=1e3 * statistics.mean(seconds),
            lowest_step_ms=1e3 * min(seconds),
            steps=arguments.steps,
        )
    report.save()


def decode(model: Any, caches: dict[str, Any], batch: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each of ``steps`` steps of every cache, in turn, of ``batch`` copies of the one row it holds."""
    token = torch.full((batch, 1), 500)
    if batch > 1:
        for cache in caches.values():
            cache.batch_repeat_interleave(batch)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(steps + WARMUP):
        for name, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            if step >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def run_plot(arguments: argparse.Namespace) -> None:
    """Perplexity, divergence and needles against bytes; a point for each cache, named by a number of the legend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

    rows = rows_of("caches_quality") + [
        {**row, "cache": f"kvpress {row['cache']}"} for row in rows_of("caches_kvpress") if row["cache"] != "dense"
    ]
    panels = {
        "perplexity": "perplexity of the next 256 tokens",
        "divergence": "divergence from the dense cache (nats a token)",
        "inside_nats": "nats of a hidden key, question in the prompt",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(17, 6.4))
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        for color, family in FAMILIES.items():
            members = [(i, row) for i, row in enumerate(rows, 1) if family_of(row["cache"]) == family]
            axis.scatter([r["of_float16"] for _, r in members], [max(r[column], 1e-4) for _, r in members],
                         color=color, s=16, label=family)  # fmt: skip
            for i, row in members:
                at = (row["of_float16"], max(row[column], 1e-4))
                axis.annotate(str(i), at, fontsize=8, xytext=(3, 3), textcoords="offset points", color=color)
        axis.set(xlabel="bytes relative to float16", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks([0.125, 0.25, 0.5, 1, 2], ["1/8", "1/4", "1/2", "1", "2"])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if column == "perplexity" else NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    names = [f"{i} {row['cache']}" for i, row in enumerate(rows, 1)]
    lines = ["    ".join(names[i : i + 7]) for i in range(0, len(names), 7)]
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=8, va="bottom")
    figure.tight_layout(rect=(0, 0.03 + 0.028 * len(lines), 1, 1))
    figure.savefig(RESULTS / "caches_quality.png", dpi=110)


def rows_of(stem: str) -> list[dict[str, Any]]:
    """The rows of a result file, none where it is not there."""
    path = RESULTS / f"{stem}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return found


def family_of(name: str) -> str:
    """What kind of cache a row of the table is."""
    if name.startswith("kvpress"):
        return "kvpress"
    if name == "dense" or name.startswith(("host", "KIVI", "basis")):
        return "dense" if name == "dense" else "quantised by others"
    if " + " in name:
        return "stacks"
    return "DecoQuant" if name.startswith("decoquant") else "PyramidInfer" if "pyramid_infer" in name else "evicting"


def resume(stem: str, settings: dict[str, Any]) -> Report:
    """A report that goes on where an earlier run with the same settings stopped."""
    report, path = Report(stem, settings), RESULTS / f"{stem}.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["settings"] == settings:
            report.rows = old["rows"]
    return report


PARTS = {"quality": run_quality, "bytes": run_bytes, "speed": run_speed, "steps": run_steps, "plot": run_plot}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--data", default="wiki.test.part1.raw", help="a text file")
    parser.add_argument("--model", help="folder or hub name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", type=int, default=PREFILL, help="tokens that are compressed before 256 are scored")
    parser.add_argument("--windows", type=int, default=8, help="of perplexity")
    parser.add_argument("--keys", type=int, default=3, help="hidden at each of three depths")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt, for speed")
    parser.add_argument("--batch", type=int, default=1, help="rows, for speed")
    parser.add_argument("--steps", type=int, default=24, help="decoded tokens, for speed")
    parser.add_argument("--prefills", type=int, default=1, help="of which the median is taken")
    parser.add_argument("--tag", help="added to the name of the result file of speed, for another machine")
    parser.add_argument("--caches", help="names, separated by commas")
    arguments = parser.parse_args()
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
