"""The solver's low-rank term as an ordinary peft adapter: to train it, to share it, and back."""

from typing import Any

import torch

from hf_ext.quant.linear import quantized_layers


def low_rank_to_adapter(model: Any, adapter_name: str = "default", trainable: bool = True) -> Any:
    """Move the low-rank terms of a quantised model into a LoRA adapter on it.

    The base then holds codes and outliers only: save it with ``peft_model.get_base_model().save_pretrained(...)``
    after ``unload()``, or keep using the returned model. ``peft_model.save_pretrained(folder)`` writes the adapter,
    which ``PeftModel.from_pretrained(base, folder)`` loads. ``lora_alpha`` equals the rank: the scaling is exactly 1.

    Args:
        model: a transformers model with ReALLM layers; it is changed.
        adapter_name: name of the adapter.
        trainable: whether its weights require gradients.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer of the model has a low-rank term.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('Adapters need peft: pip install "hf_ext[train]".') from error
    factors = {
        name: found for name, layer in quantized_layers(model).items() if (found := layer.low_rank()) is not None
    }
    if not factors:
        raise ValueError(f"{type(model).__name__} has no low-rank term that could become an adapter.")
    ranks = {name: len(lr_a) for name, (lr_a, _) in factors.items()}
    rank = next(iter(ranks.values()))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        rank_pattern={name: found for name, found in ranks.items() if found != rank},
        alpha_pattern={name: found for name, found in ranks.items() if found != rank},
        init_lora_weights=False,
        inference_mode=not trainable,
        task_type="CAUSAL_LM",
    )
    for name in factors:
        model.get_submodule(name).set_low_rank(None, None)
    wrapped = get_peft_model(model, config, adapter_name=adapter_name)
    for name, (lr_a, lr_b) in factors.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        with torch.no_grad():
            layer.lora_A[adapter_name].weight.copy_(lr_a)
            layer.lora_B[adapter_name].weight.copy_(lr_b)
    return wrapped


def adapter_to_low_rank(peft_model: Any) -> Any:
    """The base model with the active plain adapters folded into its low-rank terms, in float32 and without loss."""
    return peft_model.merge_and_unload()


def prepare_for_training(model: Any, gradient_checkpointing: bool = False) -> Any:
    """Freeze everything but adapters and let gradients reach them, also through checkpointed blocks.

    What ``peft.prepare_model_for_kbit_training`` does for the methods it knows, without casting any weight.
    """
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model
