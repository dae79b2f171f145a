"""`heal_layerwise`: each group of layers that shares learns, by itself, to give the outputs its layers gave before.

A layer that has lost its keys and values can be mended without running the model around it: the dense model says what
its attention read and what it returned, so a group of attention modules is trained on those pairs alone. A step costs
a few modules instead of two whole models, and needs no logits. What it cannot do is let other layers make up for what
is lost; that is left to `CLADistillTrainer`, and docs/cla.md says what was measured. The idea is that of block-wise
reconstruction (BRECQ, arXiv 2102.05426).
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.cache_utils import KVSharingDict

from hf_ext.cla.losses import hidden_error
from hf_ext.cla.shared import CONTAINER, attention_paths, shared_layers

FILE = "layerwise.pt"
WARMUP = 10  # steps
BETAS = (0.9, 0.95)


class Call:
    """What one attention module of the dense model was given for a window and what it returned, in half the bytes."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.dtype = output[0].dtype
        self.args = tuple(_in(torch.bfloat16, value) for value in args)
        self.kwargs = {name: _in(torch.bfloat16, value) for name, value in kwargs.items()}
        self.output = output[0].to(torch.bfloat16)

    def error(self, attention: nn.Module, container: Any) -> Tensor:
        """`hidden_error` of a module that is called in the same way, with ``container`` for what is shared."""
        args = tuple(_in(self.dtype, value) for value in self.args)
        kwargs = {name: _in(self.dtype, value) for name, value in self.kwargs.items()}
        own = attention(*args, **kwargs, **{CONTAINER: container})[0]
        return hidden_error(own, self.output, torch.ones(own.shape[:2], dtype=torch.bool, device=own.device))


def _in(dtype: torch.dtype, value: Any) -> Any:
    """Hidden states `[B, T, hidden]` in that type; masks, positions and anything else as they are."""
    return value.to(dtype) if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point() else value


def heal_layerwise(
    student: Any,
    teacher: Any,
    ids: Tensor,
    *,
    passes: int = 4,
    window: int = 512,
    learning_rate: float = 1e-3,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[int, float]]:
    """Train the attention of every layer that shares, in place, on what the dense model's attention reads and returns.

    Args:
        student: the converted model.
        teacher: the dense model; left as it is.
        ids: token ids `[T]` of some text, tens of thousands. For each token and layer the inputs and outputs of the
            attention are kept, 4 bytes for each hidden dimension.
        passes: over the text.
        window: tokens a step.
        learning_rate: of Adam, falling to zero.
        folder: for weights and optimiser, written after each pass; called again with the same, it goes on from there.
        seed: of the order of the windows.
        progress: show a progress bar.

    Returns:
        For each pass the mean error of every layer: the squared difference over the variance of the dense model's.

    Raises:
        ValueError: the student shares nothing, or the text is shorter than one window.
    """
    layers, groups = attention_paths(student), groups_of(student)
    windows = ids.reshape(-1)[: len(ids) // window * window].view(-1, window)
    if not groups or not len(windows):
        raise ValueError(
            f"Healing layer by layer needs a model in which layers share and at least {window} tokens, got "
            f"{len(groups)} groups and {ids.numel()} tokens."
        )
    healing = _Healing(student, layers, groups, learning_rate, passes * len(windows))
    file = None if folder is None else Path(folder) / FILE
    if file is not None and file.exists():
        healing.load(file)
    if len(healing.errors) >= passes:
        return healing.errors
    with evaluating(student, teacher), only_these_train(student, healing.trained):
        calls = [observe(teacher, row, layers, groups) for row in tqdm(windows, unit="window", disable=not progress)]
        with tqdm(total=passes, initial=len(healing.errors), unit="pass", disable=not progress) as bar:
            while len(healing.errors) < passes:
                order = torch.Generator().manual_seed(seed + len(healing.errors))
                errors = healing.once(calls[index] for index in torch.randperm(len(calls), generator=order).tolist())
                bar.update()
                bar.set_postfix(error=f"{sum(errors.values()) / len(errors):.3f}")
                if file is not None:
                    healing.save(file)
    return healing.errors


class _Healing:
    """The modules that train, their optimiser, and the mean errors of the passes that are done."""

    def __init__(
        self, student: Any, layers: dict[int, str], groups: list[list[int]], learning_rate: float, steps: int
    ) -> None:
        self.groups = groups
        self.modules = {layer: student.get_submodule(layers[layer]) for group in groups for layer in group}
        self.trained = {
            f"{layers[layer]}.{name}": parameter
            for layer, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.trained.values(), learning_rate, betas=BETAS)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        )
        self.errors: list[dict[int, float]] = []

    def once(self, calls: Iterable[dict[int, Call]]) -> dict[int, float]:
        """Train once on every window, and return the mean error of every layer."""
        found: dict[int, list[float]] = {layer: [] for layer in self.modules}
        for call in calls:
            for group in self.groups:
                container = KVSharingDict()
                errors = {layer: call[layer].error(self.modules[layer], container) for layer in group}
                torch.stack(list(errors.values())).sum().backward()
                for layer, error in errors.items():
                    found[layer].append(error.item())
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.errors.append({layer: sum(values) / len(values) for layer, values in found.items()})
        return self.errors[-1]

    def save(self, file: Path) -> None:
        """Write all that is needed to go on, at once."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule")}
        torch.save({**state, "weights": {k: v.data for k, v in self.trained.items()}, "errors": self.errors}, part)
        os.replace(part, file)

    def load(self, file: Path) -> None:
        """Go on from what `save` has written."""
        found = torch.load(file, map_location="cpu", weights_only=True)
        for name, parameter in self.trained.items():
            parameter.data.copy_(found["weights"][name])
        self.optimizer.load_state_dict(found["optimizer"])
        self.schedule.load_state_dict(found["schedule"])
        self.errors = found["errors"]


def groups_of(student: Any) -> list[list[int]]:
    """The layers of each group that shares, the producer first."""
    shared = shared_layers(student)
    return [
        [source, *(layer for layer in sorted(shared) if shared[layer] == source)]
        for source in sorted({*shared.values()})
    ]


@torch.no_grad()
def observe(teacher: Any, window: Tensor, layers: dict[int, str], groups: list[list[int]]) -> dict[int, Call]:
    """The calls of one forward of the dense model's decoder, by layer."""
    calls: dict[int, Call] = {}
    hooks = []
    for layer in itertools.chain(*groups):

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
            calls[layer] = Call(args, kwargs, output)

        hooks.append(teacher.get_submodule(layers[layer]).register_forward_hook(keep, with_kwargs=True))
    try:
        teacher.get_decoder()(input_ids=window[None].to(teacher.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Inside the block the models are in eval mode; outside it in the mode they had."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


@contextmanager
def only_these_train(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside the block only these parameters ask for gradients; outside it all are as before."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
