"""Converting the real model without training: perplexity of ranked and evenly spread maps with every init.

Run: python benchmarks/cla_conversion.py --train books/*.txt --test wiki.test.raw --work FOLDER
Every finished measurement is kept in FOLDER; run again, it goes on from there. Writes
benchmarks/results/cla_conversion.json and .csv. Healing is measured by cla_heal.py, which takes the ranking from here.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _notes import Notes
from _run import Report
from torch import Tensor

from hf_ext.cla.ranking import PairLoss, propose_map
from hf_ext.default_model import load_model
from hf_ext.evaluation import perplexity, tokenize
from hf_ext.patches.cla_convert import convert_to_cla
from hf_ext.patches.cla_rank import rank_layers

INITS = ("copy", "mean", "fit")


def even_map(layers: int, consumers: int) -> tuple[int, ...]:
    """Consumers spread evenly, each reading the layer before it; half of the layers give uniform CLA2."""
    chosen = {round((i + 1) * layers / consumers) - 1 for i in range(consumers)}
    return tuple(layer - 1 if layer in chosen else layer for layer in range(layers))


def training_text(tokenizer: Any, files: Sequence[Path], tokens: int, length: int) -> Tensor:
    """As many tokens of each file, cut into rows of ``length`` and shuffled, `[rows · length]`."""
    share = -(-tokens // (len(files) * length)) * length
    parts = [tokenize(tokenizer, file.read_text(encoding="utf-8")[2000 : 2000 + 8 * share])[:share] for file in files]
    rows = torch.cat([part[: len(part) // length * length] for part in parts]).view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].flatten()


def ranking(model: Any, ids: Tensor, notes: Notes, init: str, reach: int) -> list[PairLoss]:
    """The ranking, each pair noted as it is measured."""
    key = f"ranking {init}"
    known = [PairLoss(**pair) for pair in notes.found.get(key, [])]

    def write(pair: PairLoss) -> None:
        known.append(pair)
        notes.write(key, [vars(one) for one in known])

    return rank_layers(model, ids, init=init, reach=reach, window=512, known=list(known), done=write)


def main() -> None:
    """Rank, propose maps, convert, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rank-tokens", type=int, default=1536)
    parser.add_argument("--reach", type=int, default=5, help="earlier layers each layer tries")
    parser.add_argument("--fit-tokens", type=int, default=8192)
    parser.add_argument("--test-windows", type=int, default=6)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--consumers", type=int, nargs="+", default=[6, 10, 15])
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "work"}
    settings |= {"train": [file.name for file in args.train], "test": args.test.name}
    notes = Notes(args.work / "notes.json", settings)
    model, tokenizer = load_model()
    layers = model.config.num_hidden_layers
    held_out = tokenize(tokenizer, args.test.read_text(encoding="utf-8"))
    text = training_text(tokenizer, args.train, 65536, 512)

    def test(one: Any) -> float:
        return perplexity(one, held_out, args.window, max_windows=args.test_windows).perplexity

    def test_map(sources: tuple[int, ...], init: Any) -> float:
        return test(convert_to_cla(model, {"kv_source_layers": sources}, init, text[: args.fit_tokens]))

    report = Report("cla_conversion", settings)
    dense = notes.once("dense", partial(test, model))
    report.row(map="dense", consumers=0, init="", perplexity=dense, ratio=1.0)
    ranked = ranking(model, text[-args.rank_tokens :], notes, "fit", args.reach)
    report.settings |= {"ranking": notes.found["ranking fit"], "maps": {}}
    for count in args.consumers:
        maps = {
            "ranked": propose_map(ranked, layers, lambda found, n=count: len(set(found)) <= layers - n),
            "even": even_map(layers, count),
        }
        for kind, sources in maps.items():
            report.settings["maps"][f"{kind} {count}"] = list(sources)
            for init in INITS:
                value = notes.once(f"{kind} {count} {init}", partial(test_map, sources, init))
                report.row(map=kind, consumers=count, init=init, perplexity=value, ratio=value / dense)
    report.save()


if __name__ == "__main__":
    main()
