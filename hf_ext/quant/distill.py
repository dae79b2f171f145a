"""Healing a quantised model: what its bits leave free is trained against the full-precision model, codes frozen.

Low-rank terms, scales of the rows and norms learn to make up for the codes (`hf_ext.quant.trainable`): first block by
block, on the mean squared error to the teacher's hidden states, then the whole model on the Kullback-Leibler
divergence to the teacher's next-token distribution. The authors of ReALLM (arXiv 2405.13155) train the low-rank terms
alone, compare with the teacher's block fed by the student's inputs and then train on the language-modelling loss; the
teacher's own states also undo the errors of earlier blocks, and its distribution says more than the text alone (RILQ,
arXiv 2412.01129, finds a model-level loss to matter most at 2 bits).
"""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hf_ext.divergence import distillation_kl
from hf_ext.options import Options
from hf_ext.quant.calibration import calibration_windows, capture_block_inputs, find_blocks
from hf_ext.quant.integrity import checksums
from hf_ext.quant.linear import quantized_layers
from hf_ext.quant.trainable import KINDS, Trainable, trainable_parts

STATE = "distill.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class DistillOptions(Options):
    """How `distill` trains.

    Attributes:
        train: any of ``"low_rank"``, ``"scales"`` (of the rows, outliers included) and ``"norms"``.
        block_epochs: passes over the windows for each block; 0 skips the block-wise stage.
        block_lr: learning rate of Adam there.
        steps: steps of the model-level stage, one window each; 0 skips it.
        lr: its peak learning rate for low-rank factors, falling to zero along a half cosine.
        relative_lr: the same for scales and norms in both stages, in parts of their size.
        windows: windows of text.
        window_length: tokens in each.
        save_every: model-level steps between two saved states.
        precision: ``"bfloat16"`` multiplies in it (autocast; what trains and its gradients stay in float32), about
            twice as fast on processors that have it; ``"float32"`` does not.
    """

    train: tuple[str, ...] = KINDS
    block_epochs: int = 1
    block_lr: float = 1e-3
    steps: int = 100
    lr: float = 5e-4
    relative_lr: float = 1e-3
    windows: int = 32
    window_length: int = 512
    save_every: int = 20
    precision: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", tuple(self.train))  # JSON has lists
        if not self.train or not set(self.train) <= set(KINDS):
            raise ValueError(f"train must name some of {', '.join(KINDS)}, got {list(self.train)}.")
        for name, least in (
            ("block_epochs", 0),
            ("steps", 0),
            ("windows", 1),
            ("window_length", 2),
            ("save_every", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}.")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {self.precision!r}.")
        for name in ("block_lr", "lr", "relative_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}.")


def distill(
    model: Any,
    teacher: Any,
    texts: Any,
    tokenizer: Any = None,
    options: DistillOptions | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train ``options.train`` of ``model`` towards ``teacher``, in place.

    What is trained stays part of the model: ``model.save_pretrained`` keeps it, at not a bit more than before. Train
    low-rank terms alone where other adapters or models share the base.

    Args:
        model: a quantised model.
        teacher: the full-precision model it was made from; not changed.
        texts: what `hf_ext.quant.calibration.calibration_windows` takes.
        tokenizer: for texts that are no token ids.
        options: how to train.
        folder: where the state is kept; a call with the same folder, texts and options goes on where the last one
            stopped, with the same result. None keeps nothing. An interrupted call leaves the model as it was.
        progress: draw a progress bar.

    Returns:
        The model-level loss of every step, in nats per token.

    Raises:
        ValueError: there is nothing to train, the text is too short, or the state belongs to other options or to
            another model, such as this one once it is healed.
    """
    options = options or DistillOptions()
    layers = quantized_layers(model)
    if not layers or (options.train == ("low_rank",) and not any(layer.shape.rank for layer in layers.values())):
        raise ValueError(f"{type(model).__name__} has no low-rank term to train; quantise it with rank of at least 1.")
    windows = calibration_windows(texts, tokenizer, options.windows, options.window_length)
    low = torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
    with trainable_parts(model, layers, options.train) as trained, low:
        run = _Run(model, teacher, trained, windows, options, None if folder is None else Path(folder), progress)
        run.resume()
        run.train_blocks()
        run.train_model()
    return run.losses


@dataclass
class _Run:
    """One distillation: what it works on and how far it has come."""

    model: Any
    teacher: Any
    trained: dict[str, Trainable]
    windows: Tensor
    options: DistillOptions
    folder: Path | None
    progress: bool

    def __post_init__(self) -> None:
        self.losses: list[float] = []
        self.blocks_done = 0
        self.optimizer: torch.optim.Adam | None = None
        self.kept: dict[str, Tensor] = {}
        self.origin = {"options": repr(self.options), "model": _fingerprint(self.model)}

    def train_blocks(self) -> None:
        """The block-wise stage: every block in turn, on the streams of student and teacher."""
        path, blocks = find_blocks(self.model)
        if not self.options.block_epochs or self.blocks_done == len(blocks):
            return
        _, originals = find_blocks(self.teacher)
        student = capture_block_inputs(self.model, blocks, self.windows)
        guide = capture_block_inputs(self.teacher, originals, self.windows)
        for index in tqdm(range(len(blocks)), desc="Healing blocks", disable=not self.progress):
            with torch.no_grad():
                guide.run(originals[index], index, keep=True)
            mine = [part for name, part in self.trained.items() if name.startswith(f"{path}.{index}.")]
            if mine and index >= self.blocks_done:
                self._train_block(blocks[index], index, mine, student, guide.hidden)
                self.blocks_done = index + 1
                self.save()
            with torch.no_grad():
                student.run(blocks[index], index, keep=True)
        self.blocks_done = len(blocks)

    def _train_block(
        self, block: nn.Module, index: int, mine: list[Trainable], student: Any, wanted: list[Tensor]
    ) -> None:
        optimizer = self._adam(mine, self.options.block_lr)
        for _ in range(self.options.block_epochs):
            for hidden, target in zip(student.hidden, wanted, strict=True):
                with torch.enable_grad():
                    output = block(hidden, *student.rest[index], **student.options[index])
                    output = output[0] if isinstance(output, tuple) else output
                    loss = (output - target).float().square().mean() / target.float().square().mean()
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    def train_model(self) -> None:
        """The model-level stage, one window a step in a fixed order."""
        total = self.options.steps
        optimizer = self.optimizer = self._adam(self.trained.values(), self.options.lr)
        self._restore_moments(optimizer)
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step in tqdm(range(len(self.losses), total), desc="Healing the model", disable=not self.progress):
            window = self.windows[step % len(self.windows)][None]
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / total))
            with torch.no_grad():
                wanted = self.teacher(input_ids=window, use_cache=False).logits
            with torch.enable_grad():
                loss = distillation_kl(self.model(input_ids=window, use_cache=False).logits, wanted)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.item())
            if len(self.losses) % self.options.save_every == 0:
                self.save()
        self.save()

    def _adam(self, parts: Iterable[Trainable], lr: float) -> torch.optim.Adam:
        """Parts of the same size share a group and its learning rate."""
        groups: dict[float | None, list[Tensor]] = {}
        for part in parts:
            groups.setdefault(part.size, []).append(part.parameter)
        relative = self.options.relative_lr
        return torch.optim.Adam(
            [{"params": mine, "lr": lr if size is None else relative * size} for size, mine in groups.items()],
            betas=(0.9, 0.95),
        )

    def save(self) -> None:
        """Keep what is trained, optimiser and position; the old state stays until the new one is whole."""
        if self.folder is None:
            return
        tensors = {}
        for name, part in self.trained.items():
            tensors[f"trained.{name}"] = part.parameter.detach().contiguous()
            state = {} if self.optimizer is None else self.optimizer.state[part.parameter]
            tensors |= {f"{key}.{name}": torch.as_tensor(state[key]).contiguous() for key in MOMENTS if key in state}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["blocks_done"] = torch.tensor(self.blocks_done)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{STATE}.new"
        save_file(tensors, unfinished, self.origin)
        unfinished.replace(self.folder / STATE)

    def resume(self) -> None:
        """Take up the state of an earlier call, if there is one."""
        path = None if self.folder is None else self.folder / STATE
        if path is None or not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            origin = opened.metadata() or {}
        made = origin.get("options")
        if made != self.origin["options"]:
            raise ValueError(f"{path} was made with {made}, not with {self.options!r}; use another folder.")
        if origin.get("model") != self.origin["model"]:
            raise ValueError(f"{path} belongs to another model, or this one was healed since; use another folder.")
        self.kept = load_file(path)
        with torch.no_grad():
            for name, part in self.trained.items():
                part.parameter.copy_(self.kept[f"trained.{name}"])
        self.losses = self.kept["losses"].tolist()
        self.blocks_done = int(self.kept["blocks_done"])

    def _restore_moments(self, optimizer: torch.optim.Adam) -> None:
        for name, part in self.trained.items():
            found = {key: self.kept[f"{key}.{name}"].clone() for key in MOMENTS if f"{key}.{name}" in self.kept}
            if found:
                optimizer.state[part.parameter] = found


def _fingerprint(model: Any) -> str:
    """What a gain of the rows is relative to: CRC-32 of everything that the quantised layers hold meanwhile."""
    layers = quantized_layers(model).items()
    held = {f"{name}.{part}": tensor for name, layer in layers for part, tensor in layer.parts.items()}
    return str(zlib.crc32(checksums(held).encode()))
