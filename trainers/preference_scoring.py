"""Log-probabilities of completions under a policy, and two cases in which TRL's own would be another model's.

TRL 1.16 re-loads a missing reference from ``config._name_or_path``, which loses what was changed in memory (an
``hf_ext`` flag, a quantiser, the weights themselves), and multiplies hidden states by ``lm_head.weight`` directly,
which in a quantised head is not the matrix that the head computes with.
"""

import copy
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MODEL_INPUTS_EXCLUDED = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})


def completion_logps(model: Any, inputs: Mapping[str, Any], ld_alpha: float | None = None) -> Tensor:
    """Sum of the completion tokens' log-probabilities of each row, ``[rows]``, in nats.

    Args:
        model: a causal language model with TRL's fused head (``add_fused_lm_head``).
        inputs: ``input_ids``, ``attention_mask`` and ``completion_mask``, each ``[rows, T]``; other tensors go to the
            model.
        ld_alpha: weight of the tokens beyond the length that the chosen and the rejected row share (LD-DPO); rows are
            then [chosen, rejected]. None weighs all tokens alike.
    """
    completion_mask = inputs["completion_mask"]
    labels = inputs["input_ids"].masked_fill(completion_mask == 0, -100)
    model_inputs = {name: value for name, value in inputs.items() if name not in MODEL_INPUTS_EXCLUDED}
    logps = model(**model_inputs, use_cache=False, labels=labels, fused_lm_head=True).log_probs
    mask = completion_mask[:, 1:]
    logps = logps[:, -mask.size(1) :]  # prompt-learning adapters put virtual tokens in front
    return sum_logps(logps, mask, ld_alpha)


def sum_logps(logps: Tensor, mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Sum ``[rows, T]`` over the completion; ``ld_alpha`` as in `completion_logps`."""
    if ld_alpha is None:
        return logps.sum(dim=1)
    lengths = mask.sum(dim=1)
    half = lengths.numel() // 2
    shared = torch.minimum(lengths[:half], lengths[half:]).repeat(2).unsqueeze(1)
    position = mask.cumsum(dim=1)
    weights = torch.where(position <= shared, 1.0, ld_alpha) * (position > 0)
    return (logps * weights).sum(dim=1)


def reload_would_differ(model: Any) -> bool:
    """Whether loading the reference from ``config._name_or_path`` would not give back this model."""
    if isinstance(model, str) or hasattr(model, "peft_config"):
        return False
    config = model.config
    return bool(
        not getattr(config, "_name_or_path", "")
        or getattr(config, "hf_ext", None) is not None
        or getattr(model, "hf_quantizer", None) is not None
        or getattr(config, "quantization_config", None) is not None
    )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that no optimiser touches: the policy as it is now, whatever was changed in memory.

    A fused forward from an earlier trainer closes over the model it was made for, so it is left out of the copy,
    which would otherwise answer with the original's weights.
    """
    forward: Any = vars(model).get("forward")
    fused = "fused_lm_head" in getattr(getattr(forward, "__code__", None), "co_varnames", ())
    if fused:
        del model.forward
    try:
        copied = copy.deepcopy(model)
    finally:
        if fused:
            model.forward = forward
    for mark in ("_hf_ext_scores_through_head", "_hf_ext_fused_head"):
        vars(copied).pop(mark, None)
    return copied.eval().requires_grad_(False)


def head_hides_its_weight(head: Any) -> bool:
    """Whether ``head.weight`` is not the ``[V, D]`` float matrix that ``head(hidden)`` multiplies by."""
    if head is None:
        return False
    weight = getattr(head, "weight", None)
    plain = type(head) is nn.Linear and isinstance(weight, Tensor) and weight.is_floating_point()
    return not plain and not _is_exact_linear(head)


def score_through_head(model: Any) -> None:
    """Make TRL's fused head of this model multiply by the matrix that the model's own head computes with.

    The matrix is read off the head by applying it to the unit vectors, at each call and in the dtype of the hidden
    states, so nothing is kept between calls and any kind of linear layer works. Costs as much as ``hidden_size``
    extra tokens in the head. Idempotent; does nothing for a head that shows its weight.

    Args:
        model: the base model (inside any adapter wrapper), already given TRL's fused head.
    """
    head = model.get_output_embeddings()
    if getattr(model, "_hf_ext_scores_through_head", False) or not head_hides_its_weight(head):
        return
    fused_forward = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        weight, bias = effective_weight(self.get_output_embeddings(), self.get_input_embeddings(), self.config)
        seen = types.SimpleNamespace(weight=weight, bias=bias)
        self.get_output_embeddings = lambda: seen
        try:
            return fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            del self.get_output_embeddings

    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # generate() reads the signature
    model.forward = types.MethodType(forward, model)
    model._hf_ext_scores_through_head = True


@torch.no_grad()
def effective_weight(head: Any, embeddings: nn.Module, config: Any) -> tuple[Tensor, Tensor | None]:
    """The ``[V, D]`` matrix and ``[V]`` bias of a linear head, read off by applying it.

    Args:
        head: the linear module.
        embeddings: the input embeddings, for the device and dtype of the hidden states.
        config: of the model, for ``hidden_size``.
    """
    source = next(embeddings.parameters())
    dtype = source.dtype if source.is_floating_point() else torch.float32
    size = config.get_text_config().hidden_size
    units = torch.eye(size, device=source.device, dtype=dtype)
    bias = getattr(head, "bias", None)
    rows = head(units)
    return (rows if bias is None else rows - bias).T.contiguous().to(dtype), bias


def _is_exact_linear(head: Any) -> bool:
    """A subclass of ``nn.Linear`` that keeps both its float weight and its forward, as a plain wrapper does."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and head.weight.is_floating_point()
        and tuple(head.weight.shape) == (head.out_features, head.in_features)
    )
