"""`EvictConfig`, how a method scores tokens and when something is due, and `EvictingCache`, which serves them all.

What a layer does with the scores is in `hf_ext.caches.evicting_layer`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_ext.caches.base import HfExtCache
from hf_ext.caches.budgets import check_budget, parse_bytes
from hf_ext.caches.byte_budget import CacheShape
from hf_ext.caches.config import CacheConfig, check_sizes
from hf_ext.caches.decoquant import DecoQuantConfig
from hf_ext.caches.evicting_layer import SLACK, WAITING, EvictingDenseLayer, EvictingPackedLayer, Evicts
from hf_ext.caches.forward import Forward
from hf_ext.caches.observed import check_attended, check_crop, tell_incoming


@dataclass(frozen=True)
class EvictConfig(CacheConfig):
    """What evicting methods have in common.

    Attributes:
        budget: tokens a layer stores per row: a whole number; a ratio in (0, 1] of the tokens seen; or the bytes of
            the whole cache, everything counted, such as ``"64MiB"``, which make it a number of tokens once the batch
            is known. Methods that compress prompts only add what is generated.
        layer_budgets: weights of the layers' shares of the budget, one a layer, or None for equal ones.
        sink_size: first tokens of each row that always stay.
        recent_size: latest tokens that always stay.
    """

    type: ClassVar[str] = ""
    per_head: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False  # scores of stored tokens are carried on from forward to forward
    prompts_only: ClassVar[bool] = False  # generated tokens are added and stay

    budget: int | float | str = 0.5
    layer_budgets: tuple[float, ...] | None = None
    sink_size: int = 4
    recent_size: int = 32

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_sizes(self, "sink_size", "recent_size", least=0)
        if self.layer_budgets is not None:
            check_weights(self.layer_budgets)
            object.__setattr__(self, "layer_budgets", tuple(self.layer_budgets))
        if isinstance(self.budget, int) and self.budget < self.least_tokens:
            raise ValueError(
                f"a budget of {self.budget} tokens is too small: {self.sink_size} sinks, {self.recent_size} recent "
                f"tokens and one more need {self.least_tokens}."
            )

    @property
    def least_tokens(self) -> int:
        """Tokens that a budget must have room for: sinks, the latest ones, and one that is chosen."""
        return self.sink_size + self.recent_size + 1

    def check(self, model_config: Any) -> None:
        """Raise `ValueError` when there is not one layer budget for each layer, or one is too small."""
        layers = model_config.get_text_config(decoder=True).num_hidden_layers
        if self.layer_budgets is not None and len(self.layer_budgets) != layers:
            raise ValueError(f"layer_budgets has {len(self.layer_budgets)} weights for {layers} layers.")
        if self.layer_budgets is not None and isinstance(self.budget, int):
            smallest = int(self.budget * min(self.shares(layers)))
            if smallest < self.least_tokens:
                raise ValueError(
                    f"layer_budgets leave {smallest} of a budget of {self.budget} tokens to one layer; at least "
                    f"{self.least_tokens} are needed."
                )

    def shares(self, layers: int) -> list[float]:
        """Each layer's budget relative to the average."""
        if self.layer_budgets is None:
            return [1.0] * layers
        return [weight * layers / sum(self.layer_budgets) for weight in self.layer_budgets]

    def score(self, layer: Evicts, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor | None:
        """Scores ``[B, H or 1, n]`` that new queries give to all stored keys (higher stays); None to drop nothing.

        Where layers share keys (Cross-Layer Attention) each of them is asked, and the scores are added up.
        """
        raise NotImplementedError

    def protected(self, budget: int) -> tuple[int, int]:
        """First and latest tokens that stay, out of ``budget``."""
        sinks = min(self.sink_size, budget)
        return sinks, min(self.recent_size, budget - sinks)

    def build(self, model: Any, inner: tuple[CacheConfig, ...]) -> "EvictingCache":
        """A new cache for ``model``, over DecoQuant where that is the inner cache."""
        return EvictingCache(self, model, storage_of(self, inner, model))


def check_weights(weights: Any) -> None:
    """Raise `ValueError` unless these are positive, finite numbers."""
    numbers = weights if isinstance(weights, list | tuple) else []
    good = [isinstance(weight, int | float) and 0 < weight < float("inf") for weight in numbers]
    if not good or not all(good):
        raise ValueError(f"layer_budgets must be positive weights, one for each layer, got {weights!r}.")


def storage_of(config: CacheConfig, inner: tuple[CacheConfig, ...], model: Any) -> DecoQuantConfig | None:
    """The packed storage that a stack asks for.

    Raises:
        ValueError: there is more than one inner cache, one that is no storage, or one that cannot serve the model.
    """
    if not inner:
        return None
    if len(inner) > 1 or not isinstance(inner[0], DecoQuantConfig):
        names = ", ".join(member.type for member in inner)
        raise ValueError(f"the {config.type} cache can be put over decoquant alone, got {names}.")
    inner[0].check_decoder(model.get_decoder())
    return inner[0]


class EvictingCache(HfExtCache):
    """A cache whose full-attention layers drop tokens by a score."""

    config: EvictConfig

    def __init__(self, config: EvictConfig, model: Any, storage: DecoQuantConfig | None = None) -> None:
        self.config, self.storage = config, storage
        text = model.config.get_text_config(decoder=True)
        self._shares = config.shares(text.num_hidden_layers)
        super().__init__(config, model)

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "storage": self.storage and self.storage.to_dict()}

    def make_layer(self, layer_idx: int) -> Evicts:
        """An evicting layer over the storage asked for."""
        share = self._shares[layer_idx]
        if self.storage is None:
            return EvictingDenseLayer(self.config, share)
        return EvictingPackedLayer(self.config, share, self.storage)

    @property
    def evicting(self) -> list[Evicts]:
        """The evicting layers."""
        return [layer for layer in self.layers if isinstance(layer, Evicts)]

    def begin_forward(self, forward: Forward) -> None:
        """Tell the layers their budget and which of the new tokens are real."""
        super().begin_forward(forward)
        tokens = self._budget_in_tokens(forward)
        for layer in self.evicting:
            layer.tokens = tokens
        tell_incoming(list(self.evicting), forward, self.committed)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, then drop what was held back.

        Raises:
            ValueError: the count is positive, or some of those tokens are no longer stored.
        """
        check_crop(list(self.evicting), tokens_to_remove)
        super().crop(tokens_to_remove)

    def end_forward(self, forward: Forward, hidden_states: Tensor) -> None:
        """Drop what is due.

        Raises:
            RuntimeError: the model does not call its attention through the host's interface, so nothing was scored.
        """
        check_attended(list(self.evicting), forward, self.config.type)
        super().end_forward(forward, hidden_states)
        if self.record_past:
            for layer in self.evicting:
                layer.hold()

    def _budget_in_tokens(self, forward: Forward) -> int | None:
        if isinstance(self.config.budget, int):
            return self.config.budget
        if isinstance(self.config.budget, float):
            return None
        policy = self.config
        shape = CacheShape.of(forward.decoder, policy.per_head if policy.accumulates else None, WAITING, self.storage)
        slack = 0 if policy.prompts_only else SLACK
        tokens = shape.tokens_in(parse_bytes(self.config.budget), forward.batch, slack)
        if tokens < self._least_tokens:
            raise ValueError(
                f"a budget of {policy.budget} is {max(tokens, 0)} tokens for each of {forward.batch} rows; at least "
                f"{self._least_tokens} are needed."
            )
        return tokens

    @property
    def _least_tokens(self) -> int:
        """Tokens that a budget in bytes must have room for; packing begins with a first block of them."""
        inner, least = self.storage, self.config.least_tokens
        return least if inner is None else max(least, inner.sink_size + inner.recent_size + inner.first_block)
