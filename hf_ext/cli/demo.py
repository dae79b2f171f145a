"""``hf-ext demo``: a long dialogue, a fixed memory, and facts from its beginning asked at its end.

The same dialogue is played into the host's own cache, which keeps everything, into SirLLM and into a window with
attention sinks (StreamingLLM, arXiv 2309.17453) of the same budget. Nothing is tuned on the answers: the words are in
four versions such that each is right once, and the score of a method that has forgotten is one in four.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ext.cli import demo_script as script
from hf_ext.cli.common import add_model_arguments, console, human_bytes, load

if TYPE_CHECKING:
    from rich.console import Console

    from hf_ext.cli.demo_recall import Recall

SINKS = 4
BLOCK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model_arguments(parser)
    parser.add_argument("--budget", type=int, default=256, help="tokens of memory (default: %(default)s)")
    parser.add_argument("--recent", type=int, default=64, help="of them SirLLM's recent window (default: %(default)s)")
    parser.add_argument("--out", default="hf_ext_demo.png", metavar="PNG", help="the picture (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write every number to this file")


def run(arguments: argparse.Namespace) -> int:
    """Play, ask, print and draw."""
    if not 0 <= arguments.recent <= arguments.budget - SINKS - BLOCK:
        raise ValueError(
            f"--recent must be from 0 to --budget minus {SINKS + BLOCK} ({arguments.budget - SINKS - BLOCK}), got "
            f"{arguments.recent}."
        )
    from hf_ext.cli.demo_plot import check_matplotlib, draw

    check_matplotlib()
    out = console()
    from hf_ext.cli.turns import TurnFormat

    model, tokenizer = load(arguments)
    turns = TurnFormat(tokenizer)
    _introduce(out, arguments, turns)
    results = _play(model, turns, _caches(model, arguments.budget, arguments.recent))
    _show(out, results)
    picture = Path(arguments.out).resolve()
    draw(results, picture)
    out.print(f"\nPicture: {picture}", soft_wrap=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(_numbers(results), indent=2) + "\n")
    return 0


def _caches(model: Any, budget: int, recent: int) -> dict[str, Callable[[], Any]]:
    from transformers import DynamicCache

    from hf_ext.patches.caches import make_cache

    shared = {"sink_size": SINKS, "block_size": BLOCK}
    memory = {"memory_size": budget - SINKS - recent, "recent_size": recent}
    return {
        "full cache": lambda: DynamicCache(config=model.config),
        "SirLLM": lambda: make_cache(model, "sirllm", **shared, **memory),
        "sink window": lambda: make_cache(model, "sink_window", **shared, window_size=budget - SINKS),
    }


def _play(model: Any, turns: Any, caches: dict[str, Callable[[], Any]]) -> "dict[str, Recall]":
    from tqdm.auto import tqdm

    from hf_ext.cli.demo_recall import recall, steps

    results: dict[str, Recall] = {}
    for name, make in caches.items():
        with tqdm(total=steps(), desc=f"{name:<11}", unit="turn", disable=not sys.stderr.isatty(), leave=False) as bar:
            began = time.perf_counter()
            results[name] = recall(model, turns, make(), _nbytes, _kept, bar.update)
        print(f"{name}: played and asked in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return results


def _nbytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def _kept(cache: Any) -> int:
    return int(cache.stored if hasattr(cache, "stored") else cache.get_seq_length())


def _introduce(out: "Console", arguments: argparse.Namespace, turns: Any) -> None:
    from hf_ext.cli.demo_recall import exchanges

    told = [exchange[0] for exchange in exchanges(turns)]
    place, words = next(iter(script.WORDS.items()))
    first = script.FACT.format(place=place, word=words[0])
    out.print(f"\n[bold]A dialogue of {sum(map(len, told)):,} tokens, a memory of {arguments.budget}[/bold]\n")
    out.print(f"  [cyan]you[/cyan]    {script.OPENING} {first} ... ({len(script.WORDS)} of them)")
    out.print(f"  [green]model[/green]  {script.OPENING_ANSWER}")
    for question, answer in script.TALK[:2]:
        out.print(f"  [cyan]you[/cyan]    {question}\n  [green]model[/green]  {answer}")
    out.print(f"  [dim]...    {len(script.TALK) - 2} more questions and answers about other things[/dim]")
    out.print(f"  [cyan]you[/cyan]    {script.QUESTION.format(place=place)}\n")


def _show(out: "Console", results: "dict[str, Recall]") -> None:
    from rich.table import Table

    asked = next(iter(results.values())).asked
    table = Table(box=None, pad_edge=False)
    for heading, side in (
        ("", "left"),
        ("kept at the end", "right"),
        ("bytes", "right"),
        (f"right of {asked}", "right"),
    ):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    table.add_column("without calibration", justify="right", style="dim")
    for name, result in results.items():
        kept, size = f"{result.kept[-1]:,} of {result.seen[-1]:,}", human_bytes(result.nbytes[-1])
        table.add_row(name, kept, size, f"[bold]{result.right}[/bold]", str(result.right_uncalibrated))
    out.print(table)
    out.print(
        f"Chance is {asked // 4}. One of four words is chosen for each of {len(script.WORDS)} facts in four versions "
        f"of the dialogue,\nby mean log-probability (calibrated: minus its mean over the versions). Each word is "
        f"right once, so\npreferring a word does not help.\n",
        style="dim",
    )
    table = Table("chosen without calibration, first version", *results, box=None, pad_edge=False)
    for index, (place, words) in enumerate(script.WORDS.items()):
        chosen = [int(result.scores[0, index].argmax()) for result in results.values()]
        marked = [f"[green]{words[0]}[/green]" if choice == 0 else f"[dim]{words[choice]}[/dim]" for choice in chosen]
        table.add_row(f"{script.ANSWER.format(place=place)} [bold]{words[0]}[/bold]", *marked)
    out.print(table)
    said = ", ".join(f"{name} {_said_right(result)}" for name, result in results.items())
    out.print(
        f"Going on freely, with no choices given, it says the word itself: {said} of {len(script.WORDS)}.", style="dim"
    )


def _said_right(result: "Recall") -> int:
    told = [words[0] for words in script.WORDS.values()]
    return sum(said == word for said, word in zip(result.said, told, strict=True))


def _numbers(results: "dict[str, Recall]") -> dict[str, Any]:
    return {
        name: {
            "right": result.right,
            "right_uncalibrated": result.right_uncalibrated,
            "asked": result.asked,
            "said": result.said,
            "seen": result.seen,
            "kept": result.kept,
            "nbytes": result.nbytes,
            "scores": result.scores.tolist(),
        }
        for name, result in results.items()
    }
