"""The console command ``hf-ext``: one module a sub-command, each loaded only when it is called."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import hf_ext

COMMANDS: dict[str, str] = {
    "demo": "hold a long dialogue with endless memory and draw what it costs",
    "chat": "chat with a model whose memory never grows",
    "ppl": "measure perplexity on a text file",
    "bench": "measure what each cache costs and keeps",
    "info": "show what a model is and what hf_ext can do with it",
    "quantize": "make the linear layers of a model 2 to 4 bits small, with a report",
    "cla": "share keys and values across layers: rank them, convert a model, heal it",
    "model": "show where the default model is; convert and verify it where needed",
    "buckets": "cut a dataset's documents into buckets of one length",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hf-ext`` with ``argv`` (default: the process's own arguments) and return its exit status.

    A command module offers ``add_arguments(parser)`` and ``run(arguments) -> int``. What a user did wrong is raised
    as `ValueError`, `OSError` or `ImportError` and shown as one sentence with status 1; a command line that cannot be
    read ends with 2, an interrupt with 130. Without a command the help is shown.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(words[:1])
    if not words:
        parser.print_help()
        return 0
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"hf-ext: {_unknown(words[0])}", file=sys.stderr)
        return 2
    arguments = parser.parse_args(words)
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:  # the reader, such as head, has seen enough; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-ext {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(asked_for: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command asked for is imported and given its options."""
    parser = argparse.ArgumentParser(
        prog="hf-ext",
        description="Research on efficient and well-aligned LLMs, on the command line.",
        epilog="hf-ext COMMAND --help lists a command's options. The default model is SmolLM2-135M-Instruct.",
    )
    parser.add_argument("--version", action="version", version=f"hf_ext {hf_ext.__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        sub = parsers.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        if name in asked_for:
            module = importlib.import_module(f"hf_ext.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def _unknown(word: str) -> str:
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no command {word!r}.{meant} Commands: {', '.join(COMMANDS)}."
