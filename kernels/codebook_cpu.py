"""The compiled CPU path of `hf_ext.kernels.codebook`; returns None wherever it does not apply."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_ext.kernels.codebook import CodebookWeight


def decode_compiled(weight: "CodebookWeight", dtype: torch.dtype) -> Tensor | None:
    return None


def gemv_compiled(x: Tensor, weight: "CodebookWeight") -> Tensor | None:
    return None
