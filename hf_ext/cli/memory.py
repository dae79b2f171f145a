"""What a cache remembers, for people: the most surprising tokens, and the text that is left with them marked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from hf_ext.cli.conversation import Conversation


def show_memory(conversation: "Conversation", out: "Console", count: int) -> None:
    """Print the kept text, with gaps shown, and a table of the ``count`` tokens of highest entropy.

    Raises:
        ValueError: the cache records no entropies.
    """
    cache = conversation.cache
    if not hasattr(cache, "remembered"):
        raise ValueError("this cache keeps tokens without entropies; /memory needs the sirllm cache.")
    tokens = cache.remembered(0)
    if not tokens:
        out.print("Nothing is remembered yet.", style="dim")
        return
    decode = conversation.tokenizer.decode
    out.print(_kept_text(tokens, decode))
    out.print()
    out.print(_table(tokens, decode, count))
    kinds = {kind: sum(token.kind == kind for token in tokens) for kind in ("sink", "memory", "recent")}
    out.print(", ".join(f"{number} {kind}" for kind, number in kinds.items()), style="dim")


def _kept_text(tokens: list[Any], decode: Any) -> Any:
    """The kept tokens in order, remembered ones bold, with ``…`` where tokens have gone."""
    from rich.text import Text

    text = Text()
    styles = {"sink": "cyan", "memory": "bold", "recent": "dim"}
    run: list[Any] = []
    for token in [*tokens, None]:
        follows = run and token is not None and token.position == run[-1].position + 1
        if run and not (follows and token.kind == run[-1].kind):
            text.append(decode([one.token_id for one in run]), style=styles[run[-1].kind])
            text.append("" if follows or token is None else " … ", style="yellow")
            run = []
        run.append(token)
    return text


def _table(tokens: list[Any], decode: Any, count: int) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("entropy (nats)", "token", "turn", "position", "kept as"):
        table.add_column(name, justify="left" if name in ("token", "kept as") else "right")
    for token in sorted(tokens, key=lambda one: -one.entropy)[:count]:
        shown = repr(decode([token.token_id]))[1:-1]
        table.add_row(f"{token.entropy:.2f}", _plain(shown), str(token.turn), f"{token.position:,}", token.kind)
    return table


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
