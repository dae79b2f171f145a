"""Converting the real model: perplexity dense, zero-shot and after healing, for ranked and for evenly spread maps.

Run: python benchmarks/cla_conversion.py --train books/*.txt --test wiki.test.raw --work FOLDER
Every finished measurement is kept in FOLDER, and healing in its checkpoints; run again, it goes on from there. Writes
benchmarks/results/cla_conversion.json and .csv.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _run import Report
from torch import Tensor
from transformers import TrainerCallback

from hf_ext.cla.ranking import PairLoss, propose_map
from hf_ext.default_model import load_model
from hf_ext.evaluation import perplexity, tokenize
from hf_ext.patches.cla_convert import convert_to_cla
from hf_ext.patches.cla_rank import rank_layers
from hf_ext.trainers.cla_heal import heal


class Notes:
    """Finished measurements by name, in a JSON file that is replaced at once after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value noted under ``name``, measured where there is none yet."""
        if name not in self.found:
            self.write(name, measure())
        return self.found[name]

    def write(self, name: str, value: Any) -> None:
        """Note a value."""
        self.found[name] = value
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        os.replace(new, self.path)
        print(f"{time.strftime('%H:%M:%S')} {name}: {value}", flush=True)


class Evaluate(TrainerCallback):
    """Measures perplexity every so many steps and ends the training when its time is over."""

    def __init__(self, notes: Notes, name: str, measure: Callable[[Any], float], every: int, minutes: float) -> None:
        self.notes, self.name, self.measure, self.every = notes, name, measure, every
        self.spent = notes.found.get(f"{name} minutes", 0.0)
        self.minutes, self.began = minutes, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After each optimiser step."""
        minutes = self.spent + (time.monotonic() - self.began) / 60
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.notes.write(f"{self.name} step {state.global_step}", self.measure(model))
        if minutes > self.minutes:
            control.should_save = control.should_training_stop = True
        self.notes.found[f"{self.name} minutes"] = round(minutes, 2)


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


def measure_zero_shot(
    model: Any, maps: dict[str, tuple[int, ...]], calibration: Tensor, notes: Notes, test: Any
) -> None:
    """Every map with every init, without training."""
    for name, sources in maps.items():
        for init in ("copy", "mean", "fit"):
            notes.once(
                f"{name} {init} zero-shot",
                lambda sources=sources, init=init: test(
                    convert_to_cla(model, {"kv_source_layers": sources}, init, calibration)
                ),
            )


def main() -> None:
    """Rank, measure zero-shot, heal, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rank-tokens", type=int, default=2048)
    parser.add_argument("--reach", type=int, default=3, help="earlier layers each layer tries")
    parser.add_argument("--fit-tokens", type=int, default=8192)
    parser.add_argument("--test-windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--consumers", type=int, nargs="+", default=[6, 10, 15])
    parser.add_argument("--heal", type=int, nargs="*", default=[6], help="which of them to heal")
    parser.add_argument("--heal-tokens", type=int, default=61440)
    parser.add_argument("--heal-minutes", type=float, default=60)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--trainable", choices=("changed", "attention", "all"), default="changed")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    notes = Notes(args.work / "notes.json")
    asked = {name: str(value) for name, value in vars(args).items() if name not in ("work", "heal_minutes", "heal")}
    if notes.once("settings", lambda: asked) != asked:
        raise SystemExit(f"{args.work} holds measurements with other settings; repeat those, or name a new folder.")
    model, tokenizer = load_model()
    layers = model.config.num_hidden_layers
    held_out = tokenize(tokenizer, args.test.read_text(encoding="utf-8"))
    text = training_text(tokenizer, args.train, args.heal_tokens, 512)
    calibration = text[: args.fit_tokens]

    def test(one: Any) -> float:
        return perplexity(one, held_out, args.window, max_windows=args.test_windows).perplexity

    notes.once("dense", lambda: test(model))
    ranked = ranking(model, text[-args.rank_tokens :], notes, "fit", args.reach)
    maps: dict[str, tuple[int, ...]] = {}
    for count in args.consumers:
        maps[f"ranked {count}"] = propose_map(ranked, layers, lambda found, n=count: len(set(found)) <= layers - n)
    for count in args.heal:
        name = f"ranked {count} healed"
        student = convert_to_cla(model, {"kv_source_layers": maps[f"ranked {count}"]}, "fit", calibration)
        notes.once(f"ranked {count} fit zero-shot", lambda student=student: test(student))
        evaluate = Evaluate(notes, name, test, every=15, minutes=args.heal_minutes)
        if f"{name} done" not in notes.found:
            options = {
                "tokens": args.heal_tokens,
                "learning_rate": args.learning_rate,
                "trainable": args.trainable,
                "callbacks": [evaluate],
            }
            heal(student, model, text, args.work / f"heal{count}", disable_tqdm=True, **options)
            notes.write(f"{name} done", True)
    for count in args.consumers:
        maps[f"even {count}"] = even_map(layers, count)
    measure_zero_shot(model, maps, calibration, notes, test)
    write_report(args, notes, maps)


def write_report(args: argparse.Namespace, notes: Notes, maps: dict[str, tuple[int, ...]]) -> None:
    """One row for each measured perplexity."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("work", "train", "test")}
    settings |= {"train": [file.name for file in args.train], "test": args.test.name}
    settings |= {
        "maps": {name: list(sources) for name, sources in maps.items()},
        "ranking": notes.found["ranking fit"],
    }
    report = Report("cla_conversion", settings)
    dense = notes.found["dense"]
    report.row(map="dense", consumers=0, init="", tokens=0, perplexity=dense, ratio=1.0)
    for key, value in notes.found.items():
        if "zero-shot" not in key and " step " not in key:
            continue
        kind, count, rest = key.split(" ", 2)
        healed = rest.startswith("healed")
        tokens = int(rest.rsplit(" ", 1)[1]) * 1024 if healed else 0
        init = "fit" if healed else rest.split(" ")[0]
        report.row(map=kind, consumers=int(count), init=init, tokens=tokens, perplexity=value, ratio=value / dense)
    for key, value in notes.found.items():
        if key.endswith("healed minutes"):
            report.settings[key] = value
    report.save()


if __name__ == "__main__":
    main()
