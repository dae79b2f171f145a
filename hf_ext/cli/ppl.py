"""``hf-ext ppl MODEL --text FILE``: perplexity on a text file."""

import argparse
import json
import sys
import time

from hf_ext.cli.common import add_model_arguments, console, load, parse_cache, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="the text; - reads standard input")
    parser.add_argument("--encoding", default="utf-8", help="of the text (default: %(default)s)")
    parser.add_argument("--window", type=int, help="tokens a window (default: 2048, or the context if shorter)")
    parser.add_argument("--stride", type=int, help="tokens from window to window (default: the window, no overlap)")
    parser.add_argument("--windows", type=int, metavar="N", help="measure only the first N windows")
    parser.add_argument(
        "--cache",
        default=None,
        metavar="CACHE",
        help="read each window through this cache, as sirllm or sirllm:memory_size=252 (default: none)",
    )
    parser.add_argument("--chunk", type=int, help="tokens a forward (default: 64 with --cache, else the window)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    text = read_text(arguments.text, arguments.encoding)
    cache = None if arguments.cache is None else parse_cache(arguments.cache)
    from hf_ext.evaluation import perplexity, tokenize
    from hf_ext.patches.caches import make_cache

    model, tokenizer = load(arguments)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    window = arguments.window or min(2048, longest)
    began = time.perf_counter()
    result = perplexity(
        model,
        tokenize(tokenizer, text),
        window,
        arguments.stride,
        cache=None if cache is None else lambda: make_cache(model, list(cache)),
        chunk=arguments.chunk,
        max_windows=arguments.windows,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - began
    if arguments.json:
        values = {"perplexity": result.perplexity, "nats": result.nats, "tokens": result.tokens}
        settings = {"windows": result.windows, "window": window, "stride": arguments.stride or window}
        print(json.dumps({**values, **settings, "cache": arguments.cache, "seconds": round(seconds, 3)}))
        return 0
    out = console()
    out.print(f"[bold]perplexity {result.perplexity:.4f}[/bold]  ({result.nats:.5f} nats a token)")
    cached = f", through the cache {arguments.cache}" if arguments.cache else ""
    out.print(
        f"{result.tokens} tokens scored in {result.windows} windows of {window}, stride {arguments.stride or window}"
        f"{cached}, {seconds:.1f} s"
    )
    return 0
