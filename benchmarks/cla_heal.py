"""From the dense real model to a healed one: search the map, fit, heal layer by layer, distil; perplexity after each.

Run: python benchmarks/cla_heal.py --train books/*.txt --test wiki.test.raw --work FOLDER [--consumers 6 10 15]
Every finished measurement, layer-wise weights and checkpoints are kept in FOLDER; run again, it goes on from there.
The ranking comes from benchmarks/results/cla_conversion.json. Distillation reads rows of the files and, for each of
--sampled-seeds, as many rows that the dense model writes itself. Where a file to train on is the test's own, it is the
articles after those tested. Writes benchmarks/results/cla_heal.json and .csv.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _notes import Notes
from _own_text import own_text
from _run import RESULTS, Report
from _texts import read_text
from cla_conversion import even_map
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_ext.cla.plan import consumers
from hf_ext.cla.ranking import PairLoss, propose_map
from hf_ext.default_model import load_model
from hf_ext.evaluation import perplexity, tokenize
from hf_ext.patches.cla_convert import convert_to_cla
from hf_ext.patches.cla_search import search_map
from hf_ext.trainers.cla_heal import heal
from hf_ext.trainers.cla_layerwise import heal_layerwise

FIT_TOKENS = 8192
SEARCH_ROWS, SEARCH_WINDOW = 4, 160
ARTICLE = re.compile(r"^ = [^=]+ = $", re.MULTILINE)  # the heading of one, in WikiText


class Curve(TrainerCallback):
    """Notes the perplexity every so many steps and the time spent, and ends a call when its time is over.

    The time is that of the processor, in minutes, without what the measuring took.
    """

    def __init__(self, notes: Notes, name: str, measure: Any, every: int, call_minutes: float) -> None:
        self.notes, self.name, self.measure, self.every = notes, name, measure, every
        self.began, self.call_minutes, self.done = time.monotonic(), call_minutes, False
        self.not_counted = time.process_time() - 60 * notes.found.get(f"{name} minutes", 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After each optimiser step."""
        minutes = round((time.process_time() - self.not_counted) / 60, 2)
        self.done = state.global_step == state.max_steps
        if self.done or time.monotonic() - self.began > 60 * self.call_minutes:
            control.should_save = control.should_training_stop = True
            self.notes.write(f"{self.name} minutes", minutes)
        if self.done or state.global_step % self.every == 0:
            key = f"{self.name} distilled {state.global_step * args.per_device_train_batch_size * self.length(kwargs)}"
            start = time.process_time()
            self.notes.write(key, self.measure(model))
            self.notes.write(f"{key} minutes", minutes)
            self.not_counted += time.process_time() - start

    @staticmethod
    def length(kwargs: Any) -> int:
        """Tokens a row."""
        return len(kwargs["train_dataloader"].dataset[0]["input_ids"])


def training_text(tokenizer: Any, args: argparse.Namespace) -> Tensor:
    """As many tokens of each text, in rows of ``args.window``, shuffled: `[rows · window]`."""
    length, texts = args.window, [source(name, tokenizer, args) for name in args.train]
    share = -(-args.text_tokens // (len(texts) * length)) * length
    parts = [tokenize(tokenizer, text[: 8 * share])[:share] for text in texts]
    rows = torch.cat([part[: len(part) // length * length] for part in parts]).view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].flatten()


def source(name: Path, tokenizer: Any, args: argparse.Namespace) -> str:
    """A text to train on: a file without its front matter, or ``pydoc``; of the test's own file, later articles."""
    if str(name) == "pydoc":
        return read_text("pydoc")
    text = name.read_text(encoding="utf-8")
    if name != args.test:
        return text[2000:]
    ends = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return text[ARTICLE.search(text, ends[args.window * args.test_windows][1]).start() :]


def distilled_text(text: Tensor, model: Any, tokenizer: Any, args: argparse.Namespace, notes: Notes) -> Tensor:
    """Rows of ``args.length`` tokens, the text's and the dense model's own, drawn once and kept: `[rows · length]`."""
    rows = [text[: len(text) // args.length * args.length].view(-1, args.length)]
    for seed in args.sampled_seeds:
        start = time.process_time()
        rows.append(own_text(model, tokenizer, args.sampled_rows, args.length, args.work, seed))
        minutes = round((time.process_time() - start) / 60, 2)
        notes.once(f"sampled {seed} minutes", lambda minutes=minutes: minutes)
    return torch.cat(rows).flatten()


def read_ranking(path: Path) -> list[PairLoss]:
    """The losses of single pairs that ``cla_conversion.py`` has measured, cheapest first."""
    pairs = json.loads(path.read_text(encoding="utf-8"))["settings"]["ranking"]
    return sorted((PairLoss(**pair) for pair in pairs), key=lambda pair: pair.nats)


def searched_map(model: Any, ids: Tensor, ranked: list[PairLoss], keep: int, notes: Notes) -> list[int]:
    """The map of `search_map`, each measurement noted."""
    known = {tuple(sources): nats for sources, nats in notes.found.get("searched", [])}

    def write(sources: tuple[int, ...], nats: float) -> None:
        known[sources] = nats
        notes.write("searched", [[list(one), value] for one, value in known.items()])

    budget = model.kv_bytes_per_token() * keep // model.config.num_hidden_layers
    return list(search_map(model, ids, budget, ranked, window=SEARCH_WINDOW, known=known, done=write))


def main() -> None:
    """Every map and number of consumers asked for, as far as the minutes of this call reach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="files; pydoc for the Python manual")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--also", nargs="*", default=[], help="other texts to measure what is healed on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ranking", type=Path, default=RESULTS / "cla_conversion.json")
    parser.add_argument("--consumers", type=int, nargs="+", default=[6, 10, 15])
    parser.add_argument("--maps", choices=("searched", "ranked", "even"), nargs="+", default=["searched"])
    parser.add_argument("--text-tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=1024, help="tokens of the test's windows and of the text's rows")
    parser.add_argument("--sampled-seeds", type=int, nargs="*", default=[], help="rows by the dense model itself")
    parser.add_argument("--sampled-rows", type=int, default=64, help="for each of these seeds")
    parser.add_argument("--layer-tokens", type=int, default=16384, help="text for healing layer by layer; 0: not")
    parser.add_argument("--layer-window", type=int, default=512)
    parser.add_argument("--passes", type=int, default=8, help="over it")
    parser.add_argument("--layer-rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=65536, help="of distillation; 0 for none")
    parser.add_argument("--length", type=int, default=512, help="tokens a row and a step of it")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--trainable", choices=("changed", "attention", "all"), default="changed")
    parser.add_argument("--test-windows", type=int, default=6)
    parser.add_argument("--every", type=int, default=16, help="steps between measurements of the perplexity")
    parser.add_argument("--suffix", default="", help="of the report's name")
    parser.add_argument("--call-minutes", type=float, default=1e9, help="stop distilling after so long; run it again")
    args = parser.parse_args()
    once = ("work", "consumers", "maps", "call_minutes", "tokens", "ranking", "every", "suffix", "also")
    settings = {name: value for name, value in vars(args).items() if name not in once}
    settings |= {"train": [file.name for file in args.train], "test": args.test.name}
    notes = Notes(args.work / "notes.json", settings)
    model, tokenizer = load_model()
    layers = model.config.num_hidden_layers
    held_out = tokenize(tokenizer, args.test.read_text(encoding="utf-8"))
    text = training_text(tokenizer, args)
    sample = text.view(-1, args.window)[:SEARCH_ROWS, :SEARCH_WINDOW].flatten()
    ranked = read_ranking(args.ranking)

    def test(one: Any) -> float:
        return first_windows(one, held_out, args)

    notes.once("dense", partial(test, model))
    for kind in args.maps:
        for count in args.consumers:
            name, keep = f"{kind} {count}", layers - count
            make = {
                "searched": lambda keep=keep: searched_map(model, sample, ranked, keep, notes),
                "ranked": lambda keep=keep: propose_map(ranked, layers, lambda found: len(set(found)) <= keep),
                "even": lambda count=count: even_map(layers, count),
            }
            sources = notes.once(f"{name} map", make[kind])
            if not heal_one(args, notes, name, sources, model, tokenizer, text, test):
                return
            for other in args.also if args.tokens else ():
                ids = tokenize(tokenizer, read_text(other))
                for key, one in (("dense", model), (f"{name} healed", args.work / name.replace(" ", "-") / "healed")):
                    notes.once(f"{key} on {Path(other).stem}", partial(first_windows, one, ids, args))
            write_report(notes, settings, args.suffix)


def first_windows(model: Any, ids: Tensor, args: argparse.Namespace) -> float:
    """The perplexity of a model, or of the one saved in a folder, on the first windows of a text."""
    model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model
    return perplexity(model, ids, args.window, max_windows=args.test_windows).perplexity


def heal_one(
    args: argparse.Namespace,
    notes: Notes,
    name: str,
    sources: list[int],
    model: Any,
    tokenizer: Any,
    text: Tensor,
    test: Any,
) -> bool:
    """Fit, heal layer by layer and distil one map, measuring after each; whether it is done."""
    folder = args.work / name.replace(" ", "-")
    begun = any(folder.glob("*.pt")) or any(folder.glob("checkpoint-*"))  # whose weights replace those of the init
    student = convert_to_cla(model, {"kv_source_layers": sources}, "copy" if begun else "fit", text[:FIT_TOKENS])
    notes.once(f"{name} fit 0", partial(test, student))
    if args.layer_tokens:
        start = time.process_time()
        options = {"passes": args.passes, "learning_rate": args.layer_rate, "window": args.layer_window}
        errors = heal_layerwise(student, model, text[: args.layer_tokens], folder=folder, **options)
        notes.once(f"{name} layer minutes", lambda: round((time.process_time() - start) / 60, 2))
        notes.once(f"{name} layer errors", lambda: errors)
        notes.once(f"{name} layerwise {args.layer_tokens * args.passes}", partial(test, student))
    if not args.tokens or f"{name} healed" in notes.found:
        return True
    curve = Curve(notes, name, test, args.every, args.call_minutes)
    heal(
        student,
        model,
        distilled_text(text, model, tokenizer, args, notes),
        folder,
        tokens=args.tokens,
        length=args.length,
        rows=1,
        layer_tokens=0,
        save_steps=100,
        callbacks=[curve],
        learning_rate=args.learning_rate,
        temperature=args.temperature,
        trainable=args.trainable,
        disable_tqdm=True,
    )
    if curve.done:
        student.save_pretrained(folder / "healed")
        notes.write(f"{name} healed", True)
    return curve.done


def write_report(notes: Notes, settings: dict[str, Any], suffix: str) -> None:
    """One row for each measured perplexity."""
    dense = notes.found["dense"]
    maps = {name.removesuffix(" map"): value for name, value in notes.found.items() if name.endswith(" map")}
    kept = {
        key: value
        for key, value in notes.found.items()
        if key.endswith(("minutes", "errors", "searched")) and " distilled " not in key
    }
    report = Report(f"cla_heal{suffix}", {**settings, "maps": maps, **kept})
    report.row(map="dense", consumers=0, stage="", tokens=0, minutes=None, perplexity=dense, ratio=1.0)
    for name, sources in maps.items():
        first = {"map": name.split(" ")[0], "consumers": len(consumers(sources))}
        for key, value in notes.found.items():
            step = key.removeprefix(f"{name} ")
            stage, _, of = step.partition(" ")
            other = step.removeprefix("healed on ")
            if step != key and other != step:
                row = {"stage": step, "tokens": None, "minutes": None, "perplexity": value}
                report.row(**first, **row, ratio=value / notes.found[f"dense on {other}"])
            elif step != key and stage in ("fit", "layerwise", "distilled") and of.isdigit():
                minutes = notes.found.get(f"{key} minutes")
                row = {"stage": stage, "tokens": int(of), "minutes": minutes, "perplexity": value}
                report.row(**first, **row, ratio=value / dense)
    report.save()


if __name__ == "__main__":
    main()
