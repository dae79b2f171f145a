"""H2O (arXiv 2306.14048): the tokens that drew most attention so far stay, beside the latest ones."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ext.caches.evicting import EvictConfig
from hf_ext.caches.evicting_layer import Evicts
from hf_ext.kernels.window_scores import window_scores


@dataclass(frozen=True)
class H2OConfig(EvictConfig):
    """Options of H2O: half of a layer's budget is for the heaviest hitters of each head, half for the latest tokens.

    ``recent_size`` is the least number of latest tokens; the paper has no sinks of its own, they are heavy hitters.
    """

    type: ClassVar[str] = "h2o"
    accumulates: ClassVar[bool] = True

    sink_size: int = 0

    def protected(self, budget: int) -> tuple[int, int]:
        """First and latest tokens that stay, out of ``budget``."""
        sinks = min(self.sink_size, budget)
        return sinks, min(max(self.recent_size, budget // 2), budget - sinks)

    def score(self, layer: Evicts, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention each key draws from the new queries; what it drew before is carried on."""
        return window_scores(query, keys, layer.first_slots(keys), scaling, per_head=layer.per_head)
