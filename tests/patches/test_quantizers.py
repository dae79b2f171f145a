import subprocess
import sys

import pytest
from transformers.quantizers import auto

from hf_ext import ReALLMConfig, install, uninstall
from hf_ext.quant.quantizer import ReALLMQuantizer


def test_the_method_is_registered_once_and_taken_back():
    for _ in range(2):
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["reallm"] is ReALLMConfig
        assert isinstance(auto.AUTO_QUANTIZER_MAPPING["reallm"](ReALLMConfig()), ReALLMQuantizer)
        uninstall()
        try:
            assert "reallm" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
            assert "reallm" not in auto.AUTO_QUANTIZER_MAPPING
        finally:
            install()


def test_the_host_builds_ours_from_a_config():
    quantizer = auto.AutoHfQuantizer.from_config(ReALLMConfig().to_dict(), pre_quantized=False)
    assert isinstance(quantizer, ReALLMQuantizer) and quantizer.is_serializable() and quantizer.is_trainable


def test_the_quantizers_module_can_be_the_first_import():
    subprocess.run([sys.executable, "-c", "import hf_ext.quant.quantizer"], check=True)


def test_the_hosts_own_registration_would_refuse_a_second_one():
    with pytest.raises(ValueError, match="already registered"):
        auto.register_quantizer("reallm")(ReALLMQuantizer)
