"""What a built model shares, read from its modules."""

from typing import Any

SOURCE = "kv_source_layer"  # on an attention module: whose keys and values it uses
CONTAINER = "shared_kv_states"  # the argument in which keys and values travel through a forward
LAST_READER = "kv_last_reader"  # on an attention module: whether no later layer reads the same ones


def shared_layers(model: Any) -> dict[int, int]:
    """Consumer layer -> producer layer of a model, with or without adapters; empty for one that shares nothing."""
    return {
        module.layer_idx: getattr(module, SOURCE)
        for module in model.modules()
        if getattr(module, SOURCE, None) is not None and getattr(module, SOURCE) != module.layer_idx
    }


def attention_paths(model: Any) -> dict[int, str]:
    """Layer -> path of its attention module, for a model that shares; empty for one that does not."""
    return {
        module.layer_idx: path for path, module in model.named_modules() if getattr(module, SOURCE, None) is not None
    }
