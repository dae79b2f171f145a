"""SirLLM against a sink window and the full cache at equal budgets: endless streams, their speed, and recall.

Run one task at a time; each writes ``benchmarks/results/sirllm_<task>.json`` and ``.csv``::

    python benchmarks/sirllm.py stream --text FILE --states DIR     # bytes and perplexity at 4k, 16k and 64k tokens
    python benchmarks/sirllm.py speed --text FILE --states DIR      # seconds per token from the states `stream` left
    python benchmarks/sirllm.py grocery --data FILE                 # an item told 20 questions ago
    python benchmarks/sirllm.py games --data FILE [FILE ...]        # rock-paper-scissors against a biased player
    python benchmarks/sirllm.py reply --data FILE                   # choose the reply in a daily dialogue

Streams are teacher-forced in blocks of ``--block`` tokens, each a turn of its own. ``--text`` is by default the
Python language documentation that comes with the interpreter.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _dialogue import Dialogue, play_choices, play_games, read_choices, read_moves
from _run import Report
from tqdm import tqdm
from transformers import DynamicCache

from hf_ext import SinkWindowConfig, SirLLMConfig, make_cache
from hf_ext.caches.surprisal import surprisal
from hf_ext.default_model import load_model

SINKS = 4


def caches(budget: int, decay: float = 1.0) -> dict[str, Any]:
    """The configs to compare, all with ``budget`` tokens per row; None is the host's full cache.

    ``sirllm_r25`` gives a quarter of its budget to the recent window, ``sirllm`` half and ``sirllm_r75`` three
    quarters; ``sirllm_r0`` has none, as in the paper, and ``sirllm_repo`` is that with the released code's entropy.
    """
    rest = budget - SINKS
    block = min(64, rest // 4)

    def sirllm(recent: int, **options: Any) -> SirLLMConfig:
        return SirLLMConfig(memory_size=rest - recent, recent_size=recent, decay=decay, block_size=block, **options)

    return {
        "full": None,
        "sink_window": SinkWindowConfig(window_size=rest, block_size=block),
        "sirllm": sirllm(rest - rest // 2),
        "sirllm_r0": sirllm(0),
        "sirllm_r25": sirllm(rest // 4),
        "sirllm_r75": sirllm(rest - rest // 4),
        "sirllm_repo": sirllm(0, repo_compat=True),
    }


def new_cache(model: Any, config: Any) -> Any:
    """An empty cache with these options, or the host's full one for None."""
    return DynamicCache(config=model.config) if config is None else make_cache(model, config)


def nbytes(cache: Any) -> int:
    """Bytes of keys, values and side state."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


# --- streams -----------------------------------------------------------------------------------------------------


def text_ids(tokenizer: Any, path: Path | None, tokens: int) -> torch.Tensor:
    """The first ``tokens`` tokens of a text, ``[1, T]``."""
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics.values())
    else:
        text = path.read_text(encoding="utf-8")
    ids = tokenizer(text[: tokens * 8], return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has only {ids.shape[1]} tokens; {tokens} are needed. Choose a longer --text.")
    return ids


@torch.inference_mode()
def stream(model: Any, cache: Any, ids: torch.Tensor, block: int, start: int, total: float, scored: int) -> Any:
    """Feed ``ids`` from token ``start`` in blocks; after each yield tokens so far, their nats, and how many count.

    The first token after a start has no prediction and does not count.
    """
    last = None
    for begin in tqdm(range(start, ids.shape[1], block), unit="block", mininterval=30):
        piece = ids[:, begin : begin + block]
        hidden = model.get_decoder()(input_ids=piece, past_key_values=cache).last_hidden_state
        before = hidden[:, :-1] if last is None else torch.cat([last, hidden[:, :-1]], dim=1)
        total += surprisal(model.lm_head, before, piece[:, -before.shape[1] :]).sum().item()
        last = hidden[:, -1:].clone()
        scored += before.shape[1]
        yield begin + piece.shape[1], total, scored


def run_stream(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Perplexity and bytes of each cache over one long text; goes on from the last state in ``--states``."""
    ids = text_ids(tokenizer, options.text, max(options.tokens))
    settings = {"budget": options.budget, "block": options.block, "text": options.text and options.text.name}
    report = Report("sirllm_stream" + options.suffix, settings)
    context = model.config.max_position_embeddings
    for name, config in caches(options.budget).items():
        if options.caches and name not in options.caches:
            continue
        cache, start, total, scored = new_cache(model, config), 0, 0.0, 0
        rows = {} if config is None or options.states is None else read_rows(options.states, name)
        if rows:
            start, total, scored = max(rows), rows[max(rows)]["nats"], rows[max(rows)]["scored"]
            cache.load(state_path(options.states, name, start))
        for row in rows.values():
            if row["tokens"] in (context, *options.tokens):
                report.row(**row)
                report.save()
        end = min(context, ids.shape[1]) if config is None else ids.shape[1]
        for seen, nats, count in stream(model, cache, ids[:, :end], options.block, start, total, scored):
            if seen in (context, *options.tokens):
                row = {"cache": name, "tokens": seen, "perplexity": math.exp(nats / count), "bytes": nbytes(cache)}
                report.row(**row, nats=nats, scored=count)
                report.save()
                if config is not None and options.states is not None:
                    cache.save(state_path(options.states, name, seen))
                    state_path(options.states, name, seen).with_suffix(".json").write_text(json.dumps(report.rows[-1]))
    report.draw("tokens", {"bytes": "cache, bytes", "perplexity": "perplexity"}, by="cache")


def read_rows(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """What an earlier run measured for this cache, by tokens."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{name}-*.json")]
    return {row["tokens"]: row for row in sorted(rows, key=lambda row: row["tokens"])}


def state_path(folder: Path, name: str, tokens: int) -> Path:
    """Where the state of a cache after so many tokens lies between tasks."""
    return folder / f"{name}-{tokens}.safetensors"


@torch.inference_mode()
def run_speed(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Seconds per token, one by one and in blocks, at each length of the stream; measured in turn."""
    ids = text_ids(tokenizer, options.text, options.steps)
    report = Report("sirllm_speed" + options.suffix, {"budget": options.budget, "steps": options.steps})
    runs = {}
    for name, config in caches(options.budget).items():
        for tokens in options.tokens:
            path = None if options.states is None else state_path(options.states, name, tokens)
            if config is not None and path is not None and path.is_file() and name in (options.caches or [name]):
                cache = make_cache(model, config).load(path)
                runs[name, tokens] = lambda cache=cache: [
                    model(input_ids=piece, past_key_values=cache) for piece in ids.split(options.piece, dim=1)
                ]
    if not runs:
        raise ValueError("there are no states to go on from; run the task 'stream' with the same --states first.")
    seconds = report.interleaved(runs, repeats=options.repeats)
    for (name, tokens), measured in seconds.items():
        each = 1000 * measured / options.steps
        report.row(cache=name, tokens=tokens, piece=options.piece, ms_per_token=each, tokens_per_s=1000 / each)
    report.save()


# --- recall ------------------------------------------------------------------------------------------------------


def arms(options: argparse.Namespace) -> Iterator[tuple[str, int | str, Any]]:
    """Name, budget and config of every cache to compare; the full cache has no budget and comes once."""
    for budget in options.budgets:
        for name, config in caches(budget, options.decay).items():
            if options.caches and name not in options.caches:
                continue
            if config is not None:
                yield name, budget, config
            elif budget == options.budgets[0]:
                yield name, "all", None


def run_choices(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Accuracy of four-way questions: the grocery item, or the next reply."""
    scored = ("answer",) if options.task == "grocery" else ("reply",)
    dialogues = read_choices(options.data[0])[: options.episodes]
    report = Report(
        f"sirllm_{options.task}{options.suffix}",
        {"budgets": options.budgets, "decay": options.decay, "data": "--data"},
    )
    for name, budget, config in arms(options):
        record = Record(options.states, f"{options.task}-{name}-{budget}-{options.decay}")
        for turns in tqdm(dialogues[len(record.hits) :], unit="dialogue", mininterval=30):
            dialogue = Dialogue(model, tokenizer, new_cache(model, config))
            hits = [int(right) for _, right in play_choices(dialogue, turns, scored)]
            record.add(hits, dialogue.cache.get_seq_length())
        hits = [hit for dialogue in record.hits[: len(dialogues)] for hit in dialogue]
        report.row(
            cache=name,
            budget=budget,
            right=sum(hits),
            questions=len(hits),
            accuracy=sum(hits) / len(hits),
            tokens_per_dialogue=sum(record.tokens) // len(record.tokens),
            hits="".join(map(str, hits)),
        )
        report.save()


class Record:
    """Hits and lengths of the dialogues done so far, kept in a file so that an interrupted run goes on."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self.path = None if folder is None else folder / f"{name}.json"
        self.hits: list[list[int]] = []
        self.tokens: list[int] = []
        if self.path is not None and self.path.is_file():
            self.hits, self.tokens = json.loads(self.path.read_text())

    def add(self, hits: list[int], tokens: int) -> None:
        """Note one more dialogue."""
        self.hits.append(hits)
        self.tokens.append(tokens)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps([self.hits, self.tokens]))


def run_games(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Wins, ties and losses against players who favour one move."""
    report = Report(
        f"sirllm_games{options.suffix}",
        {"budgets": options.budgets, "decay": options.decay, "rounds": options.rounds},
    )
    for path in options.data:
        moves = read_moves(path)[: options.rounds]
        for budget in options.budgets:
            for name, config in caches(budget, options.decay).items():
                if (options.caches and name not in options.caches) or (
                    config is None and budget != options.budgets[0]
                ):
                    continue
                dialogue = Dialogue(model, tokenizer, new_cache(model, config))
                results = list(tqdm(play_games(dialogue, moves), total=len(moves), unit="game", mininterval=30))
                report.row(
                    player=path.stem,
                    cache=name,
                    budget=budget if config is not None else "all",
                    wins=results.count(1),
                    ties=results.count(0),
                    losses=results.count(-1),
                    tokens=dialogue.cache.get_seq_length(),
                )
                report.save()


TASKS = {
    "stream": run_stream,
    "speed": run_speed,
    "grocery": run_choices,
    "reply": run_choices,
    "games": run_games,
}


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", help="hub name or folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="text file of a stream")
    parser.add_argument("--states", type=Path, help="folder to keep progress and states in")
    parser.add_argument("--data", type=Path, nargs="+", help="JSON lines of a recall task")
    parser.add_argument("--caches", nargs="+", help="only these")
    parser.add_argument("--budget", type=int, default=1024, help="tokens stored, of a stream")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512], help="tokens stored, of recall")
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--block", type=int, default=64, help="tokens a forward, of a stream")
    parser.add_argument("--piece", type=int, default=1, help="tokens a forward, of 'speed'")
    parser.add_argument("--steps", type=int, default=64, help="tokens a measurement, of 'speed'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--episodes", type=int, help="dialogues; default: all")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--suffix", default="", help="added to the names of the result files")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    TASKS[options.task](model, tokenizer, options)


if __name__ == "__main__":
    main()
