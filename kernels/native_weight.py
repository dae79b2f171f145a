"""How compiled linear layers are given a stored weight: a C structure that points into its tensors."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# ``enum Type`` of the sources.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FACTOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 3}

SPARSE = ("sparse_rows", "sparse_columns", "sparse_values")


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
