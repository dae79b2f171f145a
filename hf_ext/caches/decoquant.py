"""DecoQuant (arXiv 2405.12591): keys and values in few bits, read by attention as they are packed.

Bytes per token of one layer with H key-value heads of dimension D, keys and values together, at ``bits`` = b and
``extra_bits`` = e: ``2 H D (b + e) / 8``, and once per sequence two small matrices of ``2 D^2`` bytes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_ext.caches.base import HfExtCache
from hf_ext.caches.config import CacheConfig, check_numbers, check_sizes
from hf_ext.caches.forward import Forward
from hf_ext.caches.observed import ObservedLayer, note_attended, tell_incoming
from hf_ext.caches.packed_layer import PackedLayer
from hf_ext.caches.rotary import check_movable

BITS = (2, 4, 8)
METHODS = ("allocated", "uniform")
EXTRA_BITS = {2: 0.5, 4: 0.0, 8: 0.0}


@dataclass(frozen=True)
class DecoQuantConfig(CacheConfig):
    """Options of DecoQuant.

    Attributes:
        bits: average bits of a stored number: 2, 4 or 8. With ``"allocated"`` this counts the scales, too.
        method: ``"allocated"`` gives each coefficient its own number of bits (our default, measured better);
            ``"uniform"`` is the released method: equal widths, symmetric, one float16 scale per token.
        extra_bits: bits per number on top of ``bits`` with ``"allocated"``; None for 0.5 at 2 bits and 0 above.
            Formats with groups of 32 spend a whole bit on scales and offsets.
        group: channels of a group that ``"uniform"`` decomposes together; it divides the head dimension.
        query_metric: measure the error of keys by what it does to the scores of the queries seen, with
            ``"allocated"``.
        pre_rope: pack keys as they were before the rotary embedding, and turn them again when they are read. Reading
            then rebuilds the keys of one layer at a time, which is slower. Under a cache that drops tokens each layer
            also stores every token's place, in 4 bytes.
        sink_size: first tokens of each row that are never packed.
        recent_size: latest tokens that are never packed.
        first_block: tokens a row must have before its basis is computed, from all of them.
        block_size: tokens that are packed together once there is a basis.
    """

    type: ClassVar[str] = "decoquant"

    bits: int = 4
    method: str = "allocated"
    extra_bits: float | None = None
    group: int = 16
    query_metric: bool = True
    pre_rope: bool = False
    sink_size: int = 4
    recent_size: int = 0
    first_block: int = 128
    block_size: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(f"bits must be 2, 4 or 8, got {self.bits!r}.")
        if self.method not in METHODS:
            raise ValueError(f'method must be "allocated" or "uniform", got {self.method!r}.')
        if self.extra_bits is not None:
            check_numbers(self, "extra_bits")
            if not 0 <= self.extra_bits <= 8 - self.bits:
                raise ValueError(
                    f"extra_bits must be from 0 to {8 - self.bits} with {self.bits} bits, got {self.extra_bits}."
                )
        check_sizes(self, "sink_size", "recent_size", least=0)
        check_sizes(self, "group", "first_block", "block_size", least=1)

    def check(self, model_config: Any) -> None:
        """Raise `ValueError` for a head dimension that the options do not fit."""
        d = head_dimension(model_config)
        if self.method == "uniform" and d % self.group:
            raise ValueError(f"group must divide the head dimension {d} of this model, got {self.group}.")
        if self.method == "uniform" and d * self.bits % 8:
            raise ValueError(f"{d} channels of {self.bits} bits fill no whole number of bytes.")
        if self.method == "allocated" and self.row_bytes(d) < 2:
            raise ValueError(f"a head dimension of {d} is too small for {self.bits} bits.")

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of codes for one token and head."""
        if self.method == "uniform":
            return head_dim * self.bits // 8
        extra = EXTRA_BITS[self.bits] if self.extra_bits is None else self.extra_bits
        return int(head_dim * (self.bits + extra) / 8) - 1  # one byte is the scale

    def layer(self) -> PackedLayer:
        """A new, empty layer."""
        return PackedLayer(self)

    def build(self, model: Any, inner: tuple[CacheConfig, ...]) -> "DecoQuantCache":
        """A new cache for ``model``."""
        self.refuse_inner(inner)
        self.check_decoder(model.get_decoder())
        return DecoQuantCache(self, model)

    def check_decoder(self, decoder: nn.Module) -> None:
        """Raise `ValueError` for a decoder whose keys ``pre_rope`` could not turn back."""
        if self.pre_rope:
            check_movable(decoder, ["full_attention"], "pre_rope decoquant", "leave pre_rope out")


class DecoQuantCache(HfExtCache):
    """A cache whose full-attention layers are packed; attention over a prompt is exact, later reads are not."""

    config: DecoQuantConfig

    def __init__(self, config: DecoQuantConfig, model: Any) -> None:
        self.config = config
        super().__init__(config, model)

    def make_layer(self, layer_idx: int) -> PackedLayer:
        """A packed layer."""
        return self.config.layer()

    def begin_forward(self, forward: Forward) -> None:
        """Tell the layers which of the new tokens are real."""
        super().begin_forward(forward)
        tell_incoming(self.observed, forward, self.committed)

    def end_forward(self, forward: Forward, hidden_states: Tensor) -> None:
        """Pack what is ready."""
        note_attended(self.observed, forward)
        super().end_forward(forward, hidden_states)

    @property
    def observed(self) -> list[ObservedLayer]:
        """The packed layers."""
        return [layer for layer in self.layers if isinstance(layer, ObservedLayer)]


def head_dimension(model_config: Any) -> int:
    """Channels of one key-value head."""
    text = model_config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
