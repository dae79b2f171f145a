"""Carries keys and values from a producer layer to its consumers within one forward.

A pre-hook on the decoder opens a fresh container, a pre-hook on each attention module hands that module a view of it
in the place of its cache. The attention classes stay as they are: they call ``update(keys, values, layer)`` on what
they were given and attend to what it returns, which is the only thing this needs from them. So every attention
implementation works, and whether there is a cache makes no difference (training, gradient checkpointing).

The container is the host's `KVSharingDict`, which is no ``dict`` and therefore keeps its identity under FSDP2 and
accelerate. It is keyed by producer, and entries stay until the backward pass is over, because gradient checkpointing
reads them again in reverse order; without gradients an entry is dropped after its last reader.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.cla.shared import CONTAINER, LAST_READER, SOURCE


class SharedKeysAndValues:
    """What an attention module sees as its cache: the container, with the real cache behind it.

    A producer's keys and values `[B, H, T, D]` go through the real cache, if there is one, and what that returns is
    shared. A consumer is given its source's, and the cache hears nothing of it.
    """

    def __init__(self, cache: Any, container: Any, source: int, drop: bool) -> None:
        self._cache = cache
        self._container = container
        self._source = source
        self._drop = drop

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, `[B, H, T, D]` each."""
        if self._source != layer_idx:
            shared: tuple[Tensor, Tensor] = self._container[self._source]
            if self._drop:
                del self._container[self._source]
            return shared
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        self._container[layer_idx] = (keys, values)
        return keys, values


def open_container(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Decoder pre-hook: every forward has a container of its own."""
    from transformers.cache_utils import KVSharingDict

    return args, {**kwargs, CONTAINER: KVSharingDict()}


def share(
    attention: nn.Module, args: Any, kwargs: dict[str, Any], *, cache_argument: str
) -> tuple[Any, dict[str, Any]]:
    """Attention pre-hook: put the container in the place of the cache.

    Raises:
        RuntimeError: a consumer is called without the model around it, so there is nothing to read.
    """
    container = kwargs.pop(CONTAINER, None)
    source, layer = getattr(attention, SOURCE), attention.layer_idx
    if container is None:
        if source != layer:
            raise RuntimeError(
                f"Layer {layer} reads the keys and values of layer {source} (Cross-Layer Attention) and cannot run by "
                f"itself; call the whole model, or pass {CONTAINER}= on from the decoder's call."
            )
        return args, kwargs
    drop = getattr(attention, LAST_READER) and not torch.is_grad_enabled()
    kwargs[cache_argument] = SharedKeysAndValues(kwargs.get(cache_argument), container, source, drop)
    return args, kwargs


def pass_by(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of an attention module that shares nothing: keep the container from its attention function."""
    kwargs.pop(CONTAINER, None)
    return args, kwargs


def connect(decoder: nn.Module, attentions: list[Any], sources: tuple[int, ...], cache_argument: str) -> None:
    """Hang the hooks that make the layers share according to a map; `disconnect` takes them away."""
    readers = {source: layer for layer, source in enumerate(sources)}  # the last one wins
    shared = {source for layer, source in enumerate(sources) if source != layer}
    decoder.register_forward_pre_hook(open_container, with_kwargs=True)
    for layer, (attention, source) in enumerate(zip(attentions, sources, strict=True)):
        setattr(attention, SOURCE, source)
        setattr(attention, LAST_READER, readers[source] == layer and source != layer)
        hook = partial(share, cache_argument=cache_argument) if source in shared else pass_by
        attention.register_forward_pre_hook(hook, with_kwargs=True)


def disconnect(decoder: nn.Module, attentions: list[Any]) -> None:
    """Take all hooks of this module away again."""
    _drop_hooks(decoder)
    for attention in attentions:
        _drop_hooks(attention)
        vars(attention).pop(SOURCE, None)
        vars(attention).pop(LAST_READER, None)


def _drop_hooks(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "func", hook) in (open_container, share, pass_by):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
