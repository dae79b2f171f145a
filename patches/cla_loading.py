"""Checkpoints in and out of Cross-Layer Attention models.

Dense to CLA is silent: a consumer's keys and values are left out, its queries are cut from a fused projection, a
separate key and value norm starts as a copy. CLA to dense, or to a map with more producers, is refused, because the
host would fill the missing projections with random numbers.
"""

import re
from functools import wraps
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_ext.cla.shared import shared_layers
from hf_ext.flags import parse_flags
from hf_ext.patches.architectures import ARCHITECTURES, Architecture
from hf_ext.patches.cla import attentions_of
from hf_ext.patches.cla_layers import INPUTS, KV_NORM, QUERY_ONLY, query_rows
from hf_ext.patches.config_flag import CARRIER, NAME
from hf_ext.patches.patch import Patch


class TakeRows(ConversionOps):
    """Keeps some rows of a weight or bias, or all of them."""

    def __init__(self, rows: Tensor | None = None) -> None:
        self.rows = rows

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The tensor under its new name."""
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        return {target_patterns[0]: tensor if self.rows is None else tensor[self.rows.to(tensor.device)]}


class FromDense(WeightConverter):
    """A weight of the dense model that has another place here. Used for loading only: nothing is saved that way."""


def read_dense_weights(host: ModuleType, patch: Patch) -> None:
    """Wrap what collects a model's weight conversions: add those from its dense twin."""
    original = host.get_model_conversion_mapping

    @wraps(original)
    def mapping(model: Any, *args: Any, **kwargs: Any) -> Any:
        return [*original(model, *args, **kwargs), *conversions(model)]

    patch.set(host, "get_model_conversion_mapping", mapping)


def check_loaded_weights(host: ModuleType, patch: Patch) -> None:
    """Wrap the end of loading: refuse missing keys and values, start separate norms from the queries' norm."""
    original = host.PreTrainedModel._finalize_model_loading

    @wraps(original)
    def finalize(model: Any, load_config: Any, loading_info: Any) -> Any:
        refuse_missing_projections(model, loading_info.missing_keys, load_config.pretrained_model_name_or_path)
        norms = [key for key in loading_info.missing_keys if f".{KV_NORM}." in key]
        info = original(model, load_config, loading_info)
        for key in norms:
            model.get_parameter(key).data.copy_(model.get_parameter(key.replace(f".{KV_NORM}.", ".")).data)
            info.missing_keys.discard(key)
        if conversions_used := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [one for one in conversions_used if not isinstance(one, FromDense)]
        return info

    patch.set(host.PreTrainedModel, "_finalize_model_loading", staticmethod(finalize))


def conversions(model: Any) -> list[FromDense]:
    """From the names and shapes of the dense model to this one's; empty for a model without Cross-Layer Attention."""
    decoder = model.get_decoder()
    architecture = ARCHITECTURES.get(decoder.config.model_type)
    if architecture is None:
        return []
    moved = []
    for layer, attention in enumerate(attentions_of(decoder, architecture)):
        prefix = rf"layers.{layer}.{architecture.attention}"
        if architecture.fused is not None and QUERY_ONLY in attention._modules:
            name, (rows, _, _) = architecture.fused.name, query_rows(architecture.fused, decoder.config)
            moved.append(FromDense(f"{prefix}.{name}", f"{prefix}.{QUERY_ONLY}.{name}", [TakeRows(rows)]))
        for name, slot in INPUTS.items():
            if slot in attention._modules:
                moved.append(FromDense(f"{prefix}.{name}", f"{prefix}.{slot}.{name}", [TakeRows()]))
    return moved


def refuse_missing_projections(model: Any, missing: Any, checkpoint: Any) -> None:
    """Refuse to invent keys and values.

    Raises:
        ValueError: the checkpoint has been saved with Cross-Layer Attention and has none for some producers here.
    """
    architecture = ARCHITECTURES.get(model.get_decoder().config.model_type)
    layers = [] if architecture is None else _layers_without(architecture, missing)
    if layers and (shared_layers(model) or _was_saved_shared(checkpoint)):
        raise ValueError(
            f"The checkpoint {checkpoint!r} has no keys and values for layers {layers}: it was saved with Cross-Layer "
            f"Attention, and these layers read those of another one. Load it with its own hf_ext flag (leave hf_ext= "
            f"out), or with a map in which these layers are consumers; it cannot be made dense again."
        )


def _layers_without(architecture: Architecture, missing: Any) -> list[int]:
    names = architecture.keys_and_values or ((architecture.fused.name,) if architecture.fused else ())
    path = re.compile(rf"layers\.(\d+)\.{architecture.attention}\.(?:\w+\.)?(?:{'|'.join(names)})\.")
    return sorted({int(found[1]) for key in missing if (found := path.search(key))})


def _was_saved_shared(checkpoint: Any) -> bool:
    """Whether the config.json beside the weights carries the ``cla`` flag, whatever config the user has given."""
    if checkpoint is None:
        return False
    try:
        saved, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except OSError:
        return False
    flags = (saved.get(CARRIER) or {}).get(NAME)
    return flags is not None and parse_flags(flags).cla is not None
