"""What a decomposition holds: tokens a bucket, averages (arXiv 2405.13226, App. F), losses."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from hf_ext.data.decompose import Decomposition, flat_column
from hf_ext.data.pieces import Integers


@dataclass(frozen=True)
class BucketStatistics:
    """Counts of one decomposition.

    Attributes:
        sequences: rows of each length (tokens), shortest first.
        documents: documents cut; 0 if they were not given.
        document_tokens: their tokens, appended EOS included.
        dropped_tokens: tokens in tails shorter than the shortest bucket.
        padding_tokens: padding in padded tails.
        unlearned_tokens: tokens of rows left out because no label in them is learned.
    """

    sequences: Mapping[int, int]
    documents: int = 0
    document_tokens: int = 0
    dropped_tokens: int = 0
    padding_tokens: int = 0
    unlearned_tokens: int = 0
    tokens: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        tokens = {length: length * count for length, count in self.sequences.items()}
        object.__setattr__(self, "tokens", tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens in all buckets."""
        return sum(self.tokens.values())

    @property
    def average_sequence_length(self) -> float:
        """Tokens of a row, averaged over rows; 0 without rows."""
        return self.total_tokens / max(sum(self.sequences.values()), 1)

    @property
    def average_context_length(self) -> float:
        """Tokens before a token in its row, averaged over tokens; 0 without rows."""
        contexts = sum(count * length * (length - 1) / 2 for length, count in self.sequences.items())
        return contexts / max(self.total_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """Every count and both averages, as JSON values."""
        averages = {name: getattr(self, name) for name in ("average_sequence_length", "average_context_length")}
        return {**asdict(self), "total_tokens": self.total_tokens, **averages}

    def table(self) -> str:
        """The counts as text, one line a bucket."""
        total = max(self.total_tokens, 1)
        lines = [f"{'length':>8} {'sequences':>12} {'tokens':>14} {'share':>6}"]
        for length, count in self.sequences.items():
            lines.append(f"{length:>8} {count:>12,} {self.tokens[length]:>14,} {self.tokens[length] / total:>6.1%}")
        lines.append(f"average sequence {self.average_sequence_length:.0f}, context {self.average_context_length:.0f}")
        if self.documents:
            lost = self.dropped_tokens / max(self.document_tokens, 1)
            lines.append(
                f"{self.documents:,} documents of {self.document_tokens:,} tokens; dropped {self.dropped_tokens:,} "
                f"({lost:.1%}), padding {self.padding_tokens:,}, nothing to learn in {self.unlearned_tokens:,}"
            )
        return "\n".join(lines)


def bucket_statistics(buckets: Any, documents: Any = None, options: Decomposition | None = None) -> BucketStatistics:
    """Count a decomposed dataset and, given the documents and how they were cut, what it lost.

    Args:
        buckets: result of `decompose`, not streamed.
        documents: the dataset it was made from.
        options: how; needed with ``documents``.

    Raises:
        ValueError: ``documents`` without ``options``.
    """
    counts = np.bincount(exponents(buckets), minlength=1)
    sequences = {1 << k: int(count) for k, count in enumerate(counts) if count}
    if documents is None:
        return BucketStatistics(sequences)
    if options is None:
        raise ValueError("Statistics of the documents need the options they were cut with, got none.")
    whole = cut_to = 0
    tails = 0
    for table in documents.select_columns(["input_ids"]).with_format("arrow").iter(1000):
        lengths = options.whole_lengths(*flat_column(table, "input_ids"))
        padded = options.cut_lengths(lengths)
        whole, cut_to = whole + int(lengths.sum()), cut_to + int(padded.sum())
        tails += int((padded % options.min_length).sum())
    kept = sum(length * count for length, count in sequences.items())
    return BucketStatistics(sequences, len(documents), whole, tails, cut_to - whole, cut_to - tails - kept)


def exponents(buckets: Any) -> Integers:
    """The column ``bucket`` (log2 of every row's length) as int8 ``[rows]``, read through Arrow.

    Raises:
        ValueError: there is no such column.
    """
    if "bucket" not in buckets.column_names:
        raise ValueError(f"The dataset needs a column bucket (see hf_ext.decompose), got {buckets.column_names}.")
    column = buckets.select_columns(["bucket"]).with_format("arrow")
    parts = [np.asarray(table["bucket"]) for table in column.iter(1_000_000)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int8)
