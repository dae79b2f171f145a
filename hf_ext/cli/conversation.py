"""A conversation whose past lies in a cache: every turn feeds only its own tokens, and it can be saved and gone on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, TextStreamer

from hf_ext.caches import storage
from hf_ext.caches.config import CacheConfig, cache_configs
from hf_ext.cli.turns import TurnFormat
from hf_ext.patches.caches import make_cache

PIECE = 256  # tokens read at once, so that a bounded cache keeps what matters of a long turn and Ctrl-C is heard


class Conversation:
    """What was said, the cache that remembers it, and the tokens the cache has not seen yet.

    Attributes:
        cache: a cache of hf_ext, or the host's own where ``stack`` is None.
        stack: the configs the cache is made from, outermost first.
        messages: the transcript, as the host's list of ``{"role", "content"}``.
        pending: the end of the last turn that the cache has not read: the last token of an answer that was cut short.
        heard: the tokens the cache has read, noted only for the host's own cache, which cannot be saved itself.
        stop: set to True from a signal handler to end the answer after the current token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stack: tuple[CacheConfig, ...] | None,
        *,
        plain: bool = False,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.stack = model, tokenizer, stack
        self.turns = TurnFormat(tokenizer, plain=plain, system=system)
        self.messages: list[dict[str, str]] = []
        self.pending: list[int] = []
        self.heard: list[int] = []
        self.stop = False
        self.cache = self._new_cache()

    def _new_cache(self) -> Any:
        return DynamicCache(config=self.model.config) if self.stack is None else make_cache(self.model, self.stack)

    def reset(self) -> None:
        """Forget everything."""
        self.messages, self.pending, self.heard, self.cache = [], [], [], self._new_cache()

    @property
    def seen(self) -> int:
        """Tokens the cache has read since the beginning."""
        return int(self.cache.get_seq_length())

    @property
    def kept(self) -> int:
        """Tokens the cache stores now."""
        return self.seen if self.stack is None else int(self.cache.stored)

    def nbytes(self) -> int:
        """Bytes the cache holds."""
        if self.stack is not None:
            return int(self.cache.nbytes())
        filled = [layer for layer in self.cache.layers if getattr(layer, "keys", None) is not None]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)

    # --- a turn --------------------------------------------------------------------------------------------------

    def answer(self, text: str, show: Callable[[str], None] | None = None, **generation: Any) -> str:
        """Say ``text`` and return the model's answer; ``show`` is given its pieces as they come.

        Setting `stop` during the call ends the answer early. The conversation then goes on from what was said.

        Args:
            text: the user's words.
            show: called with each new piece of the answer.
            generation: options of ``generate``, such as ``max_new_tokens`` or ``temperature``.
        """
        self.stop = False
        new = self.turns.later(text) if self.messages else self.turns.first(text)
        self.messages.append({"role": "user", "content": text})
        unread = self._read_all_but_last_piece(self.pending + new)
        self.pending = unread
        generated = [] if self.stop else self._generate(unread, show, generation)
        answer: str = self.tokenizer.decode(generated, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    @torch.no_grad()
    def _read_all_but_last_piece(self, ids: list[int]) -> list[int]:
        """Read ids in pieces and return those left for the forward that begins the answer."""
        while len(ids) > PIECE and not self.stop:
            piece = torch.tensor([ids[:PIECE]], device=self.model.device)
            self.model(input_ids=piece, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self._note(ids[:PIECE])
            ids = ids[PIECE:]
        return ids

    def _generate(self, ids: list[int], show: Callable[[str], None] | None, options: dict[str, Any]) -> list[int]:
        """Generate from the cache and ``ids``; `pending` becomes what the cache has not read of all that."""
        seen = self.seen
        inputs = torch.tensor([ids], device=self.model.device)
        mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=self.model.device)
        output = self.model.generate(
            inputs,
            attention_mask=mask,
            past_key_values=self.cache,
            streamer=None if show is None else _Pieces(self.tokenizer, show),
            stopping_criteria=[_Stopped(self)],
            pad_token_id=self._padding(),
            **options,
        )
        everything = output[0].tolist()
        self._note(everything[: self.seen - seen])
        generated = everything[len(ids) :]
        ends = _ends(self.model.generation_config)
        if generated and generated[-1] in ends:  # the template's own end of an answer takes its place
            everything.pop()
        self.pending = everything[self.seen - seen :]
        return generated

    def _note(self, ids: list[int]) -> None:
        if self.stack is None:
            self.heard += ids

    def _padding(self) -> int | None:
        if self.tokenizer.pad_token_id is not None:
            return int(self.tokenizer.pad_token_id)
        return next(iter(_ends(self.model.generation_config)), None)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the conversation to one file (safetensors), at once or not at all."""
        state = {"tensors": {}, "values": None} if self.stack is None else self.cache.state_dict()
        chat = {
            "messages": self.messages,
            "pending": self.pending,
            "heard": self.heard,
            "plain": self.turns.plain,
            "stack": None if self.stack is None else [config.to_dict() for config in self.stack],
            "model": _fingerprint(self.model),
        }
        storage.save({"tensors": state["tensors"], "values": {"chat": chat, "cache": state["values"]}}, Path(path))

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that `save` wrote, with its cache and its options.

        A conversation saved with the host's own cache holds only its tokens, which are read again.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, holds no conversation, or belongs to another model.
        """
        state = storage.load(Path(path))
        chat = state["values"].get("chat")
        if chat is None:
            raise ValueError(f"{path} holds a saved cache, but no conversation.")
        if chat["model"] != _fingerprint(self.model):
            raise ValueError(f"{path} was saved with another model: {chat['model']}, not {_fingerprint(self.model)}.")
        if chat["plain"] != self.turns.plain:
            raise ValueError(f"{path} was saved {'with' if chat['plain'] else 'without'} --plain; load it so, too.")
        stack = None if chat["stack"] is None else cache_configs(chat["stack"])
        cache = self._new_cache() if stack is None else make_cache(self.model, stack)
        if stack is not None:
            tensors = {name: tensor.to(self.model.device) for name, tensor in state["tensors"].items()}
            cache.load_state_dict({"tensors": tensors, "values": state["values"]["cache"]})
        self.stack, self.cache = stack, cache
        self.messages, self.pending = chat["messages"], chat["pending"]
        self.heard, self.stop = [], False
        if stack is None:
            self.pending = self._read_all_but_last_piece([*chat["heard"], *chat["pending"]])


class _Pieces(TextStreamer):
    """Hands the answer on in whole words as it grows."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the host with text that will not change any more."""
        if text:
            self.show(text)


class _Stopped(StoppingCriteria):
    """Ends the answer when the conversation was asked to stop."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.conversation.stop, device=input_ids.device)


def _ends(generation_config: GenerationConfig) -> list[int]:
    ends = generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def _fingerprint(model: Any) -> str:
    """What a saved conversation must agree on with the model that goes on with it."""
    config = model.config.get_text_config(decoder=True)
    return (
        f"{type(model).__name__} of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"vocabulary {config.vocab_size}"
    )
