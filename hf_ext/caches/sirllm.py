"""SirLLM (arXiv 2405.12528): an endless dialogue remembers the tokens that surprised the model most.

The token entropy of ``x_i`` is ``e_i = -log P(x_i | x_<i)`` in nats. Before a turn of q tokens that would exceed the
capacity ``C = s + m + r`` the memory keeps, in each row and alike in all layers, the ``m - q`` tokens of highest
entropy, the first s tokens, and the most recent ones until ``C - q`` slots are full; then every stored entropy is
multiplied by the decay ratio, so that a token of t turns ago counts ``e_i decay^t``.

Departures from the released code, each with an option or a reason:

- The released code stores ``-log P(x_i | x_<=i)`` (the surprise of seeing the same token again) for the token after
  ``x_i``, and gives the first token of each forward the largest value in it; ``repo_compat=True`` does the same. The
  default is the paper's formula, also across forwards: the prediction after the last token is kept.
- A token that nothing predicts (the first of a row) counts as surprising as a uniform guess, ``log V``.
- It evicts only before a turn, so that a long answer exceeds C; ``evict="turn"`` does the same. The default,
  ``evict="block"``, also frees ``block_size`` tokens when a generated token no longer fits.
- A forward of more than ``C - s`` tokens, which it cannot take, runs against the sinks alone and is cut down to C
  after it. Feed long prompts in pieces (``generate(prefill_chunk_size=...)``) to let them see more.
- It serves one row; here every row of a left-padded batch has its own choice and its padding goes first.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.caches.config import CacheConfig, check_numbers, check_sizes
from hf_ext.caches.forward import Forward
from hf_ext.caches.keep import keep_slots
from hf_ext.caches.sink_window import check_positions
from hf_ext.caches.streaming import StreamingCache
from hf_ext.caches.surprisal import head_scale, surprisal, surprisal_of_logits


@dataclass(frozen=True)
class SirLLMConfig(CacheConfig):
    """Options of SirLLM, with the paper's symbols.

    Attributes:
        sink_size: s, first tokens of each row that always stay.
        memory_size: m, tokens of highest entropy.
        recent_size: r, latest tokens that always stay.
        decay: η in (0, 1], factor on every stored entropy per turn; 1 never forgets, less favours recent turns.
        positions: ``"dense"`` (index among the stored tokens, as in the paper) or ``"original"``.
        evict: ``"block"`` keeps the capacity during answers too, ``"turn"`` evicts only before a turn, as the paper.
        block_size: tokens that go at once when a generated token no longer fits, with ``evict="block"``.
        auto_turn: a forward of several tokens that follows generated ones begins a new turn by itself.
        repo_compat: the entropy of the released code in place of the paper's.
    """

    type: ClassVar[str] = "sirllm"

    sink_size: int = 4
    memory_size: int = 508
    recent_size: int = 512
    decay: float = 1.0
    positions: str = "dense"
    evict: str = "block"
    block_size: int = 64
    auto_turn: bool = True
    repo_compat: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "sink_size", "memory_size", "recent_size", least=0)
        check_sizes(self, "block_size", least=1)
        check_positions(self.positions)
        check_numbers(self, "decay")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay!r}.")
        if self.evict not in ("block", "turn"):
            raise ValueError(f'evict must be "block" or "turn", got {self.evict!r}.')
        if self.block_size > self.memory_size + self.recent_size:
            raise ValueError(
                f"block_size must be at most memory_size + recent_size ({self.memory_size + self.recent_size}), got "
                f"{self.block_size}."
            )

    @property
    def capacity(self) -> int:
        """C, tokens stored per row."""
        return self.sink_size + self.memory_size + self.recent_size

    def build(self, model: Any, inner: tuple[CacheConfig, ...]) -> "SirLLMCache":
        """A new cache for ``model``."""
        self.refuse_inner(inner)
        return SirLLMCache(self, model)


@dataclass(frozen=True)
class RememberedToken:
    """One stored token.

    Attributes:
        row: row of the batch.
        token_id: the token.
        entropy: its stored entropy in nats, decayed.
        position: its index among the tokens its row saw, pads included.
        turn: the turn it came in, from 0.
        kind: why it is there: ``"sink"``, ``"memory"`` or ``"recent"``.
    """

    row: int
    token_id: int
    entropy: float
    position: int
    turn: int
    kind: str


class SirLLMCache(StreamingCache):
    """Sinks, a memory of the most surprising tokens, and a recent window.

    Attributes:
        ids, entropy, turns: ``[B, P]`` token, stored entropy in nats, and turn of each stored token.
        hidden: ``[B, 1 or more, hidden]`` last final hidden states; the last one predicts the next token.
        logits: ``[B, V]`` the prediction itself, where the model's head has made it.
        turn: number of the current turn, from 0.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (
        *StreamingCache.row_tensors,
        *("ids", "entropy", "turns", "hidden", "logits"),
    )
    plain_values: ClassVar[tuple[str, ...]] = (*StreamingCache.plain_values, "turn", "answered")
    config: SirLLMConfig

    def __init__(self, config: SirLLMConfig, model: Any) -> None:
        dense, block = config.positions == "dense", config.block_size if config.evict == "block" else 0
        super().__init__(config, model, config.capacity, config.sink_size, dense, block)
        text_config = model.config.get_text_config(decoder=True)
        if model.get_output_embeddings() is None:
            raise ValueError(f"the sirllm cache needs a model with an output head; {type(model).__name__} has none.")
        self.scale = head_scale(text_config)
        self.unpredicted = math.log(text_config.vocab_size)
        self.ids: Tensor | None = None
        self.entropy: Tensor | None = None
        self.turns: Tensor | None = None
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self.turn = 0
        self.answered = False

    # --- turns ---------------------------------------------------------------------------------------------------

    def new_turn(self, reserve: int = 0) -> None:
        """Begin a new turn of the dialogue: make room for ``reserve`` tokens, then let stored entropies decay."""
        if self.entropy is None:
            return
        if reserve > 0:
            self.make_room(reserve)
        self.entropy = self.entropy * self.config.decay
        self.turn += 1
        self.answered = False

    def remembered(self, row: int | None = None) -> list[RememberedToken]:
        """The stored tokens of one row or all, in the order of the text, padding left out."""
        if self.ids is None or self.real is None:
            return []
        found = []
        for index in range(self.ids.shape[0]) if row is None else [row]:
            slots = self.real[index].nonzero()[:, 0].tolist()
            for rank, slot in enumerate(slots):
                late = rank >= len(slots) - self.config.recent_size
                kind = "sink" if rank < self.sinks else "recent" if late else "memory"
                found.append(self._remembered(index, slot, kind))
        return found

    def _remembered(self, row: int, slot: int, kind: str) -> RememberedToken:
        assert self.ids is not None and self.entropy is not None and self.ordinals is not None
        assert self.turns is not None
        return RememberedToken(
            row=row,
            token_id=int(self.ids[row, slot]),
            entropy=float(self.entropy[row, slot]),
            position=int(self.ordinals[row, slot]),
            turn=int(self.turns[row, slot]),
            kind=kind,
        )

    # --- one forward ---------------------------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        """Begin a turn where one begins by itself, and make room.

        Raises:
            ValueError: the decoder was given embeddings, whose tokens have no entropy.
        """
        if forward.input_ids is None:
            raise ValueError("the sirllm cache needs input_ids; this forward was given inputs_embeds.")
        turn_begins = forward.length > 1 and self.answered and self.config.auto_turn and not self.record_past
        super().begin_forward(forward)
        if turn_begins:
            self.new_turn()

    def end_forward(self, forward: Forward, hidden_states: Tensor) -> None:
        """Note the new tokens with their entropies."""
        ids = forward.input_ids
        assert ids is not None
        self._new |= {
            "ids": ids,
            "entropy": self._entropies(forward.head, ids, hidden_states, self._new["real"]),
            "turns": torch.full_like(ids, self.turn),
        }
        self.answered = forward.length == 1
        earlier = self.hidden if self.record_past else None
        kept = hidden_states if self.record_past else hidden_states[:, -1:].clone()
        self.hidden, self.logits = kept if earlier is None else torch.cat([earlier, kept], dim=1), None
        super().end_forward(forward, hidden_states)

    def take_logits(self, logits: Tensor) -> None:
        """Keep the prediction of the next token, so that it need not be made again."""
        self.logits = logits.clone()

    @torch.no_grad()
    def _entropies(self, head: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> Tensor:
        """Entropies ``[B, q]`` of the tokens of one forward."""
        compat = self.config.repo_compat
        first = self._entropy_of_first(head, ids, compat)
        rest = surprisal(head, hidden[:, :-1], ids[:, :-1] if compat else ids[:, 1:], self.scale)
        first, rest = first.to(ids.device), rest.to(ids.device)
        if compat and ids.shape[1] > 1:
            first = rest.max(-1, keepdim=True).values
        entropy = torch.cat([first, rest], dim=-1)
        before = torch.ones_like(real[:, :1]) if self.real is None else self.real[:, -1:]
        predicted = torch.cat([before, real[:, :-1]], dim=-1)
        return entropy.masked_fill(~predicted, self.unpredicted)

    def _entropy_of_first(self, head: Any, ids: Tensor, compat: bool) -> Tensor:
        if self.hidden is None:
            return torch.full(ids[:, :1].shape, self.unpredicted, device=ids.device)
        wanted = self.ids[:, -1] if compat and self.ids is not None else ids[:, 0]
        if self.logits is not None:
            return surprisal_of_logits(self.logits, wanted, self.scale)[:, None]
        return surprisal(head, self.hidden[:, -1:], wanted[:, None], self.scale)

    # --- what goes -----------------------------------------------------------------------------------------------

    def choose(self, keep: Tensor, coming: Tensor) -> tuple[Tensor, Tensor]:
        """The paper's choice."""
        assert self.real is not None
        memory = (self.config.memory_size - coming).clamp(min=0)
        return keep_slots(self.real, keep, self.sinks, self.entropy, memory)

    @property
    def slot_tensors(self) -> tuple[str, ...]:
        """Names of the row tensors that hold one value for each stored token."""
        return (*super().slot_tensors, "ids", "entropy", "turns")

    def crop(self, tokens_to_remove: int) -> None:
        """As `StreamingCache.crop`; the prediction goes back as far as it was recorded."""
        if self.hidden is not None:
            left = self.hidden.shape[1] + tokens_to_remove
            self.hidden = self.hidden[:, left - 1 : left].clone() if left > 0 else None
            self.logits = None if tokens_to_remove else self.logits
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the cache can be used again."""
        super().reset()
        self.turn, self.answered = 0, False
