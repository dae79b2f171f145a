r"""kvpress on the texts of benchmarks/caches.py: perplexity and needles against what is kept, in its own environment.

kvpress needs an older transformers than hf_ext, so there are two parts. ``export`` runs here and writes the model and
the token ids of windows and needles to a folder; ``run`` reads them where only kvpress is installed, does with each
press what caches.py does with each cache (the press compresses the prompt, what follows is scored and kept as it is),
and writes benchmarks/results/caches_kvpress.json and .csv.

```bash
python benchmarks/caches_kvpress.py export FOLDER --data wikitext2/wiki.test.part1.raw --keys 1
python -m venv benchmarks/.venv-kvpress
benchmarks/.venv-kvpress/bin/pip install -r benchmarks/requirements-kvpress.txt
benchmarks/.venv-kvpress/bin/python benchmarks/caches_kvpress.py run FOLDER
```
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _run import Report
from torch import Tensor
from torch.nn import functional

KEPT = (0.75, 0.45)
EAGER = "ObservedAttention"  # reads the attention matrix, which only eager attention gives
MASKED = ("AdaKV", "KVzip")  # keep every key and value in memory and mask some of them in attention


def export(arguments: argparse.Namespace) -> None:
    """Write the model, and the windows and needles of benchmarks/caches.py as token ids."""
    from caches import MODEL, texts

    from hf_ext.default_model import load_model

    model, tokenizer = load_model(arguments.model)
    windows, trials, sizes = texts(model, tokenizer, arguments)
    model.save_pretrained(arguments.folder / "model")
    tokenizer.save_pretrained(arguments.folder / "model")
    texts_as_ids = {
        "settings": {"model": arguments.model or MODEL, **sizes},
        "windows": [{"prompt": prompt.ids.tolist(), "next": ids.tolist()} for prompt, ids in windows],
        "needles": [
            {name: getattr(trial, name).tolist() for name in ("question", "answer")}
            | {where: getattr(trial, where).ids.tolist() for where in ("inside", "outside")}
            for trial in trials
        ],
    }
    (arguments.folder / "texts.json").write_text(json.dumps(texts_as_ids))


def presses() -> dict[str, Callable[[float], Any]]:
    """Makers of each press, by the name it has in the table, from the share of keys and values it is to drop."""
    import kvpress

    def adaptive(ratio: float) -> Any:
        return kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2))

    return {
        "SnapKV": kvpress.SnapKVPress,
        "PyramidKV": kvpress.PyramidKVPress,
        "ExpectedAttention": kvpress.ExpectedAttentionPress,
        "ObservedAttention": kvpress.ObservedAttentionPress,
        "TOVA": kvpress.TOVAPress,
        "Knorm": kvpress.KnormPress,
        "KVzip": kvpress.KVzipPress,
        "AdaKV(ExpectedAttention)": adaptive,
    }


class Compressed:
    """A prompt in a cache that a press compressed.

    Attributes:
        first: logits ``[1, V]`` after the prompt.
        bytes: of the cache after the prompt.
    """

    def __init__(self, model: Any, ids: Tensor, press: Any) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.length = model, DynamicCache(), len(ids)
        with nullcontext() if press is None else press(model):
            self.first = model(input_ids=ids[None], past_key_values=self.cache, logits_to_keep=1).logits[0]
        tensors = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def go_on(self, ids: Tensor) -> Tensor:
        """Logits ``[T, V]`` after each of ``ids [T]``, which are added to the cache as they are.

        The model makes one mask for all layers. PyramidKV's store different numbers of tokens: each is given its own.
        """

        def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            stored = self.cache.layers[module.layer_idx].keys.shape[-2]
            own = torch.ones(len(ids), stored + len(ids), dtype=torch.bool).tril(stored)
            return args, {**kwargs, "attention_mask": own[None, None]}

        uneven = len({layer.keys.shape[-2] for layer in self.cache.layers}) > 1
        attentions = [layer.self_attn for layer in self.model.model.layers] if uneven else []
        hooks = [module.register_forward_pre_hook(mask, with_kwargs=True) for module in attentions]
        positions = torch.arange(self.length, self.length + len(ids))[None]
        out = self.model(ids[None], past_key_values=self.cache, position_ids=positions)
        for hook in hooks:
            hook.remove()
        self.length += len(ids)
        return out.logits[0]


def continuation(model: Any, window: dict[str, Tensor], press: Any) -> tuple[Tensor, int]:
    """Log-probabilities ``[T, V]`` of the tokens after the prompt, and the bytes held after it."""
    prompt = Compressed(model, window["prompt"], press)
    return torch.cat([prompt.first, prompt.go_on(window["next"])[:-1]]).log_softmax(-1), prompt.bytes


def perplexity(model: Any, windows: list[dict[str, Tensor]], press: Any, dense: list[Tensor]) -> dict[str, float]:
    """As `caches.perplexity`."""
    nats, more, divergence, held = [], [], [], []
    for window, reference in zip(windows, dense, strict=True):
        target = window["next"][:, None]
        found, size = continuation(model, window, press)
        nats.append(-found.gather(1, target).mean())
        more.append(nats[-1] + reference.gather(1, target).mean())
        divergence.append((reference.exp() * (reference - found)).sum(-1).mean())
        held.append(size)
    change = torch.stack(more)
    return {
        "perplexity": torch.stack(nats).mean().exp().item(),
        "change": change.mean().expm1().item(),
        "change_error": (change.std() / len(change) ** 0.5).item() if len(change) > 1 else math.nan,
        "divergence": torch.stack(divergence).mean().item(),
        "bytes": statistics.mean(held),
    }


def ask(model: Any, needle: dict[str, Tensor], press: Any, where: str) -> dict[str, float]:
    """Nats of the key, and whether it is the greedy answer, as `caches.Needle.ask`."""
    prompt, answer = Compressed(model, needle[where], press), needle["answer"]
    if where == "inside":
        logits = torch.cat([prompt.first, prompt.go_on(answer)])[:-1]
    else:
        logits = prompt.go_on(torch.cat([needle["question"], answer]))[-len(answer) - 1 : -1]
    hit = float(bool((logits.argmax(-1) == answer).all()))
    return {"nats": functional.cross_entropy(logits, answer, reduction="sum").item(), "hit": hit}


def needles(model: Any, trials: list[dict[str, Tensor]], press: Any) -> dict[str, float]:
    """Means over the trials, with the question inside and outside the compressed prompt."""
    out = {}
    for where in ("inside", "outside"):
        found = [ask(model, trial, press, where) for trial in trials]
        out |= {f"{where}_{name}": statistics.mean(answer[name] for answer in found) for name in ("nats", "hit")}
    return out


@torch.no_grad()
def run(arguments: argparse.Namespace) -> None:
    """Measure every press at every share kept; what an earlier run measured is kept."""
    from transformers import AutoModelForCausalLM

    given = json.loads((arguments.folder / "texts.json").read_text())
    windows, trials = (
        [{name: torch.tensor(ids) for name, ids in text.items()} for text in given[kind]]
        for kind in ("windows", "needles")
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model", dtype=torch.float32)
    report = Report("caches_kvpress", {**given["settings"], "kvpress": metadata.version("kvpress")})
    path = report.folder / "caches_kvpress.json"
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        report.rows = old["rows"] if old["settings"] == report.settings else []
    text, tokens = model.config, given["settings"]["prefill"]
    float16 = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens
    dense = [continuation(model, window, None)[0] for window in windows]
    made: dict[str, tuple[Any, float]] = {"dense": (None, 1.0)}
    for name, make in presses().items():
        made |= {f"{name} {kept}": (make(1 - kept), kept) for kept in KEPT}
    for name, (press, kept) in made.items():
        if any(row["cache"] == name for row in report.rows):
            continue
        model.set_attn_implementation("eager" if name.startswith(EAGER) else "sdpa")
        row = perplexity(model, windows, press, dense) | needles(model, trials, press)
        masked = name.startswith(MASKED)
        report.row(cache=name, kept=kept, masked=masked, of_float16=row["bytes"] / float16, **row)
        report.save()


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["export", "run"])
    parser.add_argument("folder", type=Path, help="where the model and the texts lie between the parts")
    parser.add_argument("--data", default="wiki.test.part1.raw", help="a text file")
    parser.add_argument("--model", help="folder or hub name (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens that are compressed before 256 are scored")
    parser.add_argument("--windows", type=int, default=8, help="of perplexity")
    parser.add_argument("--keys", type=int, default=3, help="hidden at each of three depths")
    arguments = parser.parse_args()
    {"export": export, "run": run}[arguments.part](arguments)


if __name__ == "__main__":
    main()
