"""Registers ReALLM among the host's quantizers, reversibly."""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_ext.patches.patch import Patch

if TYPE_CHECKING:
    from hf_ext.quant.quantizer import ReALLMQuantizer


def register_reallm(host: ModuleType, patch: Patch) -> None:
    """Enter ``quant_method = "reallm"`` in the tables that ``register_quantizer`` and its twin for configs fill."""
    from hf_ext.quant.config import METHOD, ReALLMConfig

    patch.set_item(host.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, ReALLMConfig)
    patch.set_item(host.AUTO_QUANTIZER_MAPPING, METHOD, make_quantizer)


def make_quantizer(config: Any, **kwargs: Any) -> "ReALLMQuantizer":
    """A quantizer, of which the host's table needs no more than a call.

    The class is imported when it is wanted: its module imports the host's, whose import is what opens this seam.
    """
    from hf_ext.quant.quantizer import ReALLMQuantizer

    return ReALLMQuantizer(config, **kwargs)
