"""`BucketCollator`: rows of one length to tensors, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class BucketCollator:
    """Stacks rows of equal length ``L`` into ``input_ids`` and ``labels``, both int64 ``[B, L]``.

    No attention mask is made (there is nothing to mask, and causal kernels are fastest without one) and no label is
    hidden for looking like padding, which would hide every EOS of a tokenizer that pads with it. Labels default to
    the ids; causal language models shift them.

    Attributes:
        document_positions: also give ``position_ids`` that count from the document's beginning, from ``offset``.
        attention_mask: also give a mask of ones, for trainers that count tokens with it.
    """

    document_positions: bool = False
    attention_mask: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Stack ``rows``.

        Raises:
            ValueError: the rows have different lengths, or positions are wanted and ``offset`` is missing.
        """
        lengths = {len(row["input_ids"]) for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"The rows of a batch must have one length, got {sorted(lengths)}; batch them by bucket.")
        ids = _stack(rows, "input_ids")
        batch = {"input_ids": ids, "labels": _stack(rows, "labels") if "labels" in rows[0] else ids.clone()}
        if self.document_positions:
            if "offset" not in rows[0]:
                raise ValueError("Positions in the document need the column offset: decompose with positions=True.")
            offsets = torch.tensor([int(row["offset"]) for row in rows])
            batch["position_ids"] = offsets[:, None] + torch.arange(ids.shape[1])
        if self.attention_mask:
            batch["attention_mask"] = torch.ones_like(ids)
        return batch


def _stack(rows: Sequence[dict[str, Any]], name: str) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(row[name], dtype=np.int64) for row in rows]))
