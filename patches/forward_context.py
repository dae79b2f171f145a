"""Hooks that tell a cache of hf_ext what ``Cache.update`` is not told: ids, mask, positions, hidden states, logits.

They sit on the base decoder and on the output head, do nothing for any other cache, and are attached once however
often they are asked for. A deep copy or a pickle of the model keeps working hooks of its own. A compiled model runs
them outside its graphs.
"""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.caches.base import HfExtCache
from hf_ext.caches.forward import Forward

ATTRIBUTE = "hf_ext_forward_hooks"


def attach(model: Any) -> "ForwardHooks":
    """Attach the hooks to the text decoder of ``model`` and to its output head; what is attached stays."""
    decoder = find_decoder(model)
    hooks: ForwardHooks | None = getattr(decoder, ATTRIBUTE, None)
    if hooks is None:
        hooks = ForwardHooks(decoder, model.get_output_embeddings())
        setattr(decoder, ATTRIBUTE, hooks)
    return hooks


def detach(model: Any) -> None:
    """Take the hooks off again; harmless where there are none."""
    decoder = find_decoder(model)
    hooks: ForwardHooks | None = getattr(decoder, ATTRIBUTE, None)
    if hooks is not None:
        hooks.remove()
        delattr(decoder, ATTRIBUTE)


def find_decoder(model: Any) -> nn.Module:
    """The module whose forward takes ``input_ids`` and ``past_key_values`` and returns final hidden states."""
    decoder: nn.Module = model.get_decoder()
    return decoder


class ForwardHooks:
    """The three hooks of one model: before and after its decoder, and after its output head."""

    def __init__(self, decoder: nn.Module, head: nn.Module | None) -> None:
        self._head = head
        self._awaits_logits: weakref.ref[HfExtCache] | None = None
        self._last_hidden: Tensor | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self.after_decoder, with_kwargs=True),
        ]
        if head is not None:
            self._handles.append(head.register_forward_hook(self.after_head))

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Tell our cache what is about to run; pass on the mask and positions it wants instead."""
        if args:
            kwargs = {**inspect.signature(type(decoder).forward).bind_partial(decoder, *args).arguments, **kwargs}
            kwargs.pop("self")
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, HfExtCache):
            return None
        forward = _describe(decoder, self._head, kwargs)
        mask, positions = forward.attention_mask, forward.position_ids
        cache.begin_forward(forward)
        if forward.attention_mask is not mask:
            kwargs = {**kwargs, "attention_mask": forward.attention_mask}
        if forward.position_ids is not positions:
            kwargs = {**kwargs, "position_ids": forward.position_ids}
        return (), kwargs

    @torch.compiler.disable
    def after_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Tell our cache that the forward ran to its end."""
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, HfExtCache) or cache._forward is None:
            return
        hidden_states = output[0].detach()
        cache.end_forward(cache._forward, hidden_states)
        self._awaits_logits, self._last_hidden = weakref.ref(cache), hidden_states[:, -1]

    @torch.compiler.disable
    def after_head(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hand on the logits after the last token, if the head was given the hidden states that just came out."""
        cache = self._awaits_logits() if self._awaits_logits is not None else None
        if cache is None or self._last_hidden is None or not args or args[0].ndim != 3:
            return
        if args[0].shape[0] == self._last_hidden.shape[0] and torch.equal(args[0][:, -1], self._last_hidden):
            cache.take_logits(output[:, -1].detach())
            self._awaits_logits = self._last_hidden = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what only lasts from the decoder to the head."""
        return {**vars(self), "_awaits_logits": None, "_last_hidden": None}


def _describe(decoder: nn.Module, head: nn.Module | None, kwargs: dict[str, Any]) -> Forward:
    ids = kwargs.get("input_ids")
    inputs: Tensor = ids if ids is not None else kwargs["inputs_embeds"]
    return Forward(
        decoder=decoder,
        head=head,
        input_ids=ids,
        attention_mask=kwargs.get("attention_mask"),
        position_ids=kwargs.get("position_ids"),
        batch=inputs.shape[0],
        length=inputs.shape[1],
        device=inputs.device,
    )
