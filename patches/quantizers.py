"""Registers ReALLM among the host's quantizers, reversibly."""

from types import ModuleType

from hf_ext.patches.patch import Patch


def register_reallm(host: ModuleType, patch: Patch) -> None:
    """Enter ``quant_method = "reallm"`` in the tables that ``register_quantizer`` and its twin for configs fill."""
    from hf_ext.quant.config import METHOD, ReALLMConfig
    from hf_ext.quant.quantizer import ReALLMQuantizer

    patch.set_item(host.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, ReALLMConfig)
    patch.set_item(host.AUTO_QUANTIZER_MAPPING, METHOD, ReALLMQuantizer)
