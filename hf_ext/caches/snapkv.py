"""SnapKV (arXiv 2404.14469): the prompt's last tokens vote for what each head keeps of it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ext.caches.evicting import EvictConfig
from hf_ext.caches.evicting_layer import Evicts
from hf_ext.kernels.window_scores import smooth, window_scores


@dataclass(frozen=True)
class SnapKVConfig(EvictConfig):
    """Options of SnapKV. Prompts are compressed; generated tokens are added and stay.

    Attributes:
        recent_size: the window of latest tokens that votes and stays.
        kernel: neighbouring keys over which votes are pooled (odd).
        pooling: ``"avg"`` or ``"max"``.
    """

    type: ClassVar[str] = "snapkv"
    prompts_only: ClassVar[bool] = True

    sink_size: int = 0
    kernel: int = 5
    pooling: str = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in ("avg", "max"):
            raise ValueError(f'pooling must be "avg" or "max", got {self.pooling!r}.')
        if not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of keys, got {self.kernel!r}.")
        if self.recent_size < 1:
            raise ValueError(f"recent_size must be at least 1: those tokens vote, got {self.recent_size}.")

    def score(self, layer: Evicts, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """The window's pooled attention, for each key-value head."""
        window = query[:, :, -self.recent_size :]
        scores = window_scores(window, keys, layer.first_slots(keys), scaling, per_head=layer.per_head)
        return smooth(scores, self.kernel, self.pooling)
