"""`HfExtLayer`: one layer's keys and values, of which it may store fewer tokens than it saw."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_ext.caches.row_state import RowState


def gather_slots(states: Tensor, slots: Tensor) -> Tensor:
    """``states[b, h, slots[b, h]]``: ``[B, H, P, D], [B, H or 1, K] -> [B, H, K, D]`` in memory of its own.

    Whole vectors are copied at once, which is several times faster than `Tensor.gather` of single numbers.
    """
    batch, heads, length, d = states.shape
    first = torch.arange(batch * heads, device=states.device).view(batch, heads, 1) * length
    index = (slots.to(states.device) + first).flatten()
    return states.reshape(-1, d).index_select(0, index).view(batch, heads, slots.shape[-1], d)


class HfExtLayer(RowState, DynamicLayer):
    """A `DynamicLayer` that tells tokens seen from tokens stored.

    What the host relies on, and subclasses keep true:

    - `update` returns everything stored before plus everything new, for this forward. A subclass that drops or packs
      tokens does so after that, in `update` or (so that an interrupted forward can be undone) in `commit`.
    - `get_seq_length` is the number of tokens seen; the host slices its input and numbers positions by it.
    - `get_mask_sizes` describes the stored tokens as the last ones of those seen. Kept slots are therefore in the
      order of their positions, with surviving left pads first, and every row keeps the same number of them; then
      the host's masks are exact for left-padded batches.
    - Layers of one cache that store different numbers of tokens need a mask each; that is their cache's business.

    Attributes:
        keys, values: stored states ``[B, H_kv, stored, D]``.
        seen: tokens per row that passed through, pads included.
        record_past: nothing is dropped until `crop`, so that rejected tokens can be taken back.
    """

    row_tensors: ClassVar[tuple[str, ...]] = ("keys", "values")
    plain_values: ClassVar[tuple[str, ...]] = ("seen",)

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.record_past = False

    @property
    def stored(self) -> int:
        """Tokens stored per row."""
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H_kv, q, D]`` and return everything stored: ``[B, H_kv, stored + q, D]``."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def commit(self) -> None:
        """Called after each forward that ran to its end, and by `crop`: the place to drop or pack tokens."""

    def keep(self, slots: Tensor) -> None:
        """Store only ``slots`` ``[B, K]``, ascending in each row, the same for every head."""
        self.keys, self.values = (gather_slots(states, slots[:, None]) for states in (self.keys, self.values))

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, which are still stored.

        Raises:
            ValueError: fewer than ``count`` tokens are stored.
        """
        if count > self.stored:
            raise ValueError(f"cannot take back {count} tokens: this layer stores only {self.stored}.")
        if count > 0:
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
            self.seen -= count

    def get_seq_length(self) -> int:
        """Tokens seen, not stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys the next forward attends to, and how many tokens seen come before them."""
        return self.stored + query_length, self.seen - self.stored

    def activate_past_recording(self) -> None:
        """Drop nothing until `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, then drop or pack what was held back.

        Raises:
            ValueError: the count is positive, or tokens to forget are no longer stored.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens to remove, got {tokens_to_remove}.")
        self.drop_last(-tokens_to_remove)
        recording, self.record_past = self.record_past, False
        self.commit()
        self.record_past = recording

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0
        self.record_past = False

    def offload(self) -> None:
        """Move every tensor of this layer to the CPU."""
        self.map_rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move every tensor of this layer back to its device."""
        if self.is_initialized:
            self.map_rows(lambda tensor: tensor.to(self.device, non_blocking=True))

    def write_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what `read_state` gave."""
        if "keys" in tensors:
            self.lazy_initialization(tensors["keys"], tensors["values"])
        super().write_state(tensors, values)
