"""How compiled linear layers are given a stored weight: a C structure that points into its tensors."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# ``enum Type`` of the sources.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FACTOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 3}


class NativeWeight(ctypes.Structure):
    """A structure of pointers first and numbers after them, and the tensors it points into."""

    tensors: tuple[Tensor | None, ...]

    @classmethod
    def pointing_to(cls, held: Sequence[Tensor | None], *numbers: int) -> Any:
        """A reference to a new structure, which keeps the tensors alive."""
        tensors = tuple(None if tensor is None else tensor.contiguous() for tensor in held)
        weight = cls(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), *numbers)
        weight.tensors = tensors
        return ctypes.byref(weight)


def native_factors(*factors: Tensor | None) -> list[Tensor | None]:
    """Factors of a low-rank term in a type that the sources read."""
    plain = [None if factor is None else factor.detach() for factor in factors]
    return [factor if factor is None or factor.dtype in FACTOR_TYPES else factor.float() for factor in plain]


def native_index(name: str, index: Tensor | None, size: int) -> Tensor | None:
    """An index in a type that the sources read.

    Raises:
        ValueError: an entry is negative or not below ``size``; the sources would read or write beyond a tensor.
    """
    if index is None or not len(index):
        return None
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise ValueError(f"{name} must be from 0 to {size - 1}, got {int(index.min())} to {int(index.max())}.")
    return index if index.dtype == torch.int16 else index.to(torch.int32)


def native_sparse(weight: Any, out: int, columns: int) -> list[Tensor | None]:
    """Rows, columns and values of the single weights of a stored weight ``[out, columns]``."""
    rows = native_index("sparse_rows", weight.sparse_rows, out)
    places = native_index("sparse_columns", weight.sparse_columns, columns)
    if rows is None or places is None:
        return [None, None, None]
    values: Tensor = weight.sparse_values.half()
    if not len(rows) == len(places) == len(values):
        counts = f"{len(rows)} rows, {len(places)} columns and {len(values)} values"
        raise ValueError(f"Single weights need as many rows as columns and values, got {counts}.")
    if rows.dtype != places.dtype:
        rows, places = rows.to(torch.int32), places.to(torch.int32)
    return [rows, places, values]


def index_bytes(index: Tensor | None) -> int:
    """Bytes of an entry, 0 without an index."""
    return 0 if index is None else index.element_size()
