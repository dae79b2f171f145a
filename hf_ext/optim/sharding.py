"""What a per-tensor root mean square needs to know about sharded parameters.

DTensors (FSDP2, tensor parallelism) know the whole tensor: sums over the local part are added up over the mesh
dimensions that shard it. FSDP1 and DeepSpeed ZeRO hand the optimizer flat pieces that know nothing of the tensors they
came from; those are refused by name.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (mesh, the mesh dimensions that shard the tensor): tensors that share it can share one reduction.
Sharding = tuple[Any, tuple[int, ...]]


def sharding_of(param: Tensor) -> Sharding | None:
    """How a DTensor is sharded; None for an ordinary tensor.

    Raises:
        ValueError: the tensor holds partial sums.
    """
    if not _is_dtensor(param):
        return None
    placements: Any = param.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"FAdam cannot update a DTensor of partial sums, got placements {placements}.")
    dimensions = tuple(d for d, placement in enumerate(placements) if not placement.is_replicate())
    return (param.device_mesh, dimensions)  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor itself."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """The local part of the gradient, sharded as the parameter is."""
    if _is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local_part(grad)


def sum_over_shards(sharding: Sharding) -> Callable[[Tensor], Tensor]:
    """The function that adds up a tensor of sums over all shards and returns it."""
    return functools.partial(_all_reduce, sharding)


def check_whole(param: Tensor, given: bool) -> None:
    """Refuse pieces of tensors whose root mean square would depend on the number of processes.

    Args:
        param: the parameter about to be updated.
        given: whether the optimizer was built with this very tensor.

    Raises:
        RuntimeError: ``param`` was flattened by FSDP1, or put in the place of the model's parameters by DeepSpeed.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise RuntimeError(
            "FAdam clips by the root mean square of each whole tensor, which FSDP1's flattened shards do not show. "
            "Use FSDP2: fully_shard(model), or fsdp_version: 2 in the accelerate config."
        )
    if not given and param.dim() == 1 and "deepspeed" in sys.modules and not _is_dtensor(param):
        raise RuntimeError(
            "FAdam clips by the root mean square of each whole tensor, and DeepSpeed has replaced the parameters by a "
            "flat partition. Use DDP or FSDP2, or an optimizer that DeepSpeed supports."
        )


def _is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) is torch.nn.Parameter or type(tensor) is Tensor:
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _all_reduce(sharding: Sharding, sums: Tensor) -> Tensor:
    mesh, dimensions = sharding
    there = sums.to(mesh.device_type)  # with parameters offloaded to CPU the group may know the accelerator only
    for dimension in dimensions:
        torch.distributed.all_reduce(there, group=mesh.get_group(dimension))
    return there.to(sums.device)
