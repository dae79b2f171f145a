"""Frozen policies of earlier SPO rounds: adapters on the trained model's base, or models of their own."""

import contextlib
import gc
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    hash_module,
    use_adapter,
)

from hf_ext.trainers.preference_checks import REFERENCE_ADAPTER, TRAINED_ADAPTER
from hf_ext.trainers.preference_collator import pair_examples
from hf_ext.trainers.preference_scoring import completion_logps, score_through_head

ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class FrozenPolicy:
    """Either ``model``, or the adapter of that name on the trained model (None for its base without adapters).

    Attributes:
        model: prepared for scoring, and sharded with FSDP.
        adapter: name of the adapter.
        weights: hash of the model's weights, where its log-probabilities are to be stored.
    """

    model: Any = None
    adapter: str | None = None
    weights: str | None = None


def is_adapter_folder(path: Any) -> bool:
    """Whether a path is a folder with a saved PEFT adapter."""
    return isinstance(path, str) and os.path.isfile(os.path.join(path, ADAPTER_FILE))


def continue_adapter(model: Any, folder: str, args: Any, quantization_config: Any) -> Any:
    """The base with the adapter of the last round on it, trainable, as a script would build it for DPOTrainer.

    Args:
        model: the base, or what to load it from.
        folder: of the saved adapter.
        args: the trainer's arguments, for ``model_init_kwargs``.
        quantization_config: for a base that is loaded here.
    """
    from peft import PeftModel

    if isinstance(model, str):
        options = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        options.setdefault("trust_remote_code", args.trust_remote_code)
        model = create_model_from_path(model, **options)
    return PeftModel.from_pretrained(model, folder, adapter_name=TRAINED_ADAPTER, is_trainable=True)


def freeze_policy(trainer: Any, source: Any, k: int) -> FrozenPolicy:
    """Bring ``pi_k`` to where it can be scored.

    Args:
        trainer: the trainer, after its own model and reference are prepared.
        source: None for the base without adapters, the name of an adapter on the model, a folder or hub name, or a
            model.
        k: which policy it is; an adapter loaded here is named ``spo_round_k``.

    Raises:
        ValueError: the source is the trained model itself, its reference, or an adapter name that is taken.
    """
    peft_model = trainer.accelerator.unwrap_model(trainer.model)
    adapters = getattr(peft_model, "peft_config", {}) if hasattr(peft_model, "get_base_model") else {}
    if source is None or (isinstance(source, str) and source in adapters):
        _check_adapter(source, adapters, k, trainer.ref_model is None)
        return FrozenPolicy(adapter=source)
    if is_adapter_folder(source) and adapters:
        name = f"spo_round_{k}"
        if name in adapters:
            raise ValueError(f"The model already has an adapter named {name!r}, which is kept for policy {k}.")
        peft_model.load_adapter(source, adapter_name=name, is_trainable=False)
        return FrozenPolicy(adapter=name)
    if source is trainer.model or (source is not None and source is trainer.ref_model):
        raise ValueError(f"Policy {k} is the trained model or its reference; it must be the result of round {k}.")
    model = _load_model(trainer, source) if isinstance(source, str) else source
    weights = hash_module(model) if trainer.precompute_ref_logps else None  # before it may be sharded
    return FrozenPolicy(model=_prepare(trainer, model), weights=weights)


def release_models(trainer: Any, policies: dict[int, FrozenPolicy]) -> dict[int, FrozenPolicy]:
    """The policies that are adapters; the memory of the others is given back, but for models that the caller holds."""
    models = {id(policy.model) for policy in policies.values()}
    kept = {k: policy for k, policy in policies.items() if policy.model is None}
    policies.clear()
    accelerator = trainer.accelerator  # which keeps what it has prepared, and has no way to let go of one
    accelerator._models = [model for model in accelerator._models if id(model) not in models]
    gc.collect()  # a model with TRL's fused forward is part of a cycle
    return kept


def score_frozen(trainer: Any, policy: FrozenPolicy, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities ``[2B]`` of a batch under a frozen policy, without gradient."""
    checkpointing = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
    adapter: Any = contextlib.nullcontext()
    if policy.model is None:
        adapter = use_adapter(trainer.accelerator.unwrap_model(trainer.model), policy.adapter)
    with torch.no_grad(), checkpointing, adapter, trainer.accelerator.autocast():
        model = trainer.share_prompt(policy.model or trainer.model, pair_examples(inputs))
        return completion_logps(model, inputs, trainer.ld_alpha)


def _check_adapter(source: str | None, adapters: Any, k: int, reference_on_model: bool) -> None:
    if not adapters:
        raise ValueError(
            f"Policy {k} is missing: pass it in prev_policies as a model or a folder, as columns "
            f"prev{k}_chosen_logps and prev{k}_rejected_logps, or give the previous round's folder as manifest."
        )
    if source in (TRAINED_ADAPTER, REFERENCE_ADAPTER):
        raise ValueError(f"Policy {k} cannot be the adapter {source!r}, which is trained or the reference.")
    if source is None and reference_on_model and REFERENCE_ADAPTER not in adapters:
        raise ValueError(
            f"Policy {k} would be the base without adapters, which with a new peft_config is also the reference of "
            f"this round. Continue the previous round's adapter (manifest=, or a PeftModel), or pass policy {k} in "
            f"prev_policies."
        )


def _load_model(trainer: Any, path: str) -> Any:
    options = dict(trainer.args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", trainer.args.trust_remote_code)
    options.setdefault("dtype", trainer.model.dtype)
    options.setdefault("attn_implementation", trainer.model.config._attn_implementation)
    options.setdefault("device_map", None)
    return create_model_from_path(path, **options)


def _prepare(trainer: Any, model: Any) -> Any:
    """Freeze a model and place it as DPOTrainer places its reference."""
    model.eval().requires_grad_(False)
    if trainer.args.disable_dropout:
        disable_dropout_in_model(model)
    inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    if not getattr(inner, "_hf_ext_fused_head", False):  # twice would nest one fused forward in another
        add_fused_lm_head(inner)
        score_through_head(inner)
        inner._hf_ext_fused_head = True
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)
