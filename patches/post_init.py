"""Applies the flags of a model's config at the end of its ``__init__``.

``PreTrainedModel.post_init`` runs on every architecture, for ``from_pretrained`` (on the meta device, before the
weights are loaded), ``from_config`` and direct construction alike, first for the base model and then for the model
around it.
"""

from functools import wraps
from types import ModuleType
from typing import Any

from hf_ext.patches.config_flag import find_flags
from hf_ext.patches.patch import Patch
from hf_ext.registry import load

# Flag -> the function (model, value of the flag) -> None that applies it; each leaves alone what is already applied.
APPLY: dict[str, str] = {
    "cla": "hf_ext.patches.cla:apply_flag",
    "kv_cache": "hf_ext.patches.caches:check_flag",
}


def apply_flags_after_init(host: ModuleType, patch: Patch) -> None:
    """Wrap ``PreTrainedModel.post_init``."""
    original = host.PreTrainedModel.post_init

    @wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        apply_flags(self)

    patch.set(host.PreTrainedModel, "post_init", post_init)


def apply_flags(model: Any) -> None:
    """Apply every flag that the model's config carries."""
    flags = find_flags(model.config)
    if flags is None:
        return
    for flag, apply in APPLY.items():
        value = getattr(flags, flag)
        if value is not None:
            load(apply)(model, value)
