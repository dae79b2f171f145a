"""The console command ``hf-ext``: one module a sub-command, each loaded only when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, str] = {
    "demo": "hold a long dialogue with endless memory and draw what it costs",
    "chat": "chat with a model whose memory never grows",
    "ppl": "measure perplexity on a text file",
    "info": "show what a model is and what hf_ext can do with it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hf-ext`` with ``argv`` (default: the process's own arguments) and return its exit status.

    A command module offers ``add_arguments(parser)`` and ``run(arguments) -> int``. What a user did wrong is raised
    as `ValueError`, `OSError` or `ImportError` and shown as one sentence; an interrupt ends with status 130.
    """
    arguments_of_process = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="hf-ext", description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, help_text in COMMANDS.items():
        sub = parsers.add_parser(name, help=help_text, description=help_text)
        if name in arguments_of_process[:1]:
            module = importlib.import_module(f"hf_ext.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    arguments = parser.parse_args(arguments_of_process)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-ext {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
