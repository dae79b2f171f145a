"""The ``hf_ext=`` flag of every transformers config, carried inside the host's own ``fusion_config``.

``fusion_config`` is a named argument of ``from_pretrained``, is saved in config.json and read back, and a process
without hf_ext refuses an unknown entry in it (``ValueError: Unknown fusion type: hf_ext``) instead of loading a wrong
model. So the flag needs no host code to change: a property that reads and writes that entry, and the entry's name.
"""

import copy
from functools import wraps
from types import ModuleType
from typing import Any

from hf_ext.flags import HfExtConfig, parse_flags
from hf_ext.patches.patch import Patch

CARRIER = "fusion_config"
NAME = "hf_ext"


def open_flag(host: ModuleType, patch: Patch) -> None:
    """Give every config the ``hf_ext`` property; ``from_pretrained`` accepts what the config has an attribute for."""
    patch.add(host.PreTrainedConfig, NAME, property(get_flags, set_flags))


def take_flag_in_from_config(host: ModuleType, patch: Patch) -> None:
    """Let ``from_config(config, hf_ext=...)`` take the flag as ``from_pretrained`` does; the config stays as it is."""
    original = vars(host.PreTrainedModel)["_from_config"].__func__

    @wraps(original)
    def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
        if NAME in kwargs:
            config = copy.deepcopy(config)
            set_flags(config, kwargs.pop(NAME))
        return original(cls, config, **kwargs)

    patch.set(host.PreTrainedModel, "_from_config", classmethod(from_config))


def own_fusion_name(host: ModuleType, patch: Patch) -> None:
    """Own the name ``hf_ext`` among the host's fusions, with a spec that fuses nothing."""

    class NoFusion(host.ModuleFusionSpec):  # type: ignore[name-defined]
        """Matches no module: what the flag asks for is done by `hf_ext.patches.post_init`."""

        def is_fusable(self, module: Any) -> bool:
            return False

        def make_transforms(self, config: Any) -> list[Any]:
            return []

    patch.set_item(host._FUSION_REGISTRY, NAME, NoFusion())


def get_flags(config: Any) -> HfExtConfig | None:
    """The flags on this config itself, or None."""
    carrier = vars(config).get(CARRIER)
    flags = carrier.get(NAME) if isinstance(carrier, dict) else None
    return None if flags is None else parse_flags(flags)


def set_flags(config: Any, value: Any) -> None:
    """Store flags on this config, checked; None drops them."""
    carrier = dict(vars(config).get(CARRIER) or {})
    carrier.pop(NAME, None)
    if value is not None:
        carrier[NAME] = parse_flags(value).to_dict()
    if carrier:
        vars(config)[CARRIER] = carrier
    else:
        vars(config).pop(CARRIER, None)


def find_flags(config: Any) -> HfExtConfig | None:
    """The flags on this config or, for a composite config, on the first config inside it that has some."""
    flags = get_flags(config)
    inner = (getattr(config, name, None) for name in config.sub_configs) if flags is None else ()
    return flags or next((found for sub in inner if hasattr(sub, "sub_configs") and (found := find_flags(sub))), None)
