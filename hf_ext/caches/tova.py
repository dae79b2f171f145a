"""TOVA (arXiv 2401.06104): whatever the newest token attends to least goes, one choice for all heads of a layer."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_ext.caches.evicting import EvictConfig
from hf_ext.caches.evicting_layer import Evicts
from hf_ext.kernels.window_scores import window_scores


@dataclass(frozen=True)
class TOVAConfig(EvictConfig):
    """Options of TOVA, which protects neither first nor latest tokens but the newest one."""

    type: ClassVar[str] = "tova"
    per_head: ClassVar[bool] = False

    sink_size: int = 0
    recent_size: int = 1

    def score(self, layer: Evicts, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """The newest query's attention, the mean of all heads."""
        return window_scores(query[:, :, -1:], keys, layer.first_slots(keys), scaling)
