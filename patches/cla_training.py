"""Refuses what would train a Cross-Layer Attention model wrongly, and explains what adapters cannot do with it."""

import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from hf_ext.cla.shared import shared_layers
from hf_ext.patches.patch import Patch


def refuse_reentrant_checkpointing(host: ModuleType, patch: Patch) -> None:
    """Wrap the host's switch for gradient checkpointing."""
    original = host.PreTrainedModel._set_gradient_checkpointing

    @wraps(original)
    def switch(self: Any, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and shared_layers(self) and options.get("use_reentrant") is not False:
            raise ValueError(
                "Cross-Layer Attention needs gradient checkpointing with use_reentrant=False, got "
                f"use_reentrant={options.get('use_reentrant')!r}: the reentrant kind runs the forward without a "
                "graph, so that producers would silently miss their consumers' gradients."
            )
        given: dict[str, Any] = (
            {} if gradient_checkpointing_func is None else {"gradient_checkpointing_func": gradient_checkpointing_func}
        )
        original(self, enable=enable, **given, **kwargs)

    patch.set(host.PreTrainedModel, "_set_gradient_checkpointing", switch)


def report_dropped_adapter_weights(host: ModuleType, patch: Patch) -> None:
    """Wrap PEFT's loading of adapter weights: warn of those for keys and values that consumers do not make."""
    original: Callable[..., Any] = host.set_peft_model_state_dict

    @wraps(original)
    def load(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        consumers = shared_layers(model)
        dropped = [
            key for key in result.unexpected_keys if any(f"layers.{layer}." in f".{key}" for layer in consumers)
        ]
        if dropped:
            warnings.warn(
                f"{len(dropped)} adapter weights were dropped, for example {dropped[0]}: the adapter was trained with "
                f"keys and values in every layer, and in this model layers {sorted(consumers)} read those of another "
                f"layer (Cross-Layer Attention).",
                stacklevel=2,
            )
        return result

    patch.set(host, "set_peft_model_state_dict", load)


def explain_missing_targets(host: ModuleType, patch: Patch) -> None:
    """Wrap PEFT's injection of adapters: say why a consumer has no ``k_proj`` when a target is not found."""
    original = host.BaseTuner.inject_adapter

    @wraps(original)
    def inject(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, model, *args, **kwargs)
        except ValueError as error:
            if consumers := shared_layers(model):
                error.add_note(
                    f"Layers {sorted(consumers)} of this model make no keys and values (Cross-Layer Attention): "
                    f"target their queries and outputs, or the producers, layers {sorted(set(consumers.values()))}."
                )
            raise

    patch.set(host.BaseTuner, "inject_adapter", inject)
