"""``hf-ext bench cache``: what each cache costs and keeps, on any model and text."""

import argparse
import math
import time
from typing import Any

from hf_ext.cli.common import FULL, add_model_arguments, console, human_bytes, load, parse_cache, read_text

DEFAULT_CACHES = (FULL, "decoquant", "decoquant:bits=2", "pyramid_infer:target_ratio=0.75", "snapkv:budget=0.5")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("what", choices=["cache"], help="what is measured")
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="the text (default: the Python language's own documentation)")
    parser.add_argument("--encoding", default="utf-8", help="of the text (default: %(default)s)")
    parser.add_argument(
        "--cache",
        action="append",
        metavar="CACHE",
        help="a cache, as decoquant:bits=2 or a JSON list for a stack; repeat it (default: a choice of five)",
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens read through the cache (default: 1024)")
    parser.add_argument("--score", type=int, default=128, help="next tokens that are scored (default: 128)")
    parser.add_argument("--windows", type=int, default=2, help="windows of the text (default: 2)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a table.

    Raises:
        ValueError: a size is out of range, or the text is too short.
    """
    for name in ("tokens", "score", "windows"):
        if getattr(arguments, name) < 2 - (name == "windows"):
            raise ValueError(f"--{name} must be at least {2 - (name == 'windows')}, got {getattr(arguments, name)}.")
    caches = {text: parse_cache(text) for text in arguments.cache or DEFAULT_CACHES}
    text = read_text(arguments.text, arguments.encoding) if arguments.text else _documentation()
    from hf_ext.evaluation import tokenize

    model, tokenizer = load(arguments)
    ids = tokenize(tokenizer, text)
    span = arguments.tokens + arguments.score
    if len(ids) < span * arguments.windows:
        raise ValueError(f"the text has {len(ids)} tokens; {arguments.windows} windows of {span} need more.")
    table = _table()
    for name, config in caches.items():
        table.add_row(name, *_measure(model, ids, config, arguments))
    console().print(table)
    return 0


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def _table() -> Any:
    from rich.table import Table

    table = Table(title="after reading the prompt through each cache", title_justify="left")
    table.add_column("cache")
    for title in ("bytes", "of dense", "perplexity", "prefill s", "tokens/s"):
        table.add_column(title, justify="right")
    return table


def _measure(model: Any, ids: Any, config: Any, arguments: argparse.Namespace) -> list[str]:
    """One row of the table: bytes, share of dense, perplexity, seconds of prefill, tokens a second one by one."""
    import torch
    from transformers import DynamicCache

    from hf_ext.patches.caches import make_cache

    nats, held, prefill, steps, counted = 0.0, 0, 0.0, 0.0, 0
    span = arguments.tokens + arguments.score
    for window in range(arguments.windows):
        x = ids[window * span : (window + 1) * span].to(model.device)[None]
        cache = DynamicCache(config=model.config) if config is None else make_cache(model, list(config))
        with torch.no_grad():
            began = time.perf_counter()
            logits = [model(x[:, : arguments.tokens], past_key_values=cache, logits_to_keep=1).logits[0, -1]]
            prefill += time.perf_counter() - began
            held = _bytes(cache)
            began = time.perf_counter()
            for index in range(arguments.tokens, span - 1):
                logits.append(model(x[:, index : index + 1], past_key_values=cache).logits[0, -1])
            steps += time.perf_counter() - began
        target = x[0, arguments.tokens :]
        nats += torch.nn.functional.cross_entropy(torch.stack(logits).float(), target, reduction="sum").item()
        counted += len(target)
    dense = model.config.get_text_config(decoder=True)
    d = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    heads = getattr(dense, "num_key_value_heads", None) or dense.num_attention_heads
    full = 2 * dense.num_hidden_layers * heads * d * next(model.parameters()).element_size() * arguments.tokens
    speed = (counted - arguments.windows) / steps
    return [
        human_bytes(held),
        f"{held / full:.1%}",
        f"{math.exp(nats / counted):.3f}",
        f"{prefill / arguments.windows:.2f}",
        f"{speed:.1f}",
    ]


def _bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
