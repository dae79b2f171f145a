"""PyramidInfer (arXiv 2405.12532): deeper layers work on ever fewer tokens of the prompt.

The paper's name is kept for the paper's method: what a layer's latest queries agree not to need is taken out of the
hidden states, so deeper layers neither compute nor store it. `PyramidInferCacheConfig` is the cheaper variant that
computes the whole prompt and only stores what the same schedule keeps.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.caches.base import HfExtCache
from hf_ext.caches.budgets import PyramidSchedule, solve_decay
from hf_ext.caches.config import CacheConfig, check_numbers, check_sizes
from hf_ext.caches.decoquant import DecoQuantConfig
from hf_ext.caches.evicting import storage_of
from hf_ext.caches.forward import Forward
from hf_ext.caches.observed import check_attended, check_crop, tell_incoming
from hf_ext.caches.pyramid_layer import PyramidDenseLayer, PyramidLayer, PyramidPackedLayer
from hf_ext.caches.support import layer_types

PRESETS: dict[str, dict[str, Any]] = {
    "7b": {},
    "13b": {"decay": 0.8, "interval": 2},
    "70b": {"interval": 3},
    "flat": {
        "target_ratio": 0.45,
        "recent_ratio": 0.1,
        "flat_from": 2,
        "vote_size": 64,
        "vote_heads": "max",
        "kernel": 21,
    },
}


@dataclass(frozen=True)
class PyramidInferConfig(CacheConfig):
    """Options of PyramidInfer; names and defaults are those of the released 7B settings.

    Attributes:
        decay: share of its older tokens that the deepest layer hands on (p).
        target_ratio: share of the prompt's keys and values that all layers together keep; solves for ``decay`` for
            each prompt's length, and stops cuts at ``min_context`` instead of leaving them out.
        recent_ratio: share of the prompt's latest tokens that stay and vote.
        min_context: older tokens below which nothing more is dropped.
        interval: layers between two cuts.
        sink_size: first tokens of each row that always stay.
        distance_weight: weight of the newest vote relative to the oldest.
        flat_from: not in the paper, better on small models: from this layer on every layer keeps the same tokens, the
            share ``decay`` of the older ones, chosen by the layer before; 0 for the cosine.
        vote_size: latest tokens that vote; 0 for all recent ones.
        vote_heads: a token's votes are the ``"mean"`` of all heads (released) or those of the head that gives most.
        kernel: neighbouring tokens (an odd number) that get the votes of the best of them; 1 for no such pooling.
        generation_block: generated tokens that are compressed together; 0 keeps all generated tokens.
        generation_ratio: share of such a block that the first layer keeps.
        generation_decay: share that remains at the last layer, before ``generation_ratio``.
        voters: latest queries that vote on generated tokens. The released code lets all recent ones vote and stores
            their whole attention; a few stored queries give the same vote at a fixed size.
    """

    type: ClassVar[str] = "pyramid_infer"
    gathers: ClassVar[bool] = True

    decay: float = 0.9
    target_ratio: float | None = None
    recent_ratio: float = 0.2
    min_context: int = 64
    interval: int = 1
    sink_size: int = 4
    distance_weight: float = 1.2
    flat_from: int = 0
    vote_size: int = 0
    vote_heads: str = "mean"
    kernel: int = 1
    generation_block: int = 16
    generation_ratio: float = 0.9
    generation_decay: float = 0.1
    voters: int = 16

    def __post_init__(self) -> None:
        shares = ("decay", "recent_ratio", "generation_ratio", "generation_decay")
        check_numbers(self, *shares, "distance_weight", *(["target_ratio"] if self.target_ratio is not None else []))
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}.")
        if self.target_ratio is not None and not 0 < self.target_ratio <= 1:
            raise ValueError(f"target_ratio must be above 0 and at most 1, got {self.target_ratio!r}.")
        if not self.distance_weight > 0:
            raise ValueError(f"distance_weight must be positive, got {self.distance_weight!r}.")
        if self.vote_heads not in ("mean", "max"):
            raise ValueError(f'vote_heads must be "mean" or "max", got {self.vote_heads!r}.')
        check_sizes(self, "min_context", "sink_size", "generation_block", "flat_from", "vote_size", least=0)
        check_sizes(self, "interval", "voters", "kernel", least=1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number of tokens, got {self.kernel}.")

    @classmethod
    def preset(cls, size: str, **options: Any) -> "PyramidInferConfig":
        """The released settings for models of size ``"7b"``, ``"13b"`` or ``"70b"``, or ours, ``"flat"``.

        Raises:
            ValueError: there are none of that name.
        """
        if size not in PRESETS:
            raise ValueError(f"there are settings for {', '.join(PRESETS)}, not for {size!r}.")
        return cls(**{**PRESETS[size], **options})

    def schedule(self, length: int, layers: int) -> PyramidSchedule:
        """The schedule for a prompt of ``length`` tokens."""
        base = PyramidSchedule(
            self.decay, self.recent_ratio, self.min_context, self.interval, flat_from=self.flat_from
        )
        if self.target_ratio is None or length < 2:
            return base
        least = replace(base, decay=0.0, clamp=True)
        if least.kept(length, layers) > self.target_ratio:
            return least  # a short prompt: the recent tokens and min_context alone are more than the target
        return solve_decay(self.target_ratio, length, layers, base)

    def check(self, model_config: Any) -> None:
        """Raise `ValueError` for a model with layers that cannot work on gathered hidden states."""
        others = sorted(set(layer_types(model_config)) - {"full_attention", "dummy"})
        if self.gathers and others:
            raise ValueError(
                f"the pyramid_infer cache takes tokens out of the hidden states, which layers of type "
                f"{', '.join(others)} cannot follow; pyramid_infer_cache serves this model."
            )

    def build(self, model: Any, inner: tuple[CacheConfig, ...]) -> "PyramidInferCache":
        """A new cache for ``model``, over DecoQuant where that is the inner cache."""
        return PyramidInferCache(self, model, storage_of(self, inner, model))


@dataclass(frozen=True)
class PyramidInferCacheConfig(PyramidInferConfig):
    """The same schedule and votes, but only the stored keys and values are pruned, after the whole prompt ran."""

    type: ClassVar[str] = "pyramid_infer_cache"
    gathers: ClassVar[bool] = False


class PyramidInferCache(HfExtCache):
    """Layers of falling length; hooks on the decoder's layers take tokens out of the hidden states between them.

    Attributes:
        index: ``[B, n]`` which of this forward's tokens the coming layer works on, or None for all.
    """

    config: PyramidInferConfig

    def __init__(self, config: PyramidInferConfig, model: Any, storage: DecoQuantConfig | None = None) -> None:
        self.config, self.storage = config, storage
        self.depth = model.config.get_text_config(decoder=True).num_hidden_layers
        self.index: Tensor | None = None
        super().__init__(config, model)

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "storage": self.storage and self.storage.to_dict()}

    def make_layer(self, layer_idx: int) -> PyramidLayer:
        """A layer that votes, over the storage asked for."""
        if self.storage is None:
            return PyramidDenseLayer(self.config, layer_idx, self.depth)
        return PyramidPackedLayer(self.config, layer_idx, self.depth, self.storage)

    @property
    def voting(self) -> list[PyramidLayer]:
        """The layers of this cache that vote."""
        return [layer for layer in self.layers if isinstance(layer, PyramidLayer)]

    @property
    def stored_by_layer(self) -> list[int]:
        """Tokens stored per row in each of our layers."""
        return [layer.stored for layer in self.voting]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The host's one mask is made for the longest layer; layers make their own where they are shorter."""
        if isinstance(self.layers[layer_idx], PyramidLayer):
            stored = self.stored
            return stored + query_length, self.committed - stored
        return super().get_mask_sizes(query_length, layer_idx)

    def begin_forward(self, forward: Forward) -> None:
        """Tell the layers what is coming."""
        super().begin_forward(forward)
        self.index = None
        layers = self.voting
        tell_incoming(list(layers), forward, self.committed)
        longest = None if layers[0].real_count is None else layers[0].real_count.tolist()
        for layer in layers:
            layer.begin(forward.length, longest)

    def hand_on(self, layer_idx: int, hidden_states: Tensor) -> Tensor:
        """The hidden states ``[B, m, C]`` that the next layer works on, out of ``[B, n, C]``."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, PyramidLayer) or not self.config.gathers:
            return hidden_states
        own, n = layer.choose(), hidden_states.shape[1]
        if own is None or [len(row) for row in own] == layer.given_counts(n):
            return hidden_states
        longest = max(len(row) for row in own)
        index = torch.zeros(len(own), longest, dtype=torch.long, device=hidden_states.device)
        counts = torch.tensor([len(row) for row in own], device=hidden_states.device)
        before = layer.given_counts(n)
        for row, ordinals in enumerate(own):
            index[row, longest - len(ordinals) :] = ordinals + n - before[row]
        self.index = index if self.index is None else self.index.gather(1, index)
        uneven = bool((counts != longest).any())
        for later in self.layers[layer_idx + 1 :]:
            if isinstance(later, PyramidLayer):
                later.gather(counts if uneven else None, index)
        return hidden_states.gather(1, index[..., None].expand(-1, -1, hidden_states.shape[-1]))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, then drop what was held back.

        Raises:
            ValueError: the count is positive, or some of those tokens are no longer stored.
        """
        check_crop(list(self.voting), tokens_to_remove)
        super().crop(tokens_to_remove)

    def end_forward(self, forward: Forward, hidden_states: Tensor) -> None:
        """Prune what the schedule drops, where it was not taken out on the way.

        Raises:
            RuntimeError: the model does not call its attention through the host's interface, so nobody voted.
        """
        check_attended(list(self.voting), forward, self.config.type)
        self.index = None
        if not self.config.gathers and not self.record_past:
            self._prune()
        super().end_forward(forward, hidden_states)

    def _prune(self) -> None:
        """Let each layer store what the layers before it agreed on, and narrow that by its own vote."""
        agreed: list[Tensor] | None = None
        for layer in self.voting:
            agreed = layer.narrow(agreed)
