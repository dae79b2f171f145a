"""The LoRA layer around a `ReALLMLinear`. Its base is frozen codes, so merging adds to the low-rank term instead."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from hf_ext.quant.linear import ReALLMLinear

ALLOWED_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class ReALLMLoraLinear(Linear):
    """LoRA or DoRA on a `ReALLMLinear`.

    A plain adapter merges without loss: its factors join those of the base's low-rank term, whose rank grows, in
    float32. Codes stay as they are. What is no sum of a low-rank term (DoRA, biases) is refused.
    """

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._before_merging: list[tuple[dict[str, Tensor], int]] = []

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Refuse starts that would rewrite the base weight, which is codes."""
        if config.init_lora_weights not in ALLOWED_STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, which a ReALLM layer keeps "
                f"as codes; allowed: {', '.join(map(repr, ALLOWED_STARTS))}. Its own low-rank term can become an "
                f"adapter instead: hf_ext.quant.adapter.low_rank_to_adapter(model)."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append the adapters' factors to the base's low-rank term.

        Raises:
            ValueError: an adapter is not a plain LoRA, or with ``safe_merge`` not finite. Nothing is merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        for name in names:
            self._check_mergeable(name, safe_merge)
        base: ReALLMLinear = self.get_base_layer()
        for name in names:
            own = base.low_rank()
            self._before_merging.append((base.low_rank_parts(), base.shape.low_rank_bits))
            lr_a = self.lora_A[name].weight.detach().float()
            lr_b = self.lora_B[name].weight.detach().float() * self.scaling[name]
            if own is not None:
                lr_a, lr_b = torch.cat([own[0], lr_a.to(own[0].device)]), torch.cat([own[1], lr_b], dim=1)
            base.set_low_rank(lr_a, lr_b, bits=32)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base's low-rank term back as it was stored, bit for bit."""
        base: ReALLMLinear = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            base.set_low_rank_parts(*self._before_merging.pop())

    def _check_mergeable(self, name: str, safe: bool) -> None:
        if name in self.lora_variant or self.lora_bias[name]:
            kind = type(self.lora_variant[name]).__name__ if name in self.lora_variant else "an adapter with a bias"
            raise ValueError(
                f"Adapter {name!r} is {kind}, which is no low-rank term, so it cannot be merged into a ReALLM layer "
                f"without loss. Keep it as an adapter, or call model.dequantize() before adding it."
            )
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        if safe and not all(torch.isfinite(factor).all() for factor in factors):
            raise ValueError(f"Adapter {name!r} holds values that are not finite; it was not merged.")
