"""What the host reads from a config about Cross-Layer Attention: which layers keep no cache, and its bytes a token."""

from types import ModuleType
from typing import Any, NamedTuple

import torch

from hf_ext.cla.config import CLAConfig
from hf_ext.cla.plan import kv_bytes_per_token, plan
from hf_ext.patches.config_flag import find_flags
from hf_ext.patches.patch import Patch

MODES = "kv_sharing_modes"
COUNTED = ("full_attention", "sliding_attention", "chunked_attention")


class LayerKind(NamedTuple):
    """What two layers must have in common to share keys and values.

    The attention type stands for the rotary embedding too: the supported models have one for each type.
    """

    attention: str
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.attention}, {self.kv_heads} KV heads of size {self.head_dim}"


def layer_kinds(config: Any) -> list[LayerKind]:
    """The kind of every decoder layer of a text config."""
    types = getattr(config, "layer_types", None)
    return [
        LayerKind(types[layer] if types else _attention_type(one), _kv_heads(one), _head_dim(one))
        for layer, one in enumerate(config.per_layer_config)
    ]


def sources_of(config: Any) -> tuple[int, ...] | None:
    """The map of a text config's ``cla`` flag, or None when the flag is not set."""
    flags = find_flags(config)
    if flags is None or not isinstance(flags.cla, CLAConfig):
        return None
    return plan(flags.cla, layer_kinds(config))


def open_sharing_modes(host: ModuleType, patch: Patch) -> None:
    """Give every config the host's own ``kv_sharing_modes``, from which its caches take which layers store nothing."""
    patch.add(host.PreTrainedConfig, MODES, property(get_modes, set_modes))


def get_modes(config: Any) -> list[str] | None:
    """``"store"`` or ``"reuse"`` for every layer, or None when all store."""
    if MODES in vars(config):
        modes: list[str] | None = vars(config)[MODES]
        return modes
    sources = sources_of(config) if hasattr(config, "num_hidden_layers") else None
    if sources is None or sources == tuple(range(len(sources))):
        return None
    return ["store" if source == layer else "reuse" for layer, source in enumerate(sources)]


def set_modes(config: Any, value: list[str] | None) -> None:
    """Keep modes that were given by hand; they win over the flag."""
    vars(config)[MODES] = value


def count_kv_bytes(host: ModuleType, patch: Patch) -> None:
    """Give every model ``kv_bytes_per_token()``."""
    patch.add(host.PreTrainedModel, "kv_bytes_per_token", bytes_per_token)


def bytes_per_token(self: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of keys and values that one more token of one sequence adds to an unquantised cache of this model.

    Sliding-window layers are counted like the others: that is what they add until their window is full.

    Args:
        self: the model.
        dtype: of the cache; default: the model's.

    Raises:
        ValueError: the model has layers that keep something other than keys and values.
    """
    config = self.config.get_text_config(decoder=True)
    if not hasattr(config, "num_attention_heads") or hasattr(config, "kv_lora_rank"):
        raise ValueError(f"kv_bytes_per_token cannot tell what a {config.model_type!r} model stores for a token.")
    kinds = layer_kinds(config)
    if strange := sorted({kind.attention for kind in kinds} - set(COUNTED)):
        raise ValueError(f"kv_bytes_per_token counts layers of type {', '.join(COUNTED)}; got {', '.join(strange)}.")
    modes = config.kv_sharing_modes or ["store"] * len(kinds)
    sources = [layer if mode != "reuse" else -1 for layer, mode in enumerate(modes)]
    return kv_bytes_per_token(sources, [k.kv_heads * k.head_dim for k in kinds], (dtype or self.dtype).itemsize)


def _attention_type(config: Any) -> str:
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
