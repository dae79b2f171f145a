"""Calibration text as windows of token ids, and what layers see of it: second moments of their inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def calibration_windows(source: Any, tokenizer: Any, windows: int, length: int) -> Tensor:
    """Token ids ``[windows, length]``, spread evenly over the whole text and not overlapping.

    Args:
        source: a text file, a folder of ``*.txt`` files, a list of texts, a dataset with a ``text`` column, or token
            ids ``[at least windows, at least length]``.
        tokenizer: turns text into ids; not needed for token ids.
        windows: how many.
        length: tokens in each.

    Raises:
        ValueError: the text is too short, or ``source`` is none of these.
        OSError: a file cannot be read.
    """
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.shape[0] < windows or source.shape[1] < length:
            raise ValueError(
                f"Calibration needs token ids of at least [{windows}, {length}], got {list(source.shape)}."
            )
        return source[:windows, :length].long()
    if tokenizer is None:
        raise ValueError("Calibration text needs a tokenizer, got None; pass tokenizer= or token ids.")
    # without the tokenizer's own warning: the text is cut into windows, so its length does not matter
    ids = tokenizer(_text(source), add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < windows * length:
        raise ValueError(
            f"The calibration text is too short: {windows} windows of {length} tokens need {windows * length} tokens, "
            f"got {len(ids)}. Give more text, or fewer or shorter windows."
        )
    starts = [number * len(ids) // windows for number in range(windows)]
    return torch.stack([ids[start : start + length] for start in starts])


@torch.no_grad()
def sampled_windows(model: Any, windows: int, length: int, start: int | None = None, seed: int = 0) -> Tensor:
    """Token ids ``[windows, length]`` that the model writes itself, drawn from its own distribution.

    Calibration without any text (LLM-QAT, arXiv 2305.17888), or beside text: it covers what the model was trained on.

    Args:
        model: a causal language model.
        windows: how many.
        length: tokens in each.
        start: the first token of each; None takes ``bos_token_id`` of the model's config.
        seed: of the draw.

    Raises:
        ValueError: there is no first token.
    """
    start = model.config.get_text_config(decoder=True).bos_token_id if start is None else start
    if start is None:
        raise ValueError(f"{type(model).__name__} names no bos_token_id; pass start=, the first token to go on from.")
    first = torch.full((windows, 1), start, device=model.device)
    options: dict[str, Any] = {
        "max_new_tokens": length - 1,
        "min_new_tokens": length - 1,
        "eos_token_id": [],
        "pad_token_id": start,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            **options,
        )


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Windows of two kinds of text one by one, so that the first few hold both; what is left over comes last."""
    both = min(len(first), len(second))
    mixed = torch.stack([first[:both], second[:both]], 1).flatten(0, 1)
    return torch.cat([mixed, first[both:], second[both:]])


def _text(source: Any) -> str:
    if isinstance(source, str | PathLike):
        path = Path(source)
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"There is no *.txt file to calibrate on in {path}.")
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    if "text" in (getattr(source, "column_names", None) or ()):
        return "\n\n".join(source["text"])
    if isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
        return "\n\n".join(source)
    raise ValueError(
        f"calibration must be a text file, a folder of them, a list of texts, a dataset with a 'text' column or token "
        f"ids, got {type(source).__name__}."
    )


@dataclass
class Moments:
    """``E[x x^T]`` of the inputs of several layers, summed up call by call; a shared input is multiplied only once.

    Attributes:
        sums: layer name -> sum of ``x x^T``, ``[in, in]``.
        tokens: layer name -> number of input rows.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _last: tuple[Tensor, Tensor, int] | None = None  # an input, its product and its rows

    def add(self, name: str, x: Tensor) -> None:
        """Count ``x`` ``[..., in]`` as input of layer ``name``."""
        if self._last is None or self._last[0] is not x:
            rows = x.detach().flatten(0, -2).float()
            self._last = (x, rows.t() @ rows, len(rows))
        _, product, count = self._last
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product.clone()
        self.tokens[name] = self.tokens.get(name, 0) + count

    def hessian(self, name: str) -> Tensor | None:
        """``E[x x^T]`` of layer ``name``, or None if it was never called."""
        return self.sums[name] / self.tokens[name] if name in self.sums else None

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count the inputs of these layers within the ``with`` block."""
        hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: self.add(name, inputs[0])


class _Stop(Exception):
    """Ends a forward pass once everything that was wanted of it is known."""


@dataclass
class BlockInputs:
    """The stream of hidden states through a model's blocks, kept between blocks instead of recomputed.

    Attributes:
        hidden: one ``[1, T, hidden]`` per window: the inputs of the next block.
        options: block index -> the keyword arguments it is called with (masks, positions); alike for all windows.
        rest: block index -> its further positional arguments.
    """

    hidden: list[Tensor]
    options: list[dict[str, Any]]
    rest: list[tuple[Any, ...]]

    def run(self, block: nn.Module, index: int, keep: bool) -> None:
        """Send all windows through ``block``; with ``keep`` its outputs become the next block's inputs."""
        for number, hidden in enumerate(self.hidden):
            output = block(hidden, *self.rest[index], **self.options[index])
            if keep:
                self.hidden[number] = output[0] if isinstance(output, tuple) else output


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the longest module list that holds linear layers.

    Raises:
        ValueError: there is none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(part, nn.Linear) for part in module.modules())
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks with linear layers that could be calibrated.")
    return max(lists, key=lambda item: len(item[1]))


@torch.no_grad()
def capture_block_inputs(model: nn.Module, blocks: nn.ModuleList, windows: Tensor) -> BlockInputs:
    """What reaches the first block for every window, and how every block is called.

    Raises:
        ValueError: a block is not called with hidden states as its first positional argument.
    """
    options: list[dict[str, Any]] = [{} for _ in blocks]
    rest: list[tuple[Any, ...]] = [() for _ in blocks]
    hidden: list[Tensor] = []

    def remember(index: int, stop: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not arguments or not isinstance(arguments[0], Tensor):
                raise ValueError(f"{type(module).__name__} is not called with hidden states first; cannot calibrate.")
            rest[index], options[index] = arguments[1:], keywords
            if index == 0:
                hidden.append(arguments[0].detach())
                if stop:
                    raise _Stop

        return hook

    with _hooks(list(blocks), lambda index: remember(index, stop=False)):
        model(input_ids=windows[:1], use_cache=False)  # once to the end, to see how each block is called
    with _hooks([blocks[0]], lambda index: remember(index, stop=True)):
        for window in windows[1:]:
            try:
                model(input_ids=window[None], use_cache=False)
            except _Stop:
                continue
    return BlockInputs(hidden, options, rest)


@contextmanager
def _hooks(blocks: Sequence[nn.Module], make: Callable[[int], Callable[..., None]]) -> Iterator[None]:
    hooks = [block.register_forward_pre_hook(make(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def output_gradients(model: nn.Module, layers: Mapping[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """The mean square of the loss gradient at every output of every layer, ``[out]`` each.

    The loss is the sum over tokens of the cross-entropy in nats, so ``1/2 sum_r F_r (dW H dW^T)_rr`` estimates the
    nats per token that an error ``dW`` costs (the diagonal of a Kronecker-factored Fisher matrix, arXiv 1503.05671).
    """
    sums = {name: torch.zeros(layer.out_features) for name, layer in layers.items()}
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def watch(name: str) -> Callable[..., None]:
        def add(grad: Tensor) -> None:
            sums[name] += grad.detach().flatten(0, -2).float().square().sum(0)

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(add)

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hooks.append(embedding.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_()))
    try:
        with torch.enable_grad():
            for parameter, _ in parameters:
                parameter.requires_grad_(False)
            for window in windows:
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
                nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in parameters:
            parameter.requires_grad_(required)
    return {name: total / windows.numel() for name, total in sums.items()}
