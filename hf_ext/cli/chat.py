"""``hf-ext chat``: a terminal chat whose memory never grows.

Every turn feeds only its own tokens to the cache (SirLLM unless another is chosen), so the thousandth turn costs what
the tenth did. Ctrl-C ends an answer and keeps it as far as it went; at the prompt it leaves.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from hf_ext.cli.common import add_model_arguments, console, human_bytes, load, parse_cache

if TYPE_CHECKING:
    from hf_ext.cli.conversation import Conversation

HELP = """\
/memory [N]   the N remembered tokens of highest entropy (20), and the text they are part of
/save FILE    write this conversation to a file
/load FILE    go on with a saved conversation
/reset        forget everything
/help         this list
/quit         leave (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--cache",
        metavar="CACHE",
        help="sirllm, sirllm:memory_size=252,decay=0.9, another cache, or full (default: the model's flag, or sirllm)",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: the chat template's own)")
    parser.add_argument("--plain", action="store_true", help="continue text as it is, without a chat template")
    parser.add_argument("--load", metavar="FILE", help="go on with a saved conversation")
    parser.add_argument("--save", metavar="FILE", help="save the conversation on leaving, however that happens")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="an answer's most tokens (512)")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token (default: the model's)")
    parser.add_argument("--seed", type=int, help="of the sampling")


def run(arguments: argparse.Namespace) -> int:
    """Chat until the user leaves."""
    generation = _generation(arguments)
    stack = None if arguments.cache is None else parse_cache(arguments.cache)
    from hf_ext.cli.conversation import Conversation

    model, tokenizer = load(arguments)
    if arguments.cache is None:
        stack = _default_stack(model)
    try:
        conversation = Conversation(model, tokenizer, stack, plain=arguments.plain, system=arguments.system)
    except ValueError as error:
        hint = " Give --cache full to chat with the model's own cache." if "cache" in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    if arguments.load:
        conversation.load(arguments.load)
    chat = Chat(conversation, generation)
    try:
        with _signals_end_the_process():
            chat.loop()
    finally:
        if arguments.save and conversation.messages:
            conversation.save(arguments.save)
            chat.note(f"Saved to {arguments.save}.")
    return 0


def _generation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options for ``generate``.

    Raises:
        ValueError: a length or a temperature is out of range.
    """
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}.")
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature is not None:
        if arguments.temperature < 0:
            raise ValueError(f"--temperature must not be negative, got {arguments.temperature}.")
        warm = arguments.temperature > 0
        options |= {"do_sample": True, "temperature": arguments.temperature} if warm else {"do_sample": False}
    if arguments.seed is not None:
        import torch

        torch.manual_seed(arguments.seed)
    return options


def _default_stack(model: Any) -> Any:
    from hf_ext.caches.config import cache_configs
    from hf_ext.patches.config_flag import find_flags

    flags = find_flags(model.config)
    return cache_configs("sirllm") if flags is None or flags.kv_cache is None else flags.kv_cache


class Chat:
    """The loop at the terminal around a `Conversation`."""

    def __init__(self, conversation: "Conversation", generation: dict[str, Any]) -> None:
        self.conversation = conversation
        self.generation = generation
        self.out = console()
        self.commands = {
            "/help": lambda _: self.out.print(HELP, markup=False),
            "/memory": self.memory,
            "/save": self.save,
            "/load": self.load,
            "/reset": self.reset,
        }

    def note(self, text: str) -> None:
        """Print a line that is not part of the dialogue."""
        self.out.print(text, style="dim", markup=False, soft_wrap=True)

    def loop(self) -> None:
        """Read lines until the user leaves or the input ends."""
        self.greet()
        with suppress(EOFError, KeyboardInterrupt):
            while (line := self.read()) not in ("/quit", "/exit"):
                self.handle(line)
            return
        self.out.print()

    def greet(self) -> None:
        """Say with whom one speaks and how much it remembers."""
        stack = self.conversation.stack
        name = "full" if stack is None else " over ".join(config.type for config in stack)
        capacity = getattr(stack[0], "capacity", None) if stack else None
        size = f" of {capacity:,} tokens" if capacity else ""
        self.note(f"Memory: {name}{size}. /help lists the commands, /quit leaves.")
        if self.conversation.messages:
            self.note(f"Going on after {len(self.conversation.messages) // 2} turns, {self.status()}.")

    def read(self) -> str:
        """One message of the user; a backslash at the end of a line asks for another line."""
        interactive = sys.stdin.isatty()
        lines = [input("> " if interactive else "")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(". " if interactive else ""))
        return "\n".join(lines).rstrip()

    def handle(self, line: str) -> None:
        """Do what one line asks for; what goes wrong is said and the chat goes on."""
        if not line.strip():
            return
        word, _, rest = line.partition(" ")
        try:
            if word in self.commands:
                self.commands[word](rest.strip())
            elif word.startswith("/") and word[1:].isalpha():
                self.note(f"There is no command {word}. /help lists them; put a space before it to say it.")
            else:
                self.answer(line)
        except (ValueError, OSError) as error:
            self.note(f"{error}")

    def answer(self, text: str) -> None:
        """Stream the model's answer; Ctrl-C ends it."""
        began = time.perf_counter()
        with _interrupt_stops(self.conversation):
            answer = self.conversation.answer(text.strip(), self.show, **self.generation)
        self.out.print("" if answer.endswith("\n") else "\n", end="")
        stopped = "stopped, " if self.conversation.stop else ""
        self.note(f"[{stopped}{self.status()}, {time.perf_counter() - began:.1f} s]")

    def show(self, piece: str) -> None:
        """Print a piece of an answer at once."""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def status(self) -> str:
        """What is kept of what was seen, and what that costs."""
        talk = self.conversation
        longest = getattr(talk.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        past = f", past the model's context of {longest:,}" if longest and talk.kept > longest else ""
        return f"{talk.kept:,} of {talk.seen:,} tokens kept{past}, {human_bytes(talk.nbytes())}"

    # --- commands ------------------------------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """``/save FILE``."""
        if not name:
            raise ValueError("/save needs a file name.")
        self.conversation.save(name)
        self.note(f"Saved to {name}.")

    def load(self, name: str) -> None:
        """``/load FILE``."""
        if not name:
            raise ValueError("/load needs a file name.")
        self.conversation.load(name)
        self.note(f"Going on after {len(self.conversation.messages) // 2} turns, {self.status()}.")

    def reset(self, _: str) -> None:
        """``/reset``."""
        self.conversation.reset()
        self.note("Forgotten.")

    def memory(self, count: str) -> None:
        """``/memory [N]``."""
        from hf_ext.cli.memory import show_memory

        if count and not count.isdigit():
            raise ValueError(f"/memory takes a number of tokens, got {count!r}.")
        show_memory(self.conversation, self.out, int(count or 20))


@contextmanager
def _interrupt_stops(conversation: "Conversation") -> Iterator[None]:
    """While an answer is made, Ctrl-C asks for its end; nothing is torn out of the middle of a computation."""

    def ask(number: int, frame: FrameType | None) -> None:
        conversation.stop = True

    earlier = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def _signals_end_the_process() -> Iterator[None]:
    """A closed terminal or a plain ``kill`` ends the process by way of its ``finally`` blocks, so that it saves."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    earlier = [(number, signal.signal(number, leave)) for number in numbers]
    # A shell starts what it runs in the background with interrupts ignored, and Python then leaves it so.
    earlier.append((signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)))
    try:
        yield
    finally:
        for number, handler in earlier:
            signal.signal(number, handler)
