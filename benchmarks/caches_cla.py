r"""Compressed caches over Cross-Layer Attention on the real model: bytes and perplexity, relative to the stock model.

The model is converted here (``init="fit"``, the ranked map of benchmarks/results/cla_conversion.json), or read from a
folder in which such a model was healed and saved. Windows are those of benchmarks/caches.py.

```bash
python benchmarks/caches_cla.py --data wikitext2/wiki.test.part1.raw --train books/*.txt
python benchmarks/caches_cla.py --data wikitext2/wiki.test.part1.raw --cla FOLDER
```
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _cache_methods import DECO2_PRE, DECO4, Make, flat
from _cache_prompt import Prompt, prefill
from _run import RESULTS, Report
from caches import MODEL, PREFILL, continuation, read_ids, resume, windows_of
from cla_conversion import training_text
from torch import Tensor
from transformers import DynamicCache

from hf_ext import make_cache
from hf_ext.default_model import load_model
from hf_ext.patches.cla_convert import convert_to_cla

STACKS = {
    "decoquant-4": DECO4,
    "flat 0.75 + decoquant-4": [flat(0.75, "pyramid_infer_cache"), DECO4],
    "decoquant-2 pre-RoPE": DECO2_PRE,
    "flat 0.75 + decoquant-2 pre-RoPE": [flat(0.75, "pyramid_infer_cache"), DECO2_PRE],
}


class RunPrompt(Prompt):
    """A prompt that the model itself reads into every cache: layers that share keys cannot be replayed one by one."""

    def read(self, cache: Any) -> Tensor:
        """Logits ``[1, V]`` after the prompt."""
        return prefill(self.model, self.ids, cache)


def nats(model: Any, ids: Tensor, windows: int, make: Make) -> tuple[Tensor, float]:
    """Mean nats of what follows each window, ``[windows]``, and the bytes held after a prompt."""
    found = []
    for prompt, following in windows_of(model, ids, PREFILL, windows, RunPrompt):
        logs, held = continuation(model, prompt, following, make)
        found.append(-logs.gather(1, following[:, None]).mean())
    return torch.stack(found), float(held)


def converted(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The model with Cross-Layer Attention, and where it comes from."""
    if arguments.cla:
        healed, _ = load_model(arguments.cla, dtype="float32")
        return healed, {"cla": arguments.cla.name}
    known = json.loads((RESULTS / "cla_conversion.json").read_text(encoding="utf-8"))["settings"]
    calibration = training_text(tokenizer, arguments.train, int(known["fit_tokens"]), 512)
    sources = known["maps"][arguments.map]
    settings = {"cla": f"{arguments.map}, fit, not healed", "map": sources, "fit_tokens": len(calibration)}
    return convert_to_cla(model, {"kv_source_layers": sources}, "fit", calibration), settings


def main() -> None:
    """Measure every cache; what an earlier run measured is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="wiki.test.part1.raw", help="a text file")
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="texts the converted layers are fitted on")
    parser.add_argument("--map", default="ranked 6", help="of benchmarks/results/cla_conversion.json")
    parser.add_argument("--cla", type=Path, help="a folder with a healed model instead")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    stock, tokenizer = load_model()
    ids = read_ids(tokenizer, arguments)
    cla, source = converted(arguments, stock, tokenizer)
    settings = {"model": MODEL, "prefill": PREFILL, "windows": arguments.windows, **source}
    report: Report = resume("caches_cla", settings)
    per_token = 2 * 2 * stock.config.num_hidden_layers * stock.config.num_key_value_heads * stock.config.head_dim
    made: dict[str, tuple[Any, Make]] = {
        "stock, dense": (stock, lambda: DynamicCache(config=stock.config)),
        "CLA, dense": (cla, lambda: DynamicCache(config=cla.config)),
    }
    for name, config in STACKS.items():
        made[f"CLA, {name}"] = (cla, lambda config=config: make_cache(cla, config))
    dense: list[Tensor] = []
    for name, (model, make) in made.items():
        known = next((row for row in report.rows if row["cache"] == name), None)
        if known is None:
            found, held = nats(model, ids, arguments.windows, make)
            known = report.row(
                cache=name,
                of_float16=held / (per_token * PREFILL),
                perplexity=found.mean().exp().item(),
                **change("stock", found, (dense or [found])[0]),
                **change("cla", found, (dense[1:] or [found])[0]),
                nats=found.tolist(),
                bytes=held,
            )
            report.save()
        dense.append(torch.tensor(known["nats"]))


def change(name: str, found: Tensor, reference: Tensor) -> dict[str, float]:
    """Change of perplexity against a reference on the same windows, with its standard error."""
    more = found - reference
    return {
        f"change_to_{name}": more.mean().expm1().item(),
        f"error_to_{name}": (more.std() / len(more) ** 0.5).item(),
    }


if __name__ == "__main__":
    main()
