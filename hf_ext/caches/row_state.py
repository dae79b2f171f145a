"""Tensors with one row per sequence that must move together, and the plain values that describe them."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor


class RowState:
    """Names its own state once; moving, selecting, measuring and saving it all read those names.

    Attributes:
        row_tensors: names of attributes that are ``[B, ...]`` tensors or None.
        plain_values: names of attributes that are JSON values (counters, lists of numbers).
    """

    row_tensors: ClassVar[tuple[str, ...]] = ()
    plain_values: ClassVar[tuple[str, ...]] = ()

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every row tensor that holds something by ``function`` of it."""
        for name in self.row_tensors:
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel() > 0:
                setattr(self, name, function(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` what row ``beam_idx[i]`` was."""
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self.map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The row tensors that hold something, and the plain values, by name."""
        tensors = {name: getattr(self, name) for name in self.row_tensors}
        values = {name: getattr(self, name) for name in self.plain_values}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}, values

    def write_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take over what `read_state` gave; row tensors that it did not name become None."""
        for name in self.row_tensors:
            setattr(self, name, tensors.get(name))
        for name in self.plain_values:
            setattr(self, name, values[name])
