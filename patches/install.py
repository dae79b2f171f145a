"""Opens hf_ext's seams in the host libraries as they are imported, and closes them again.

Each seam is one function ``(host_module, patch) -> None`` that changes one host module through a `Patch`. It runs
right after the host module is imported, or at once where that has happened already; nothing is imported early.
"""

import sys
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import wrapt

from hf_ext.registry import load

if TYPE_CHECKING:
    from hf_ext.patches.patch import Patch

SEAMS: tuple[tuple[str, str], ...] = (
    ("transformers.configuration_utils", "hf_ext.patches.config_flag:open_flag"),
    ("transformers.configuration_utils", "hf_ext.patches.cla_config:open_sharing_modes"),
    ("transformers.fusion_mapping", "hf_ext.patches.config_flag:own_fusion_name"),
    ("transformers.modeling_utils", "hf_ext.patches.config_flag:take_flag_in_from_config"),
    ("transformers.modeling_utils", "hf_ext.patches.post_init:apply_flags_after_init"),
    ("transformers.modeling_utils", "hf_ext.patches.cla_config:count_kv_bytes"),
    ("transformers.modeling_utils", "hf_ext.patches.attention:watch_attention"),
    ("transformers.modeling_utils", "hf_ext.patches.cla_loading:read_dense_weights"),
    ("transformers.modeling_utils", "hf_ext.patches.cla_loading:check_loaded_weights"),
    ("transformers.modeling_utils", "hf_ext.patches.cla_training:refuse_reentrant_checkpointing"),
    ("peft.peft_model", "hf_ext.patches.cla_training:report_dropped_adapter_weights"),
    ("peft.tuners.tuners_utils", "hf_ext.patches.cla_training:explain_missing_targets"),
    ("transformers.quantizers.auto", "hf_ext.patches.quantizers:register_reallm"),
    ("peft.tuners.lora.model", "hf_ext.patches.peft_dispatch:adapt_reallm_layers"),
    ("transformers.generation.configuration_utils", "hf_ext.patches.cache_names:allow_names"),
    ("transformers.generation.utils", "hf_ext.patches.cache_names:build_named_caches"),
    ("transformers.training_args", "hf_ext.patches.optimizer_names:add_name"),
    ("transformers.trainer_optimizer", "hf_ext.patches.optimizer_names:add_handler"),
)

_open: dict[str, "Patch"] = {}  # seam -> its patch, in the order of opening
_state = {"installed": False, "hooks_registered": False}


def install() -> None:
    """Open every seam, now or when its host module is imported. Calling it again changes nothing."""
    _state["installed"] = True
    for host, seam in SEAMS:
        if host in sys.modules:
            _open_seam(seam, sys.modules[host])
        elif not _state["hooks_registered"]:
            wrapt.register_post_import_hook(partial(_open_seam, seam), host)
    _state["hooks_registered"] = True


def uninstall() -> None:
    """Put every object of the host libraries back as it was. Models that are already built keep what they have."""
    _state["installed"] = False
    while _open:
        _, patch = _open.popitem()
        patch.remove()


def _open_seam(seam: str, host: ModuleType) -> None:
    if not _state["installed"] or seam in _open:
        return
    from hf_ext.patches.patch import Patch  # torch is loaded by now: the hosts need it themselves

    patch = Patch(seam)
    try:
        load(seam)(host, patch)
    except BaseException:
        patch.remove()
        raise
    _open[seam] = patch
