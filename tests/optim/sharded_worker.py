"""One of two processes: trains a small model under FSDP2 and tensor parallelism, and compares with one process."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_ext import FAdam
from hf_ext.kernels.fadam_step import EPS_MODES

PATHS = ({"foreach": False}, {"foreach": True}, {"fused": True})


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1), nn.Linear(1, 3, bias=False))  # uneven and empty shards
    model[2].unused = nn.Parameter(torch.ones(4, 3))
    return model.double()


def train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        inputs = torch.randn(6, 7, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        loss = model(inputs).square().mean()
        unused = model[2].unused
        (loss + 0 * (unused.full_tensor() if isinstance(unused, DTensor) else unused).sum()).backward()
        optimizer.step()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_equal(what, expected, model):
    for (name, wanted), got in zip(expected.named_parameters(), model.parameters(), strict=True):
        error = (full(got.detach()) - wanted.detach()).abs().max().item()
        assert error < 1e-12, f"{what}: {name} differs by {error}"


def sharded(mesh):
    model = build()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(mesh):
    for mode, path in (*(("min_eps2", path) for path in PATHS), *((mode, {}) for mode in EPS_MODES)):
        options = {"lr": 0.05, "weight_decay": 0.01, "eps_mode": mode}
        expected, model = build(), sharded(mesh)
        single = FAdam(expected.parameters(), **options, foreach=False)
        optimizer = FAdam(model.parameters(), **options, **path)
        train(expected, single, 3)
        train(model, optimizer, 3)
        check_equal(f"FSDP2 {mode} {path}", expected, model)


def resume(mesh):
    model, expected = sharded(mesh), build()
    optimizer, single = FAdam(model.parameters(), lr=0.05), FAdam(expected.parameters(), lr=0.05)
    train(model, optimizer, 3)
    train(expected, single, 3)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    weights = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    again = build()
    with torch.no_grad():
        for name, param in again.named_parameters():
            param.copy_(weights[name])
    for layer in again:
        fully_shard(layer, mesh=mesh)
    fully_shard(again, mesh=mesh)
    resumed = FAdam(again.parameters(), lr=0.5)
    set_optimizer_state_dict(again, resumed, saved, options=options)
    train(again, resumed, 3, start=3)
    train(expected, single, 3, start=3)
    check_equal("resumed", expected, again)


def tensor_parallel(mesh):
    for placement in (Shard(1), Replicate()):
        whole = nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5))
        parts = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [placement]))
        single, optimizer = FAdam([whole], weight_decay=0.01), FAdam([parts], weight_decay=0.01)
        for t in range(3):
            whole.grad = torch.cos(whole.detach() + t)
            parts.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])  # of another placement
            single.step()
            optimizer.step()
        assert (full(parts.detach()) - whole).abs().max() < 1e-12, placement


def refused(mesh):
    model = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = FAdam(model.parameters())
    model(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "FSDP1" in str(error) and "fsdp_version: 2" in str(error)
    else:
        raise AssertionError("FSDP1 was not refused")
    model = nn.Linear(128, 64)
    fully_shard(model, mesh=mesh)
    optimizer = FAdam(model.parameters(), optim_bits=8)
    model(torch.ones(2, 128)).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        assert "sharded DTensor" in str(error)
    else:
        raise AssertionError("8-bit states of shards were not refused")


def main(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for check in (fsdp2, resume, tensor_parallel, refused):
        check(mesh)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
