"""Lets LoRA of peft wrap `ReALLMLinear`: fresh adapters, saved ones, DoRA, with no change to any config."""

from functools import wraps
from types import ModuleType
from typing import Any

from hf_ext.patches.patch import Patch


def adapt_reallm_layers(host: ModuleType, patch: Patch) -> None:
    """Wrap ``dispatch_default``, which LoRA asks last for the adapter layer of a module."""
    original = host.dispatch_default

    @wraps(original)
    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        from hf_ext.quant.linear import ReALLMLinear

        base = getattr(target, "base_layer", target)
        if not isinstance(base, ReALLMLinear) or kwargs.get("parameter_name") is not None:
            return original(target, adapter_name, config=config, **kwargs)
        from hf_ext.patches.reallm_lora import ReALLMLoraLinear

        kwargs.pop("parameter_name", None)
        return ReALLMLoraLinear(target, adapter_name, config=config, **kwargs)

    patch.set(host, "dispatch_default", dispatch)
