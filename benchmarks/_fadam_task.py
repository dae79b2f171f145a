"""A small language model over the bytes of the interpreter's help pages, trained with AdamW or FAdam."""

import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import FAdam

DECAYS = {"AdamW": 0.1, "FAdam": 1e-3}  # customary, and FAdam's own default
Watch = Callable[[nn.Module, torch.optim.Optimizer], None]


def make_optimizer(name: str, model: Any, lr: float, beta2: float, **options: Any) -> torch.optim.Optimizer:
    """AdamW or FAdam with its decay of `DECAYS`, unless ``weight_decay`` is among the options; vectors have none.

    The option ``head_clip`` is FAdam's clip for the output head alone.
    """
    decay = options.pop("weight_decay", DECAYS[name])
    head_options = {"clip": options.pop("head_clip")} if "head_clip" in options else {}
    head = model.get_output_embeddings().weight
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1 and p is not head], "weight_decay": decay},
        {"params": [head], "weight_decay": decay, **head_options},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return (torch.optim.AdamW if name == "AdamW" else FAdam)(groups, lr=lr, betas=(0.9, beta2), **options)


@dataclass(frozen=True)
class Task:
    """The language model over bytes, and its training: ``batch`` windows of ``length`` bytes a step."""

    hidden: int
    layers: int
    length: int
    batch: int
    steps: int


def train(
    task: Task,
    name: str,
    lr: float,
    beta2: float,
    seed: int,
    max_norm: float = 1.0,
    spike: int | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> tuple[list[float], float, float]:
    """Train the small model; training losses by step, held-out loss (both nats per byte) and RMS of its matrices.

    Args:
        task: the model and how long it trains.
        name: AdamW or FAdam.
        lr: learning rate after the warm-up.
        beta2: decay rate of the second moment.
        seed: of the weights and the batches.
        max_norm: bound on the global norm of the gradients.
        spike: step at which all gradients are replaced by normal noise of standard deviation 100.
        watch: called once with the model and the optimizer, to add hooks.
        **options: of the optimizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=task.hidden,
        intermediate_size=8 * task.hidden // 3,
        num_hidden_layers=task.layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    train_bytes, held_out = _text()
    optimizer = make_optimizer(name, model, lr, beta2, **options)
    cosine = partial(_cosine, warmup=task.steps // 10, steps=task.steps)
    if watch is not None:
        watch(model, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    losses = []
    for step, batch in enumerate(_batches(train_bytes, seed, task)):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        if step == spike:
            noise = torch.Generator().manual_seed(0)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=noise) * 100
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    return losses, _held_out_loss(model, held_out, task.length), matrices.square().mean().sqrt().item()


def _cosine(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def _text() -> tuple[Tensor, Tensor]:
    data = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def _batches(data: Tensor, seed: int, task: Task) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        starts = torch.randint(len(data) - task.length, (task.batch, 1), generator=generator)
        yield data[starts + torch.arange(task.length)]


@torch.no_grad()
def _held_out_loss(model: nn.Module, data: Tensor, length: int) -> float:
    windows = len(data) // length
    batches = data[: windows * length].view(windows, length).split(256)
    return sum(len(rows) * model(input_ids=rows, labels=rows).loss.item() for rows in batches) / windows
