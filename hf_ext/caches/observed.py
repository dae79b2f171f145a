"""Layers that see the queries: they watch, mask or replace the attention over their own keys and values.

``Cache.update`` is never told the queries. A layer therefore marks the keys it returns, and the attention seam
(`hf_ext.patches.attention`) calls `ObservedLayer.attend` in place of the model's attention function whenever the keys
it is given carry such a mark. This works for every model that calls its attention through the host's
`AttentionInterface`, with whatever implementation it was loaded, and for layers that share another layer's keys.
"""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_ext.caches.forward import Forward
from hf_ext.caches.layer import HfExtLayer

MARK = "hf_ext_layer"  # the attribute, on returned keys, that names their layer
# Whether attention functions look for the mark, whether any cache needs that, and decoders whose layers were all seen.
SEAM = SimpleNamespace(open=False, used=False, proved=weakref.WeakSet())


class ObservedLayer(HfExtLayer):
    """Counts the real tokens of each row, and makes the attention mask of what it stores itself.

    Real tokens of a row are the last ones of what is stored; before them lie pads or slots that hold nothing. So rows
    may store different numbers of tokens, and layers different ones again.

    Attributes:
        real_count: ``[B]`` int64, real tokens stored per row.
        unbroken: how many of the latest tokens are stored without a gap; None when all are.
        incoming: ``[B]`` real tokens among those of the coming forward, or None when all of them are.
        positions: ``[B, q]`` where the tokens of the coming forward stand in the text.
        attended: `attend` was called in this forward.
        proved: the model is known to call `attend`.
    """

    row_tensors: ClassVar[tuple[str, ...]] = (*HfExtLayer.row_tensors, "real_count")
    plain_values: ClassVar[tuple[str, ...]] = (*HfExtLayer.plain_values, "unbroken")

    def __init__(self) -> None:
        super().__init__()
        self.real_count: Any = None
        self.incoming: Tensor | None = None
        self.positions: Tensor | None = None
        self.unbroken: int | None = None
        self._uneven = False
        self.attended = False
        self.proved = False
        SEAM.used = True

    # --- one forward ---------------------------------------------------------------------------------------------

    def expect(self, incoming: Tensor | None, decoder: nn.Module, positions: Tensor) -> None:
        """Told before a forward of ``decoder`` how many of its tokens are real, and where they stand."""
        self.incoming, self.positions, self.proved = incoming, positions, decoder in SEAM.proved
        self.attended = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H_kv, q, D]``; return everything stored, with the keys marked."""
        self.count(key_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return self.mark(keys), values

    def count(self, key_states: Tensor) -> None:
        """Add the new tokens to the real ones."""
        if self.real_count is None:
            self.real_count = torch.zeros(len(key_states), dtype=torch.long, device=key_states.device)
        if self.unbroken is not None:
            self.unbroken += key_states.shape[-2]
        if self.incoming is None:
            self.real_count = self.real_count + key_states.shape[-2]
        else:
            self.real_count = self.real_count + self.incoming.to(self.real_count.device)
            self._uneven = True

    def mark(self, keys: Tensor) -> Tensor:
        """The same keys as another tensor object, marked as this layer's."""
        keys = keys[:]
        setattr(keys, MARK, self)
        return keys

    def attend(
        self,
        inner: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        """Called in place of the attention function ``inner``, which it calls with this layer's own mask."""
        self.attended = True
        mask = self.own_mask(query, key.shape[-2], attention_mask, module)
        self.observe(query, key, value, kwargs.get("scaling"), module)
        return inner(module, query, key, value, mask, **kwargs)

    def observe(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, module: Any) -> None:
        """Told rotated queries ``[B, Hq, q, D]`` and all keys and values ``[B, H, n, D]``, before attention."""

    def own_mask(self, query: Tensor, length: int, mask: Any, module: Any) -> Any:
        """The mask for ``length`` keys of which the newest are the queries' own; the host's where that fits.

        Raises:
            ValueError: rows of different lengths with an attention implementation that takes no such mask.
        """
        q_length = query.shape[-2]
        if length == q_length and (mask is None or mask.shape[-1] == length):
            return mask
        if q_length == 1 and not self._uneven:
            return None if mask is None else _like(mask, torch.ones_like(mask[..., :1], dtype=torch.bool), length)
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
        if "flash" in implementation or "flex" in implementation:
            raise ValueError(
                f"this cache makes masks for the attention implementations sdpa and eager; got {implementation!r}."
            )
        slot = torch.arange(length, device=query.device)
        last = torch.arange(length - q_length, length, device=query.device)
        first = (length - self.real_count.to(query.device)).clamp(min=0)
        visible = (slot <= last[:, None]) & (slot >= first[:, None, None])
        visible = visible[:, None]
        if (mask is None and "eager" in implementation) or (mask is not None and mask.dtype != torch.bool):
            return torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill(
                ~visible, torch.finfo(query.dtype).min
            )
        # A row that sees nothing (a pad) would be 0 / 0: it sees its own slot instead, and nobody reads the result.
        return visible | (~visible.any(-1, keepdim=True) & (slot == last[:, None]))

    # --- what is stored ------------------------------------------------------------------------------------------

    def drop_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, which are still stored.

        Raises:
            ValueError: fewer than ``count`` tokens are stored.
        """
        self.check_unbroken(count)
        super().drop_last(count)
        if count > 0:
            self.real_count = (self.real_count - count).clamp(min=0)

    def check_unbroken(self, count: int) -> None:
        """Note that the last ``count`` tokens go.

        Raises:
            ValueError: some of them are no longer stored.
        """
        if self.unbroken is not None:
            if count > self.unbroken:
                raise ValueError(f"cannot remove the last {count} tokens: some of them are no longer stored.")
            self.unbroken -= count

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.real_count = self.incoming = self.positions = self.unbroken = None
        self._uneven = self.attended = self.proved = False

    def write_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what `read_state` gave."""
        super().write_state(tensors, values)
        self._uneven = self.real_count is not None and bool((self.real_count != self.stored).any())


def tell_incoming(layers: list[ObservedLayer], forward: Forward, committed: int) -> None:
    """Tell the layers how many tokens of a forward are real in each row, and where they stand.

    Raises:
        ValueError: the mask is not that of all tokens seen and new, or has padding elsewhere than on the left.
    """
    pads = forward.left_pads()
    incoming = None
    if pads is not None and forward.attention_mask is not None:
        if forward.attention_mask.shape[1] != committed + forward.length:
            raise ValueError(
                f"attention_mask must be [batch, {committed + forward.length}] (tokens seen and new) with this cache, "
                f"got {tuple(forward.attention_mask.shape)}."
            )
        fresh = forward.length - (pads - committed).clamp(0, forward.length)
        incoming = None if bool((fresh == forward.length).all()) else fresh
    for layer in layers:
        layer.expect(incoming, forward.decoder, forward.positions(committed))


def note_attended(layers: list[ObservedLayer], forward: Forward) -> bool:
    """Whether every layer that got keys in this forward also saw its attention; remembered for the decoder if so."""
    attended = all(layer.attended for layer in layers if layer.is_initialized)
    if attended:
        SEAM.proved.add(forward.decoder)
    return attended


def check_attended(layers: list[ObservedLayer], forward: Forward, kind: str) -> None:
    """`note_attended`, for a cache of type ``kind`` that is lost without it.

    Raises:
        RuntimeError: the model does not call its attention through the host's interface.
    """
    if not note_attended(layers, forward):
        raise RuntimeError(
            f"the {kind} cache never saw the attention of {type(forward.decoder).__name__}: hf_ext is not installed, "
            f"or the model does not use transformers' AttentionInterface."
        )


def check_crop(layers: list[ObservedLayer], tokens_to_remove: int) -> None:
    """Refuse a crop that some layer cannot do, before any layer does it.

    Raises:
        ValueError: some of the tokens to remove are no longer stored.
    """
    gaps = [layer.unbroken for layer in layers if layer.unbroken is not None]
    if gaps and -tokens_to_remove > min(gaps):
        raise ValueError(f"cannot remove the last {-tokens_to_remove} tokens: some of them are no longer stored.")


def _like(mask: Tensor, visible: Tensor, length: int) -> Tensor:
    """An all-visible mask of ``length`` keys in the manner of ``mask``."""
    visible = visible.expand(*visible.shape[:-1], length)
    return visible if mask.dtype == torch.bool else torch.zeros_like(visible, dtype=mask.dtype)
