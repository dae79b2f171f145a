"""`ReALLMQuantizer`: what transformers calls to quantise on loading, to load what was saved, and to save.

Plain matrices are solved while the checkpoint is read, one at a time, so that the full-precision model never exists.
Calibration and plans need the whole model first; it is then quantised in place. A quantised config also carries an
entry in ``fusion_config``, which a process without hf_ext refuses, where it would otherwise draw random weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_ext.quant.config import METHOD, ReALLMConfig
from hf_ext.quant.container import check_indices
from hf_ext.quant.integrity import CHECKSUMS, checksums, verify_checkpoint
from hf_ext.quant.linear import ReALLMLinear, quantized_layers
from hf_ext.quant.quantize import Progress, linear_names, quantize_model
from hf_ext.quant.solve import solve

logger = logging.get_logger(__name__)


class ReALLMQuantizer(HfQuantizer):
    """The host's side of ReALLM (arXiv 2405.13155)."""

    quantization_config: ReALLMConfig

    def __init__(self, quantization_config: ReALLMConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype = torch.float32
        self.targets: set[str] = set()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the model's type; any floating type will do."""
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"A ReALLM model runs in float32, float16 or bfloat16, got dtype={dtype}.")
        self.dtype = dtype
        return dtype

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse disks as devices: packed layers are small, and the host offloads parameters only."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("A ReALLM model cannot be offloaded to disk, got 'disk' in device_map.")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            stored = verify_checkpoint(checkpoint_files or ())
            _build_layers(model, self.quantization_config, self.dtype)
            if stored:
                _check_parts(quantized_layers(model), stored)
            return
        self.targets = set(linear_names(model, self.quantization_config))
        if not self.targets:
            raise ValueError(f"{type(model).__name__} has no linear layer to quantise.")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor is a matrix to solve while it is read."""
        module, _, name = param_name.rpartition(".")
        return name == "weight" and module in self.targets and not self._after_loading

    def get_quantize_ops(self) -> ConversionOps:
        """What solves it."""
        return SolveMatrix(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if self.pre_quantized:
            for name, layer in quantized_layers(model).items():
                check_indices(name, layer.parts, layer.out_features, layer.in_features)
        else:
            if self._after_loading:
                quantize_model(model, config, [name for name, _ in model.named_modules() if name in self.targets])
            config.record(quantized_layers(model))
        for parameter in (layer.bias for layer in quantized_layers(model).values() if layer.bias is not None):
            parameter.requires_grad_(False)
        mark_quantized(model, config)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """No other state dict, but checksums of this one in the metadata of the file."""
        layers = quantized_layers(model)
        if layers:
            self.quantization_config.record(layers)
        return None, {CHECKSUMS: checksums(_saved_tensors(model))}

    def is_serializable(self) -> bool:
        """It is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it train; the quantised weights do not."""
        return True

    @property
    def _after_loading(self) -> bool:
        return self.quantization_config.calibrated

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in quantized_layers(model).items():
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(layer.weight.to(dtype or self.dtype))
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().to(linear.weight.dtype))
            model.set_submodule(name, linear)
        mark_quantized(model, None)
        return model


class SolveMatrix(ConversionOps):
    """Quantises one matrix as it is read, without data, and puts the new layer in the model itself."""

    def __init__(self, quantizer: ReALLMQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: Any = None,
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Solve; nothing is left for the host to set."""
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        assert full_layer_name is not None
        name = full_layer_name.removesuffix(".weight")
        config, old = self.quantizer.quantization_config, model.get_submodule(name)
        solution = solve(weight.cpu(), config.shape_for(*weight.shape), effort=config.effort())
        parts = {part: tensor.to(weight.device) for part, tensor in solution.parts.items()}
        model.set_submodule(name, ReALLMLinear.from_parts(parts, solution.shape, weight.shape[1], old.bias))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def quantize_in_place(model: Any, config: ReALLMConfig, progress: Progress | None = None) -> dict[str, float]:
    """Quantise a model that is loaded already, so that it saves itself as one loaded with ``config`` would.

    Returns:
        The relative error of each layer.

    Raises:
        ValueError: what `quantize_model` raises, or the model is quantised already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"This model is quantised already ({model.hf_quantizer.quantization_config.quant_method}).")
    errors = quantize_model(model, config, progress=progress)
    model.hf_quantizer = ReALLMQuantizer(config, pre_quantized=False)
    model.config.dtype = model.dtype
    model.is_quantized, model.quantization_method, model.config._is_quantized = True, METHOD, True
    mark_quantized(model, config)
    return errors


def mark_quantized(model: Any, config: ReALLMConfig | None) -> None:
    """Make the model's config say what it is, so that a process without hf_ext refuses it; None takes that back."""
    carrier = dict(getattr(model.config, "fusion_config", None) or {})
    if config is not None:
        carrier.setdefault("hf_ext", {})
        model.config.quantization_config = config
    elif not carrier.get("hf_ext"):
        carrier.pop("hf_ext", None)
    model.config.fusion_config = carrier or None


def _build_layers(model: Any, config: ReALLMConfig, dtype: torch.dtype) -> None:
    """Empty layers on the meta device, where the plan says."""
    for name, shape in config.recorded().items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"The checkpoint holds a layer {name}, which {type(model).__name__} has not.") from error
        if type(old) is not nn.Linear:
            raise ValueError(f"The checkpoint quantises {name}, which is a {type(old).__name__} and no linear layer.")
        bias = old.bias is not None
        new = ReALLMLinear(old.in_features, old.out_features, shape, bias, dtype, device="meta")
        model.set_submodule(name, new)


def _check_parts(layers: dict[str, ReALLMLinear], stored: set[str]) -> None:
    """Refuse a checkpoint whose plan asks for other parts than it holds."""
    found: dict[str, set[str]] = {name: set() for name in layers}
    for tensor in stored:
        owner, _, part = tensor.rpartition(".")
        found.get(owner, set()).add(part)
    for name, layer in layers.items():
        asked = set(layer.state_dict())
        if found[name] != asked:
            asks, there = ", ".join(sorted(asked)), ", ".join(sorted(found[name]))
            raise ValueError(f"The plan of {name} asks for the parts {asks}; the checkpoint holds {there or 'none'}.")


def _saved_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that the host writes, under the names that it writes: of tied ones only the first."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
    return dict(revert_weight_conversion(model, tensors))
