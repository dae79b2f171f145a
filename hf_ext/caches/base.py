"""`HfExtCache`: the base of every cache of hf_ext. It is told of each forward, and knows its bytes and its state."""

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hf_ext.caches import storage
from hf_ext.caches.config import CacheConfig
from hf_ext.caches.forward import Forward
from hf_ext.caches.layer import HfExtLayer
from hf_ext.caches.row_state import RowState
from hf_ext.caches.support import layer_types


class HfExtCache(RowState, Cache):
    """A `transformers.Cache` whose full-attention layers are ours; other layers stay the host's.

    Build it with `hf_ext.make_cache`, which also attaches the hooks that call `begin_forward` and `end_forward`.

    Attributes:
        config: the options it was made with.
        committed: tokens per row of all forwards that ran to their end.
        record_past: nothing is dropped until `crop`.
    """

    plain_values: ClassVar[tuple[str, ...]] = ("committed",)

    def __init__(self, config: CacheConfig, model: Any) -> None:
        text_config = model.config.get_text_config(decoder=True)
        host = DynamicCache(config=text_config).layers
        super().__init__(
            layers=[self.make_layer(i) if type(layer) is DynamicLayer else layer for i, layer in enumerate(host)]
        )
        self.config = config
        self.committed = 0
        self.record_past = False
        self.model_signature = _signature(text_config, layer_types(text_config))
        self._forward: Forward | None = None
        self._sums: list[Tensor] = []  # of this forward's keys and values: finite if and only if they are
        self._host_layers: list[tuple[Any, dict[str, Any]]] = []
        self._decoder: weakref.ref[nn.Module] | None = weakref.ref(model.get_decoder())

    def make_layer(self, layer_idx: int) -> HfExtLayer:
        """A new layer in place of the host's full-attention layer ``layer_idx``."""
        return HfExtLayer()

    @property
    def own_layers(self) -> list[HfExtLayer]:
        """The layers that are ours, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, HfExtLayer)]

    @property
    def stored(self) -> int:
        """Tokens stored per row in the layer that stores most."""
        return max(layer.stored for layer in self.own_layers)

    @property
    def rows(self) -> int | None:
        """Rows of the batch, or None while nothing is stored."""
        keys = self.own_layers[0].keys
        return None if keys is None or keys.dim() != 4 else len(keys)

    # --- what the hooks tell -------------------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        """Take note of a forward that is about to start, and undo one that was interrupted.

        Raises:
            ValueError: the cache was made for another model, or holds another number of rows.
        """
        if self._decoder is None:
            self._decoder = weakref.ref(forward.decoder)
        if self._decoder() is not forward.decoder:
            raise ValueError(
                f"this {type(self).__name__} was made for another model; make one with make_cache(model)."
            )
        self.undo_interrupted()
        forward.check_rows(self.rows)
        self._forward, self._sums = forward, []
        host = [layer for layer in self.layers if not isinstance(layer, HfExtLayer)]
        self._host_layers = [(layer, dict(vars(layer))) for layer in host]

    def end_forward(self, forward: Forward, hidden_states: Tensor) -> None:
        """Take note that the forward ran to its end with these final hidden states ``[B, q, hidden]``.

        Raises:
            ValueError: keys or values were NaN or infinite; the next forward takes this one back.
        """
        if not bool(torch.stack([total.to(forward.device) for total in self._sums]).isfinite().all()):
            raise ValueError(f"keys or values that are NaN or infinite cannot be kept in a {type(self).__name__}.")
        self._forward, self._host_layers = None, []
        self.committed += forward.length
        if not self.record_past:
            for layer in self.own_layers:
                layer.commit()

    def undo_interrupted(self) -> None:
        """Take back what a forward that did not end (an interrupt, no memory left) put into some of the layers."""
        if self._forward is None:
            return
        for layer in self.own_layers:
            layer.drop_last(layer.seen - self.committed)
        for layer, state in self._host_layers:
            for name, value in state.items():
                setattr(layer, name, value)
        self._forward, self._host_layers = None, []

    def take_logits(self, logits: Tensor) -> None:
        """Told the logits ``[B, V]`` after the last token of the forward that just ended, where the head ran."""

    # --- what the host calls -------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `Cache.update`.

        Raises:
            RuntimeError: the model has none of the hooks that tell this cache of its forwards.
        """
        if self._forward is None:
            raise RuntimeError(
                f"{type(self).__name__} was not told of this forward: the model has no hooks for it. Make the cache "
                f"with hf_ext.make_cache(model, ...) for exactly this model."
            )
        self._sums.append(key_states.sum(dtype=torch.float32) + value_states.sum(dtype=torch.float32))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by all forwards that ran to their end."""
        return self.committed

    def activate_past_recording(self) -> None:
        """Drop nothing until `crop`, so that tokens can be taken back."""
        self.record_past = True
        super().activate_past_recording()

    def end_recording(self) -> None:
        """Go back to dropping tokens as they come, starting with what was held back."""
        self.crop(0)
        self.record_past = False
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, then drop what was held back by `activate_past_recording`.

        Raises:
            ValueError: the count is positive, or tokens to forget are no longer stored.
        """
        self.undo_interrupted()
        if -tokens_to_remove > self.committed:
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens: this cache saw {self.committed}.")
        super().crop(tokens_to_remove)
        self.committed += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` of everything what row ``beam_idx[i]`` was."""
        RowState.reorder_cache(self, beam_idx)
        Cache.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        RowState.batch_repeat_interleave(self, repeats)
        Cache.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        RowState.batch_select_indices(self, indices)
        Cache.batch_select_indices(self, indices)

    def reset(self) -> None:
        """Forget everything; the cache can be used again."""
        for name in self.row_tensors:
            setattr(self, name, None)
        self.committed = 0
        self.record_past = False
        self._forward = None
        Cache.reset(self)

    # --- bytes and state -----------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of everything this cache holds, each storage counted once and in full."""
        return sum(self.nbytes_by_component().values())

    def nbytes_by_component(self) -> dict[str, int]:
        """The same bytes by what they hold: keys, values, and each kind of side state."""
        return storage.nbytes_by_name(self._owners())

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on elsewhere: ``{"tensors": {name: Tensor}, "values": JSON values}``."""
        return storage.read(self._owners(), self._describe())

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        """Go on from a `state_dict` of a cache with the same options and the same shape of model.

        Raises:
            ValueError: the state is of another kind of cache or another shape of model.
        """
        decoder = self._decoder() if self._decoder is not None else None
        device = None if decoder is None else next(decoder.parameters()).device
        storage.write(self._owners(), self._describe(), state, device)
        self._forward = None
        return self

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, at once or not at all."""
        storage.save(self.state_dict(), Path(path))

    def load(self, path: str | Path) -> Self:
        """Go on from a file that `save` wrote.

        Raises:
            OSError: the file does not exist.
            ValueError: the file is no whole saved cache, or of another kind.
        """
        return self.load_state_dict(storage.load(Path(path)))

    def _describe(self) -> dict[str, Any]:
        return {"options": self.config.to_dict(), "model": self.model_signature}

    def _owners(self) -> Iterator[tuple[str, Any]]:
        yield "", self
        for index, layer in enumerate(self.layers):
            yield f"layers.{index}.", layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy everything but the model it belongs to, which the copy shares."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in vars(self).items():
            setattr(new, name, copy.deepcopy(value, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: without the model, so that the first model that uses the copy is its model."""
        return {**vars(self), "_decoder": None, "_forward": None, "_sums": [], "_host_layers": []}


def _signature(config: Any, types: list[str]) -> str:
    """The shape of a model's keys and values, and its tokens, in words."""
    sharing = [layer for layer, kind in enumerate(types) if kind == "dummy"]
    shared = f" ({', '.join(map(str, sharing))} sharing those of others)" if sharing else ""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"{config.num_hidden_layers} layers{shared} of {heads} heads of {width}, {config.vocab_size} tokens"
