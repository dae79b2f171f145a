"""A budget in bytes as a number of tokens: what a token costs, and what a row of the batch costs beside its tokens."""

from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from hf_ext.caches.decoquant import DecoQuantConfig, head_dimension
from hf_ext.caches.support import layer_types

COUNTERS = 32  # bytes of the few whole numbers that a layer holds for each row


@dataclass(frozen=True)
class CacheShape:
    """What a token's keys and values are in a model.

    Attributes:
        layers: full-attention layers that store some.
        heads: key-value heads.
        head_dim: channels of one.
        element: bytes of a number.
        scores: float32 scores that an evicting layer carries on for each token.
        waiting: numbers of the queries that may wait to give theirs.
        storage: how they are packed, or None.
    """

    layers: int
    heads: int
    head_dim: int
    element: int
    scores: int = 0
    waiting: int = 0
    storage: DecoQuantConfig | None = None

    @classmethod
    def of(
        cls, decoder: nn.Module, scores_per_head: bool | None, waiting: int, storage: DecoQuantConfig | None
    ) -> Self:
        """The shape for a decoder; ``scores_per_head`` is None where scores are not carried on.

        Up to ``waiting`` tokens' queries are kept beside them.
        """
        config: Any = decoder.config
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        scores = 0 if scores_per_head is None else heads if scores_per_head and storage is None else 1
        layers = layer_types(config).count("full_attention")
        element = int(next(decoder.parameters()).element_size())
        d = head_dimension(config)
        queries = 0 if scores_per_head is None else waiting * text.num_attention_heads * d
        return cls(layers, heads, d, element, scores, queries, storage)

    def unpacked_token(self) -> float:
        """Bytes of a token in one layer, as the model made it."""
        place = 4 if self.storage is not None and self.storage.pre_rope else 0
        return 2 * self.heads * self.head_dim * self.element + 4 * self.scores + place

    def token(self) -> float:
        """Bytes of a token in one layer, as it is stored for long."""
        if self.storage is None:
            return self.unpacked_token()
        scale = 1 if self.storage.method == "allocated" else 2 / self.heads
        codes = 2 * self.heads * (self.storage.row_bytes(self.head_dim) + scale)
        return codes + self.unpacked_token() - 2 * self.heads * self.head_dim * self.element

    def row(self, slack: int) -> float:
        """Bytes of a row in one layer beside the tokens of its budget: ``slack`` more, bases, and what is unpacked."""
        beside = COUNTERS + self.waiting * self.element
        if self.storage is None:
            return slack * self.token() + beside
        s, d = self.storage, self.head_dim
        group = s.group if s.method == "uniform" else d
        basis = d + 2 * group**2 + 2 * self.heads * d + 2 * d  # widths, synthesis, means, weights
        unpacked = s.sink_size + s.recent_size + max(s.block_size - 1, slack)
        return 2 * basis + unpacked * self.unpacked_token() + slack * self.token() + beside

    def tokens_in(self, size: int, rows: int, slack: int) -> int:
        """Tokens of each of ``rows`` rows, in every layer, that fit into ``size`` bytes; negative if not even none."""
        return int((size / (rows * self.layers) - self.row(slack)) // self.token())
