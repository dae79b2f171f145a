"""Healing a quantised model: its low-rank terms are trained against the full-precision model, everything else frozen.

First block by block, on the mean squared error to the teacher's hidden states, then the whole model on the
Kullback-Leibler divergence to the teacher's next-token distribution. The authors of ReALLM (arXiv 2405.13155) compare
with the teacher's block fed by the student's inputs and then train on the language-modelling loss; the teacher's own
states also undo the errors of earlier blocks, and its distribution says more than the text alone (RILQ,
arXiv 2412.01129, finds a model-level loss to matter most at 2 bits).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from hf_ext.kernels.decoded_linear import low_rank_product
from hf_ext.options import Options
from hf_ext.quant.calibration import calibration_windows, capture_block_inputs, find_blocks
from hf_ext.quant.linear import ReALLMLinear, quantized_layers

STATE = "distill.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class DistillOptions(Options):
    """How `distill` trains.

    Attributes:
        block_epochs: passes over the windows for each block; 0 skips the block-wise stage.
        block_lr: learning rate of Adam there.
        steps: steps of the model-level stage, one window each; 0 skips it.
        lr: its peak learning rate, falling to zero along a half cosine.
        windows: windows of text.
        window_length: tokens in each.
        save_every: model-level steps between two saved states.
        precision: ``"bfloat16"`` multiplies in it (autocast; factors and their gradients stay in float32), about twice
            as fast on processors that have it; ``"float32"`` does not.
    """

    block_epochs: int = 1
    block_lr: float = 1e-3
    steps: int = 100
    lr: float = 5e-4
    windows: int = 32
    window_length: int = 512
    save_every: int = 20
    precision: str = "float32"

    def __post_init__(self) -> None:
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
        for name in ("block_lr", "lr"):
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
    """Train the low-rank terms of ``model`` towards ``teacher``, in place.

    Args:
        model: a quantised model whose layers have low-rank terms.
        teacher: the full-precision model it was made from; not changed.
        texts: what `hf_ext.quant.calibration.calibration_windows` takes.
        tokenizer: for texts that are no token ids.
        options: how to train.
        folder: where the state is kept; a call with the same folder, texts and options goes on where the last one
            stopped, with the same result. None keeps nothing.
        progress: draw a progress bar.

    Returns:
        The model-level loss of every step, in nats per token.

    Raises:
        ValueError: no layer has a low-rank term, the text is too short, or the state belongs to other options.
    """
    options = options or DistillOptions()
    layers = {name: layer for name, layer in quantized_layers(model).items() if layer.shape.rank}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no low-rank term to train; quantise it with rank of at least 1.")
    windows = calibration_windows(texts, tokenizer, options.windows, options.window_length)
    run = _Run(model, teacher, layers, windows, options, None if folder is None else Path(folder), progress)
    low = torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
    with trainable_low_rank(layers) as factors, low:
        run.factors = factors
        run.resume()
        run.train_blocks()
        run.train_model()
    return run.losses


@contextmanager
def trainable_low_rank(layers: dict[str, ReALLMLinear]) -> Iterator[dict[str, Tensor]]:
    """The low-rank factors as float32 parameters, in force within the block, and stored back as before at its end.

    The rest of the weight is decoded once meanwhile. Yields ``name.lr_a`` and ``name.lr_b`` of every layer.
    """
    factors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            low_rank = layer.low_rank()
            assert low_rank is not None
            lr_a, lr_b = (nn.Parameter(factor.clone()) for factor in low_rank)
            factors |= {f"{name}.lr_a": lr_a, f"{name}.lr_b": lr_b}
            stack.callback(_put_back, layer, lr_a, lr_b, layer.shape.low_rank_bits, layer.decode_mode)
            layer.set_low_rank(None, None)
            layer.decode_mode = "once"
            stack.enter_context(_adding(layer, lr_a, lr_b))
        yield factors


def _put_back(layer: ReALLMLinear, lr_a: Tensor, lr_b: Tensor, bits: int, mode: str) -> None:
    layer.decode_mode = mode
    layer.set_low_rank(lr_a, lr_b, bits)


@contextmanager
def _adding(layer: ReALLMLinear, lr_a: Tensor, lr_b: Tensor) -> Iterator[None]:
    hook = layer.register_forward_hook(lambda module, inputs, output: output + low_rank_product(inputs[0], lr_a, lr_b))
    try:
        yield
    finally:
        hook.remove()


@dataclass
class _Run:
    """One distillation: what it works on and how far it has come."""

    model: Any
    teacher: Any
    layers: dict[str, ReALLMLinear]
    windows: Tensor
    options: DistillOptions
    folder: Path | None
    progress: bool

    def __post_init__(self) -> None:
        self.factors: dict[str, Tensor] = {}
        self.losses: list[float] = []
        self.blocks_done = 0
        self.optimizer: torch.optim.Adam | None = None
        self.kept: dict[str, Tensor] = {}

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
            mine = [factor for name, factor in self.factors.items() if name.startswith(f"{path}.{index}.")]
            if mine and index >= self.blocks_done:
                self._train_block(blocks[index], index, mine, student, guide.hidden)
                self.blocks_done = index + 1
                self.save()
            with torch.no_grad():
                student.run(blocks[index], index, keep=True)
        self.blocks_done = len(blocks)

    def _train_block(
        self, block: nn.Module, index: int, mine: list[Tensor], student: Any, wanted: list[Tensor]
    ) -> None:
        optimizer = torch.optim.Adam(mine, lr=self.options.block_lr, betas=(0.9, 0.95))
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
        optimizer = self.optimizer = torch.optim.Adam(self.factors.values(), lr=self.options.lr, betas=(0.9, 0.95))
        self._restore_moments(optimizer)
        for step in tqdm(range(len(self.losses), total), desc="Healing the model", disable=not self.progress):
            window = self.windows[step % len(self.windows)][None]
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / total)).item())
            with torch.no_grad():
                target = self.teacher(input_ids=window, use_cache=False).logits[0].float().log_softmax(-1)
            with torch.enable_grad():
                found = self.model(input_ids=window, use_cache=False).logits[0].float().log_softmax(-1)
                loss = nn.functional.kl_div(found, target, reduction="sum", log_target=True) / len(found)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.item())
            if len(self.losses) % self.options.save_every == 0:
                self.save()
        self.save()

    def save(self) -> None:
        """Keep factors, optimiser and position; the old state stays until the new one is whole."""
        if self.folder is None:
            return
        tensors = {f"factor.{name}": factor.detach().contiguous() for name, factor in self.factors.items()}
        for name, factor in self.factors.items() if self.optimizer is not None else ():
            state = self.optimizer.state[factor] if self.optimizer is not None else {}
            tensors |= {f"{key}.{name}": torch.as_tensor(state[key]).contiguous() for key in MOMENTS if key in state}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["blocks_done"] = torch.tensor(self.blocks_done)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{STATE}.new"
        save_file(tensors, unfinished, {"options": repr(self.options)})
        unfinished.replace(self.folder / STATE)

    def resume(self) -> None:
        """Take up the state of an earlier call, if there is one."""
        path = None if self.folder is None else self.folder / STATE
        if path is None or not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            options = (opened.metadata() or {}).get("options")
        if options != repr(self.options):
            raise ValueError(f"{path} was made with {options}, not with {self.options!r}; use another folder.")
        self.kept = load_file(path)
        if any(f"factor.{name}" not in self.kept for name in self.factors):
            raise ValueError(f"{path} belongs to another model; use another folder.")
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(self.kept[f"factor.{name}"])
        self.losses = self.kept["losses"].tolist()
        self.blocks_done = int(self.kept["blocks_done"])

    def _restore_moments(self, optimizer: torch.optim.Adam) -> None:
        for name, factor in self.factors.items():
            found = {key: self.kept[f"{key}.{name}"].clone() for key in MOMENTS if f"{key}.{name}" in self.kept}
            if found:
                optimizer.state[factor] = found
