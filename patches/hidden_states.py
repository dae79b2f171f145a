"""Hooks on a decoder's layers that let a PyramidInfer cache take tokens out of the hidden states between layers.

After a layer, the tokens that the next one is not to have are gathered away; before the next one, its positions are
gathered alike. Hooks are attached once, do nothing for any other cache, and survive copies and pickles of the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.caches.pyramid_infer import PyramidInferCache
from hf_ext.patches.architectures import architecture_of

ATTRIBUTE = "hf_ext_hidden_state_hooks"


def attach_gathering(decoder: Any) -> None:
    """Attach the hooks to every layer of ``decoder``; what is attached stays.

    Raises:
        ValueError: the architecture is not in the table of those whose layers are known.
    """
    if hasattr(decoder, ATTRIBUTE):
        return
    argument = architecture_of(decoder, "the pyramid_infer cache").cache_argument
    handles = []
    for index, layer in enumerate(decoder.layers):
        hooks = LayerHooks(index, argument)
        handles.append(layer.register_forward_pre_hook(hooks.before, with_kwargs=True))
        handles.append(layer.register_forward_hook(hooks.after, with_kwargs=True))
    setattr(decoder, ATTRIBUTE, handles)


def detach_gathering(decoder: nn.Module) -> None:
    """Take the hooks off again; harmless where there are none."""
    for handle in getattr(decoder, ATTRIBUTE, []):
        handle.remove()
    if hasattr(decoder, ATTRIBUTE):
        delattr(decoder, ATTRIBUTE)


class LayerHooks:
    """The two hooks of one decoder layer."""

    def __init__(self, index: int, cache_argument: str) -> None:
        self.index = index
        self.cache_argument = cache_argument

    def before(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Give the layer the positions of the tokens it still works on."""
        cache = kwargs.get(self.cache_argument)
        if not isinstance(cache, PyramidInferCache) or cache.index is None:
            return None
        index = cache.index
        changed = dict(kwargs)
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(_take(side, index) for side in kwargs["position_embeddings"])
        if isinstance(kwargs.get("position_ids"), torch.Tensor):
            changed["position_ids"] = kwargs["position_ids"].expand(len(index), -1).gather(1, index)
        return args, changed

    def after(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Take out of the layer's output what the next layer is not to have."""
        cache = kwargs.get(self.cache_argument)
        if not isinstance(cache, PyramidInferCache):
            return None
        if isinstance(output, tuple):
            return (cache.hand_on(self.index, output[0]), *output[1:])
        return cache.hand_on(self.index, output)


def _take(side: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, n]`` of cosines or sines ``[B or 1, T, D]``."""
    side = side.expand(len(index), -1, -1)
    return side.gather(1, index[..., None].expand(-1, -1, side.shape[-1]))
