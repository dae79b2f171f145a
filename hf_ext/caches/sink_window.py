"""Attention sinks and a recent window (StreamingLLM, arXiv 2309.17453): the first tokens and the latest ones stay."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_ext.caches.config import CacheConfig, check_sizes
from hf_ext.caches.keep import keep_slots
from hf_ext.caches.streaming import StreamingCache


@dataclass(frozen=True)
class SinkWindowConfig(CacheConfig):
    """Options of the sink window.

    Attributes:
        sink_size: first tokens of each row that always stay.
        window_size: latest tokens that stay beside them.
        positions: ``"dense"`` (index among the stored tokens, as in the paper) or ``"original"``.
        block_size: tokens that go at once when a generated token no longer fits.
    """

    type: ClassVar[str] = "sink_window"

    sink_size: int = 4
    window_size: int = 1020
    positions: str = "dense"
    block_size: int = 64

    def __post_init__(self) -> None:
        check_sizes(self, "sink_size", least=0)
        check_sizes(self, "window_size", "block_size", least=1)
        check_positions(self.positions)
        if self.block_size > self.window_size:
            raise ValueError(f"block_size must be at most window_size ({self.window_size}), got {self.block_size}.")

    @property
    def capacity(self) -> int:
        """Tokens stored per row."""
        return self.sink_size + self.window_size

    def build(self, model: Any, inner: tuple[CacheConfig, ...]) -> "SinkWindowCache":
        """A new cache for ``model``."""
        self.refuse_inner(inner)
        return SinkWindowCache(self, model)


class SinkWindowCache(StreamingCache):
    """Stores the first ``sink_size`` and the last ``window_size`` tokens of each row."""

    config: SinkWindowConfig

    def __init__(self, config: SinkWindowConfig, model: Any) -> None:
        dense = config.positions == "dense"
        super().__init__(config, model, config.capacity, config.sink_size, dense, config.block_size)

    def choose(self, keep: Tensor, coming: Tensor) -> tuple[Tensor, Tensor]:
        """Sinks and the latest tokens."""
        assert self.real is not None
        return keep_slots(self.real, keep, self.sinks)


def check_positions(positions: str) -> None:
    """Raise `ValueError` unless this is a way to number the stored tokens."""
    if positions not in ("dense", "original"):
        raise ValueError(f'positions must be "dense" or "original", got {positions!r}.')
