"""`StreamingCache`: a bounded memory of a stream that never ends; subclasses say which tokens stay.

All layers keep the same tokens of a row. With dense positions (arXiv 2309.17453, 2405.12528) a kept token's position
is its index among those kept: when tokens go, the keys behind them are moved down and the query goes on right after
them, so that no position ever exceeds the budget, however long the stream. A key is moved only when its position
falls, hence at most as often as the budget has tokens. Nothing is moved or reordered before the first token goes:
until then the numbers are those of `DynamicCache`, bit for bit.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.caches.base import HfExtCache
from hf_ext.caches.config import CacheConfig
from hf_ext.caches.forward import Forward
from hf_ext.caches.layer import HfExtLayer, gather_slots
from hf_ext.caches.rotary import check_movable, frequencies, move_keys
from hf_ext.caches.support import layer_types

UNCOMMITTED = 256  # tokens held back for `crop` before a recording that nobody crops counts as over


class StreamingCache(HfExtCache):
    """Stores at most ``capacity`` tokens per row between forwards, and ``capacity`` or ``sinks + q`` during one.

    Attributes:
        capacity: tokens stored per row.
        sinks: first tokens of each row that always stay.
        dense: positions are indices among the stored tokens, once some have gone.
        block: tokens that go at once when a generated token no longer fits; 0 lets an answer exceed the capacity.
        positions: ``[B, P]`` position each stored key is rotated to.
        ordinals: ``[B, P]`` index of each stored token among those its row saw, pads included.
        real: ``[B, P]``, False for padding.
        next_position: ``[B]`` position of the next token.
        compacted: tokens went, so that slots and (dense) positions are no longer those the host counts.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("positions", "ordinals", "real", "next_position")
    plain_values: ClassVar[tuple[str, ...]] = (*HfExtCache.plain_values, "compacted", "uncommitted")

    def __init__(self, config: CacheConfig, model: Any, capacity: int, sinks: int, dense: bool, block: int) -> None:
        super().__init__(config, model)
        self.capacity, self.sinks, self.dense, self.block = capacity, sinks, dense, block
        self.layer_types = layer_types(model.config)
        if dense:
            check_movable(model.get_decoder(), self.layer_types, config.type)
        self.positions: Tensor | None = None
        self.ordinals: Tensor | None = None
        self.real: Tensor | None = None
        self.next_position: Tensor | None = None
        self.compacted = False
        self.uncommitted = 0
        self._new: dict[str, Tensor] = {}

    def choose(self, keep: Tensor, coming: Tensor) -> tuple[Tensor, Tensor]:
        """`keep_slots` for rows that keep ``keep [B]`` tokens when ``coming [B]`` more are expected."""
        raise NotImplementedError

    # --- one forward ---------------------------------------------------------------------------------------------

    def begin_forward(self, forward: Forward) -> None:
        """Make room for the new tokens, and give the decoder the mask and positions that fit what is stored."""
        if self.uncommitted > UNCOMMITTED:
            self.end_recording()
        super().begin_forward(forward)
        real = self._real_of_new(forward)
        self.make_room(forward.length, real)
        if self.compacted:
            self._place(forward, real)
        positions = forward.position_ids
        if positions is None:
            positions = torch.arange(self.committed, self.committed + forward.length, device=forward.device)[None]
        if positions.ndim != 2:
            raise ValueError(f"position_ids must be [batch, tokens] with this cache, got {tuple(positions.shape)}.")
        ordinals = torch.arange(self.committed, self.committed + forward.length, device=forward.device)
        shape = (forward.batch, forward.length)
        self._new = {"positions": positions.expand(shape), "ordinals": ordinals.expand(shape), "real": real}

    def end_forward(self, forward: Forward, hidden_states: Tensor) -> None:
        """Append what belongs to the new tokens, and come back within the budget if they exceeded it."""
        self.append(self._new)
        self.next_position = self._new["positions"][:, -1] + 1
        self._new = {}
        super().end_forward(forward, hidden_states)
        if self.record_past:
            self.uncommitted += forward.length
        elif self.stored > self.capacity and forward.length > 1:
            self.evict(0)

    def append(self, new: dict[str, Tensor]) -> None:
        """Append ``[B, q]`` tensors to the row tensors of those names."""
        for name, tensor in new.items():
            old = getattr(self, name)
            setattr(self, name, tensor.clone() if old is None else torch.cat([old, tensor.to(old.device)], dim=-1))

    def make_room(self, length: int, real: Tensor | None = None) -> None:
        """Drop what must go so that ``length`` more tokens fit, of which ``real`` ``[B, length]`` are no padding."""
        if self.record_past or self.stored == 0 or self.stored + length <= self.capacity:
            return
        if length > 1:
            self.evict(length if real is None else real.sum(-1))
        elif self.block > 0:
            self.evict(1, self.block)

    def _real_of_new(self, forward: Forward) -> Tensor:
        mask = forward.attention_mask
        if mask is None:
            return torch.ones(forward.batch, forward.length, dtype=torch.bool, device=forward.device)
        if mask.ndim != 2 or mask.shape[1] != self.committed + forward.length:
            raise ValueError(
                f"attention_mask must be [batch, {self.committed + forward.length}] (tokens seen and new) with this "
                f"cache, got {tuple(mask.shape)}."
            )
        return mask[:, self.committed :] != 0

    def _place(self, forward: Forward, real: Tensor) -> None:
        assert self.real is not None and self.next_position is not None
        if forward.attention_mask is not None or not bool(self.real.all()):
            mask = torch.ones(forward.batch, self.committed + forward.length, dtype=torch.long, device=forward.device)
            mask[:, self.committed - self.real.shape[1] : self.committed] = self.real
            mask[:, self.committed :] = real
            forward.attention_mask = mask
        if self.dense:
            forward.position_ids = (self.next_position[:, None] + real.long().cumsum(-1) - 1).clamp(min=0)

    # --- what goes and where the rest moves ----------------------------------------------------------------------

    @torch.no_grad()
    def evict(self, coming: Tensor | int, freed: int | None = None) -> None:
        """In each row that ``coming`` more tokens would fill beyond the capacity, free that many slots or ``freed``.

        Other rows keep every token; padding goes from all.
        """
        assert self.real is not None
        stored = self.real.sum(-1)
        coming = torch.zeros_like(stored) + coming
        due = stored + coming > self.capacity
        room = coming if freed is None else torch.zeros_like(coming) + freed
        keep = torch.where(due, (self.capacity - room).clamp(min=self.sinks), stored)
        slots, real = self.choose(keep, torch.where(due, room, 0))
        kept = {name: getattr(self, name).gather(-1, slots) for name in self.slot_tensors} | {"real": real}
        if self.dense:
            kept["positions"], kept["next_position"] = (real.long().cumsum(-1) - 1).clamp(min=0), real.sum(-1)
        layers = [self._kept_layer(index, slots, kept) for index in range(len(self.layers))]
        for layer, states in zip(self.layers, layers, strict=True):  # all is computed before anything changes
            layer.keys, layer.values = states
        for name, tensor in kept.items():
            setattr(self, name, tensor)
        self.compacted = True

    @property
    def slot_tensors(self) -> tuple[str, ...]:
        """Names of the row tensors that hold one value for each stored token."""
        return ("positions", "ordinals", "real")

    def _kept_layer(self, index: int, slots: Tensor, kept: dict[str, Tensor]) -> tuple[Any, Any]:
        """Keys and values of one layer after an eviction: what stays of ours, moved to its new positions."""
        assert self.next_position is not None and self.positions is not None
        layer = self.layers[index]
        keys, values = layer.keys, layer.values
        if keys is None or keys.numel() == 0:
            return keys, values
        next_position = kept.get("next_position", self.next_position)
        moved = (next_position - self.next_position)[:, None]  # a sliding layer's tokens stay right before the next
        if isinstance(layer, HfExtLayer):
            keys, values = (gather_slots(states, slots[:, None]) for states in (keys, values))
            moved = kept["positions"] - self.positions.gather(-1, slots)
        return (self._move(keys, moved, self.layer_types[index]) if self.dense else keys), values

    def _move(self, keys: Tensor, shift: Tensor, layer_type: str) -> Tensor:
        decoder = self._decoder() if self._decoder is not None else None
        if decoder is None:
            raise RuntimeError("the model of this cache is gone; its frequencies are needed to move stored keys.")
        return move_keys(keys, shift.to(keys.device), frequencies(decoder, layer_type))

    # --- taking back ---------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, then come back within the budget.

        Raises:
            ValueError: the count is positive, or some of those tokens are no longer stored.
        """
        count = -tokens_to_remove
        if count > 0 and self.ordinals is not None and self.positions is not None:
            wanted = torch.arange(self.committed - count, self.committed, device=self.ordinals.device)
            if count > self.ordinals.shape[1] or not bool((self.ordinals[:, -count:] == wanted).all()):
                raise ValueError(f"cannot remove the last {count} tokens: some of them are no longer stored.")
            self.next_position = self.positions[:, -count].clone()
            for name in self.slot_tensors:
                setattr(self, name, getattr(self, name)[:, :-count])
        super().crop(tokens_to_remove)
        self.uncommitted = 0
        if self.stored > self.capacity and self.block > 0:
            self.evict(0)

    def reset(self) -> None:
        """Forget everything; the cache can be used again."""
        super().reset()
        self.compacted, self.uncommitted, self._new = False, 0, {}
