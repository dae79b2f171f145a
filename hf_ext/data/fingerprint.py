"""Checksums that tell whether a dataset is the one a run or a folder of buckets was begun with."""

import zlib
from typing import Any

import numpy as np

PROBES = 64  # rows whose tokens are looked at, spread over the dataset


def content_crc(dataset: Any) -> int:
    """Checksum of the ``input_ids`` of rows spread over the dataset; 0 if it has none."""
    if not len(dataset) or "input_ids" not in dataset.column_names:
        return 0
    rows = np.unique(np.linspace(0, len(dataset) - 1, PROBES).astype(np.int64))
    column = dataset.select_columns(["input_ids"]).with_format("arrow")[rows.tolist()]["input_ids"]
    return zlib.crc32(np.asarray(column.combine_chunks().flatten(), dtype=np.int64).tobytes())
