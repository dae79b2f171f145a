"""What several commands share: the MODEL argument, loading without noise, cache options, text files, byte counts."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_HELP = "folder or hub name (default: SmolLM2-135M-Instruct)"
FULL = "full"  # the name of the host's own cache, which keeps everything


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``MODEL``, ``--dtype`` and ``--device``, for commands that load weights."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's own)")
    parser.add_argument("--device", help='such as "cuda" (default: a GPU where there is one, else the CPU)')


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that `add_model_arguments` describe, with a line on stderr while they load."""
    import torch
    from transformers.utils import logging

    from hf_ext.default_model import load_model

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with console(stderr=True).status(f"Loading {arguments.model or 'SmolLM2-135M-Instruct'}"):
        logging.disable_progress_bar()
        try:
            return load_model(arguments.model, dtype=arguments.dtype, device=device)
        except (RuntimeError, AssertionError) as error:  # torch's answers to a device that is not there or too small
            raise ValueError(f"the model cannot be loaded on device {device!r}: {error}") from error
        finally:
            logging.enable_progress_bar()


def console(*, stderr: bool = False) -> "Console":
    """A rich console; plain text without colours, and wide enough for any table, when it is not a terminal.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('This command needs the package rich: run `pip install "hf_ext[demo]"`.') from error
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def parse_cache(text: str) -> Any:
    """A cache as written on a command line: ``full``, ``sirllm``, ``sirllm:memory_size=252,decay=0.7``, or JSON.

    Returns:
        None for ``full``, else what `hf_ext.make_cache` takes.

    Raises:
        ValueError: it is none of these, or names a cache or an option that does not exist.
    """
    from hf_ext.caches.config import cache_configs

    if text == FULL:
        return None
    if text.startswith(("{", "[")):
        try:
            return cache_configs(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"--cache is not readable JSON: {error}.") from error
    name, _, options = text.partition(":")
    described: dict[str, Any] = {"type": name}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--cache options are written name=value with commas between them, got {option!r}.")
        described[key.strip()] = _value(value.strip())
    return cache_configs(described)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_text(name: str, encoding: str = "utf-8") -> str:
    """A whole text file, or standard input for ``-``.

    Raises:
        OSError: the file cannot be read.
        ValueError: its bytes are not text in that encoding, or there is no such encoding.
    """
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not {encoding} text: byte {error.start} is 0x{content[error.start]:02x}. Convert it, or name "
            f"its encoding, for example --encoding latin-1."
        ) from error
    except LookupError as error:
        raise ValueError(f"there is no text encoding {encoding!r}; try utf-8 or latin-1.") from error


def human_bytes(count: float) -> str:
    """Bytes for people: ``640 B``, ``45.0 KiB``, ``11.2 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def human_count(count: int) -> str:
    """Numbers for people: ``812``, ``134.5 M``, ``7.2 B``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
