"""The decoder D_phi of ReALLM (arXiv 2405.13155): a small residual MLP from latents to weights, stored on b_phi bits.

Two kinds. *Pointwise* maps each codeword on its own, so it is a function of the code: it is tabulated once and costs
nothing afterwards, and only saves the bytes of a free table. *Context* sees a codeword and its two neighbours in the
row, which no table can hold: such a weight is decoded once, when it is loaded. The paper trains convolutions of
millions of parameters per matrix, which is beyond what a small model can pay for; these have a few hundred.
"""

import torch
from torch import Tensor, nn

from hf_ext.kernels.pack import pack, packed_bytes, unpack

POINTWISE_HIDDEN = 8
CONTEXT_HIDDEN = 16


def decoder_shapes(kind: str, size: int, codewords: int, hidden: int) -> list[tuple[int, ...]]:
    """Shapes of the stored tensors: the latents (pointwise only), then the weights and biases of two layers."""
    inputs = size if kind == "pointwise" else 3 * size
    latents = [(codewords, size)] if kind == "pointwise" else []
    return [*latents, (hidden, inputs), (hidden,), (size, hidden), (size,)]


def decoder_bytes(kind: str, size: int, codewords: int, hidden: int, bits: int) -> int:
    """Bytes of a stored decoder: its weights on ``bits`` bits and one float32 step per tensor."""
    shapes = decoder_shapes(kind, size, codewords, hidden)
    return 4 * len(shapes) + packed_bytes(sum(torch.Size(shape).numel() for shape in shapes), bits)


def apply_decoder(x: Tensor, base: Tensor, tensors: list[Tensor]) -> Tensor:
    """``base + W2 gelu(W1 x + b1) + b2`` over the last dimension."""
    w1, b1, w2, b2 = tensors
    hidden = torch.nn.functional.gelu(nn.functional.linear(x, w1, b1))
    return base + nn.functional.linear(hidden, w2, b2)


def tabulate(tensors: list[Tensor]) -> Tensor:
    """The codeword table ``[K, d]`` of a pointwise decoder: its latents through the MLP."""
    latents, *layers = tensors
    return apply_decoder(latents, latents, layers)


def decode_context(values: Tensor, layers: list[Tensor], size: int) -> Tensor:
    """Codewords ``[rows, n, d]`` corrected by their neighbours in the row; beyond the ends they count as zero."""
    padded = nn.functional.pad(values, (0, 0, 1, 1))
    return apply_decoder(padded.unfold(1, 3, 1).transpose(-1, -2).flatten(-2), values, layers)


def store(tensors: list[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Tensors on ``bits`` bits each: packed codes as one stream, and one float32 step per tensor."""
    steps = torch.stack([_step(tensor, bits) for tensor in tensors])
    top = 2 ** (bits - 1)
    codes = [
        ((tensor / step).round().clamp(-top, top - 1) + top).to(torch.uint8).flatten()
        for tensor, step in zip(tensors, steps, strict=True)
    ]
    return pack(torch.cat(codes), bits), steps


def restore(packed: Tensor, steps: Tensor, shapes: list[tuple[int, ...]], bits: int) -> list[Tensor]:
    """What `store` was given, rounded to its grid."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    codes = unpack(packed, bits, sum(sizes)).float() - 2 ** (bits - 1)
    parts = codes.split(sizes)
    return [part.view(shape) * step for part, shape, step in zip(parts, shapes, steps, strict=True)]


def fit_pointwise(table: Tensor, counts: Tensor, bits: int, seed: int, steps: int = 300) -> list[Tensor]:
    """Latents and layers on the ``bits``-bit grid whose table is near ``table`` ``[K, d]`` weighted by ``counts``."""
    shapes = decoder_shapes("pointwise", table.shape[1], len(table), POINTWISE_HIDDEN)
    tensors = [table.clone(), *_initial(shapes[1:], seed)]
    weight = (counts / counts.sum())[:, None]
    return _train(tensors, lambda *parts: (weight * (tabulate(list(parts)) - table).square()).sum(), bits, steps)


def fit_context(
    values: Tensor, target: Tensor, weight: Tensor, bits: int, seed: int, steps: int = 400
) -> list[Tensor]:
    """Layers that move codewords ``[rows, n, d]`` towards ``target`` of that shape, errors weighted by ``weight``."""
    shapes = decoder_shapes("context", values.shape[-1], 0, CONTEXT_HIDDEN)
    tensors = _initial(shapes, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = weight / weight.mean()

    def loss(*layers: Tensor) -> Tensor:
        rows = torch.randint(len(values), (min(64, len(values)),), generator=generator)
        decoded = decode_context(values[rows], list(layers), values.shape[-1])
        return (weight * (decoded - target[rows]).square()).mean()

    return _train(tensors, loss, bits, steps)


def _initial(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    """A first layer at random and a second of nearly nothing, so that decoding starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    w1, b1, w2, b2 = (torch.zeros(shape) for shape in shapes)
    w1.normal_(0, w1.shape[1] ** -0.5, generator=generator)
    w2.normal_(0, 1e-3, generator=generator)
    return [w1, b1, w2, b2]


def _train(tensors: list[Tensor], loss: object, bits: int, steps: int) -> list[Tensor]:
    """Adam with a straight-through gradient to the grid and a cosine schedule; returns tensors on the grid."""
    with torch.enable_grad():
        parameters = [tensor.clone().requires_grad_() for tensor in tensors]
        optimizer = torch.optim.Adam(parameters, lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            on_grid = [p + (_round(p.detach(), bits) - p.detach()) for p in parameters]
            loss(*on_grid).backward()  # type: ignore[operator]
            optimizer.step()
            schedule.step()
    return [_round(parameter.detach(), bits) for parameter in parameters]


def _step(tensor: Tensor, bits: int) -> Tensor:
    return (tensor.abs().amax() / (2 ** (bits - 1) - 1)).clamp_min(1e-8)


def _round(tensor: Tensor, bits: int) -> Tensor:
    step = _step(tensor, bits)
    top = 2 ** (bits - 1)
    return (tensor / step).round().clamp(-top, top - 1) * step
