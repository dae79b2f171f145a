"""`Forward`: what one forward of the decoder is about, which `Cache.update` is not told."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Forward:
    """One forward of the base decoder with one of our caches.

    A cache may set ``attention_mask`` and ``position_ids`` in `begin_forward`; the decoder then gets those instead.

    Attributes:
        decoder: the base decoder that runs.
        head: the module that makes logits of its hidden states, or None for a model without one.
        input_ids: ``[B, q]``, or None when embeddings were given instead.
        attention_mask: ``[B, seen + q]`` of 0 and 1, or None where there is no padding.
        position_ids: ``[B or 1, q]``, or None where the decoder is to number on from the tokens seen.
        batch, length: B and q.
        device: where the inputs lie.
    """

    decoder: nn.Module
    head: nn.Module | None
    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    batch: int
    length: int
    device: Any

    def positions(self, committed: int) -> Tensor:
        """Where the new tokens stand, ``[B, q]``, after ``committed`` tokens; what the decoder will number them."""
        found = self.position_ids
        if found is None:
            found = torch.arange(committed, committed + self.length, device=self.device)[None]
        return found.expand(self.batch, self.length) if found.ndim == 2 else found

    def check_rows(self, held: int | None) -> None:
        """Refuse a batch that does not fit what a cache holds already, or its own mask.

        Raises:
            ValueError: the cache holds another number of rows, or the mask has another number.
        """
        if held is not None and held != self.batch:
            raise ValueError(f"this cache holds {held} rows, the new tokens have {self.batch}; make a new one.")
        mask = self.attention_mask
        if mask is not None and len(mask) != self.batch:
            raise ValueError(f"attention_mask has {len(mask)} rows, the new tokens have {self.batch}.")

    def left_pads(self) -> Tensor | None:
        """Pads at the left of each row, ``[B]``, or None where there are none.

        Raises:
            ValueError: the mask is not two-dimensional, or hides a token that has a visible one to its left.
        """
        if self.attention_mask is None:
            return None
        mask = self.attention_mask
        if mask.ndim != 2:
            raise ValueError(f"attention_mask must be [batch, tokens] with this cache, got shape {tuple(mask.shape)}.")
        visible = mask != 0
        pads = (~visible).sum(-1)
        if not bool((visible.long().cumsum(-1).eq(0).sum(-1) == pads).all()):
            raise ValueError("this cache needs padding on the left only; attention_mask has zeros after a one.")
        return pads
