"""Knorm (arXiv 2406.11430): keys of small norm draw most attention, so those stay; no attention is computed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ext.caches.evicting import EvictConfig
from hf_ext.caches.evicting_layer import Evicts


@dataclass(frozen=True)
class KnormConfig(EvictConfig):
    """Options of Knorm. Prompts are compressed; generated tokens are added and stay."""

    type: ClassVar[str] = "knorm"
    prompts_only: ClassVar[bool] = True

    sink_size: int = 0

    def score(self, layer: Evicts, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """The negative norm of each key, for each key-value head."""
        norms = keys.float().norm(dim=-1)
        return -(norms if layer.per_head else norms.mean(1, keepdim=True))
