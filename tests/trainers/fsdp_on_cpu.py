"""FSDP through accelerate on the CPU, which accelerate itself offers to accelerators only.

On CPUs it drops the setting without a word and trains with DDP. So a test turns it on in accelerate's state, and looks
at the classes of the trained modules before it believes that anything was sharded.
"""

from contextlib import nullcontext

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

WRAPPERS = {"FullyShardedDataParallel", "FSDPModule", "DistributedDataParallel"}


def use_fsdp_on_cpu():
    """From now on, in this process, accelerate keeps an FSDP plugin it is given."""
    prepare = AcceleratorState.__init__

    def prepare_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if vars(self).get("fsdp_plugin") is not None:  # every call of the class sets the other two anew
            self.distributed_type = DistributedType.FSDP
            self.device = torch.device("cpu")  # cpu:0 before, which FSDP1 takes for another device

    AcceleratorState.__init__ = prepare_with_fsdp


def fsdp_config(version):
    """What ``TrainingArguments(fsdp=True, fsdp_config=...)`` takes for a Llama on the CPU."""
    return {
        "fsdp_version": version,
        "state_dict_type": "FULL_STATE_DICT",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "sync_module_states": False,  # accelerate wants an accelerator for it; all processes have the same weights
        "cpu_ram_efficient_loading": False,
    }


def weights(model):
    """All parameters of ``model`` in the order of their names, whole and end to end, however they are distributed."""
    whole = nullcontext()
    if isinstance(model, FullyShardedDataParallel):  # its state dict crashes torch 2.13 on the CPU
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    with whole:
        named = {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): (
                parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            )
            for name, parameter in model.named_parameters()
        }
        return torch.cat([named[name].detach().flatten() for name in sorted(named)])


def wrappers(model):
    """Names of the classes that distribute ``model``."""
    return sorted({kind.__name__ for module in model.modules() for kind in type(module).__mro__} & WRAPPERS)
