"""PyramidKV (arXiv 2406.02069): SnapKV with a budget that falls linearly from the first layer to the last."""

from dataclasses import dataclass
from typing import ClassVar

from hf_ext.caches.budgets import linear_budgets
from hf_ext.caches.config import check_numbers
from hf_ext.caches.snapkv import SnapKVConfig


@dataclass(frozen=True)
class PyramidKVConfig(SnapKVConfig):
    """Options of PyramidKV.

    Attributes:
        beta: the last layer keeps ``1 / beta`` of the average, or more where the first layers cannot use their share
            of a ratio.
    """

    type: ClassVar[str] = "pyramid_kv"

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "beta")
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, got {self.beta!r}.")

    def shares(self, layers: int) -> list[float]:
        """Each layer's budget relative to the average."""
        if self.layer_budgets is not None:
            return super().shares(layers)
        unit = 1_000_000
        most = int(unit / self.budget) if isinstance(self.budget, float) else None
        return [budget / unit for budget in linear_budgets(unit, layers, self.beta, most=most)]
