"""DecoQuant's decomposition of keys or values into a large matrix of codes and a small one (arXiv 2405.12591).

A block ``x`` ``[H, N, D]`` (one sequence) is factored as ``x = mean + scale * (codes - zero) @ synthesis``. The
large factor is stored in few bits; ``synthesis`` stays in float16 and does not grow with ``N``, so attention can fold
it into the query and the output (`kernels.packed_attention`). Two ways to choose it:

- `fit_uniform`, the released method: rows of ``group`` neighbouring channels, SVD with ``T_L = U S^1/2`` and
  ``T_S = S^1/2 V^T``, codes of equal width, symmetric, one float16 scale per token. The SVD is that of the small Gram
  matrix, which gives the same V and S.
- `fit_allocated`, ours: the mean is taken out, one basis spans a whole head, and each coefficient gets the number of
  bits (0 to 8) that lowers the total error most. With the metric of the queries (``E[q q^T]``) keys are measured by
  the error they cause in the scores. One scale of 8 bits per token and head, chosen for least error.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_ext.kernels.native import load_native
from hf_ext.kernels.row_codes import GAUSSIAN_STEP, MAX_WIDTH, allocate_widths, pack_rows, unpack_rows

UNIT_SCALE = 160  # the 8-bit scale that stands for 1; each step is a sixteenth of an octave
TRIES = (0, -8, -5, -3, 2, 4, 7, 10, 13, 16)  # scales tried around the root mean square, in sixteenths of an octave
RIDGE = 1e-2  # added to the metric, relative to its mean diagonal: directions no query ever had still count a little


@dataclass(frozen=True)
class RowFormat:
    """How rows of codes turn into keys or values of one sequence.

    Attributes:
        widths: bits of each coefficient, uint8 ``[D]``.
        synthesis: ``[g, g]`` float16; block-diagonal over the ``D / g`` groups of a head.
        mean: ``[H, D]`` float16.
        weight: what a squared error in each coefficient counts, float16 ``[D]``; 0 where no bits are stored.
        row_bytes: bytes of a row of codes.
        midrise: codes stand for the middles of their cells (`fit_allocated`), not for whole steps (`fit_uniform`).
    """

    widths: Tensor
    synthesis: Tensor
    mean: Tensor
    weight: Tensor
    row_bytes: int
    midrise: bool

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored beside the rows."""
        return {name: getattr(self, name) for name in ("widths", "synthesis", "mean", "weight")}

    def zero(self) -> Tensor:
        """The code that reads as 0, for each coefficient; float32 ``[D]``."""
        half = torch.where(self.widths > 0, 2.0 ** (self.widths.float() - 1), torch.zeros_like(self.widths.float()))
        return torch.where(self.widths > 0, half - 0.5, half) if self.midrise else half


def scale_table(device: torch.device | None = None) -> Tensor:
    """The scales that the 256 eight-bit exponents stand for, float32."""
    return torch.exp2((torch.arange(256, device=device, dtype=torch.float64) - UNIT_SCALE) / 16).float()


def fit_uniform(x: Tensor, bits: int, group: int = 16) -> RowFormat:
    """The released decomposition of ``x`` ``[H, N, D]``.

    Raises:
        ValueError: ``group`` does not divide ``D``, or ``x`` has values that are not finite.
    """
    heads, _, d = x.shape
    if d % group:
        raise ValueError(f"group must divide the head dimension {d}, got {group}.")
    _check_finite(x)
    rows = x.double().unflatten(-1, (-1, group)).flatten(0, -2)
    squares, basis = torch.linalg.eigh(rows.T @ rows)
    # A direction that the block does not have gets a singular value of nearly 0, not 0, so that it has an inverse.
    root = squares.clamp_min(squares[-1].item() * 1e-8 + 1e-12).sqrt().sqrt()
    synthesis = root[:, None] * basis.T
    # The float16 range is used from the top: the scales of the tokens take up the factor.
    synthesis = synthesis / synthesis.abs().max()
    return RowFormat(
        widths=torch.full((d,), bits, dtype=torch.uint8, device=x.device),
        synthesis=synthesis.half(),
        mean=torch.zeros(heads, d, dtype=torch.float16, device=x.device),
        weight=torch.ones(d, dtype=torch.float16, device=x.device),
        row_bytes=d * bits // 8,
        midrise=False,
    )


def fit_allocated(x: Tensor, row_bytes: int, metric: Tensor | None = None) -> RowFormat:
    """A basis and an allocation of ``8 * row_bytes`` bits a row for ``x`` ``[H, N, D]``.

    Args:
        x: the block to learn from; later tokens of the sequence are encoded with the same format.
        row_bytes: bytes of codes per token and head.
        metric: ``[D, D]`` symmetric and non-negative, e.g. the queries' second moment for keys; None for the plain
            squared error.

    Raises:
        ValueError: ``x`` has values that are not finite, or more than 8 bits a coefficient are asked for.
    """
    _check_finite(x)
    d = x.shape[-1]
    mean = x.double().mean(1).half()
    rows = (x.double() - mean[:, None].double()).flatten(0, 1)
    root, inverse_root = _roots(metric, d, rows)
    rows = rows @ root
    gram = rows.T @ rows
    # Directions that the block does not have are put in one order, so that the last bit of a sum cannot turn them.
    ramp = torch.linspace(1.0, 2.0, d, dtype=torch.float64, device=x.device)
    _, basis = torch.linalg.eigh(gram + torch.diag(ramp * (gram.diagonal().mean() * 1e-6 + 1e-30)))
    coefficients = rows @ basis
    scale = coefficients.square().sum(-1, keepdim=True).div(coefficients.square().sum() / len(rows) + 1e-30).sqrt()
    variance = (coefficients / scale.clamp_min(1e-3)).square().mean(0)
    widths = allocate_widths(variance, min(8 * row_bytes, MAX_WIDTH * d))
    # A coefficient that hardly varied, or is not stored, has a step all the same: the synthesis has an exact inverse.
    deviation = variance.sqrt().clamp_min(variance.max().sqrt().item() * 1e-3 + 1e-6)
    deviation = torch.where(widths > 0, deviation, deviation.max())
    step = torch.tensor(GAUSSIAN_STEP, dtype=torch.float64, device=x.device)[widths] * deviation
    synthesis = (step[:, None] * basis.T) @ inverse_root
    return RowFormat(
        widths=widths.to(torch.uint8),
        synthesis=synthesis.half(),
        mean=mean,
        weight=torch.where(widths > 0, (step / step.max()).square().clamp_min(1e-6), 0.0).half(),
        row_bytes=row_bytes,
        midrise=True,
    )


def encode(x: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    """Codes ``[H, N, row_bytes]`` uint8 and scales of ``x`` ``[H, N, D]``.

    Scales are uint8 exponents ``[H, N]`` for `fit_allocated`, float16 ``[1, N]`` for `fit_uniform`.

    Raises:
        ValueError: ``x`` has values that are not finite.
    """
    _check_finite(x)
    coefficients = analyse(x, row_format)
    if not row_format.midrise:
        return _encode_uniform(coefficients, row_format)
    native = load_native("decoquant_cpu") if _fits_native(coefficients, row_format) else None
    if native is None:
        return _encode_allocated(coefficients, row_format)
    return _encode_native(native, coefficients, row_format)


def decode(codes: Tensor, scales: Tensor, row_format: RowFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """The keys or values ``[H, N, D]`` that codes and scales stand for."""
    synthesis, mean = row_format.synthesis.to(dtype), row_format.mean.to(dtype)
    group = synthesis.shape[-1]
    factors = decode_scales(scales).to(dtype).expand(codes.shape[:-1])
    if dtype == torch.float32 and _fits_native(codes, row_format) and load_native("decoquant_cpu") is not None:
        scaled = _decode_native(load_native("decoquant_cpu"), codes, factors, row_format)
    else:
        unpacked = unpack_rows(codes[None], row_format.widths.long()[None])[0].to(dtype)
        scaled = (unpacked - row_format.zero().to(dtype)) * factors[..., None]
    return (scaled.unflatten(-1, (-1, group)) @ synthesis).flatten(-2) + mean[:, None]


def analyse(x: Tensor, row_format: RowFormat) -> Tensor:
    """The unquantised large factor ``[H, N, D]``: coefficients in steps, at scale 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    inverse = torch.linalg.inv(row_format.synthesis.double()).to(dtype)
    centred = x.to(dtype) - row_format.mean.to(dtype)[:, None]
    return (centred.unflatten(-1, (-1, inverse.shape[-1])) @ inverse).flatten(-2)


def decode_scales(scales: Tensor) -> Tensor:
    """Scales as float32, whatever way they are stored."""
    return scale_table(scales.device)[scales.long()] if scales.dtype == torch.uint8 else scales.float()


def on_device(row_format: RowFormat, device: torch.device) -> RowFormat:
    """The same format with its tensors on ``device``."""
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in row_format.tensors().items()}
    return replace(row_format, **moved)


def _encode_uniform(coefficients: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    top = 2.0 ** (int(row_format.widths[0]) - 1) - 1
    # Rounded up, so that the largest coefficient still fits; a zero token keeps a scale that is not zero.
    largest = coefficients.abs().amax((0, 2)) / top
    scales = (largest * (1 + 2**-10)).clamp(1e-7, 65504.0).half()
    codes = (coefficients / scales.to(coefficients.dtype)[None, :, None]).round().clamp(-top, top) + (top + 1)
    return pack_rows(codes.long()[None], row_format.widths.long()[None], row_format.row_bytes)[0], scales[None]


def _encode_allocated(coefficients: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    """The definition of what `_encode_native` does faster."""
    weight, half = row_format.weight.to(coefficients.dtype), row_format.widths.to(coefficients.dtype)
    middle = torch.where(half > 0, 2.0 ** (half - 1), torch.zeros_like(half))
    top = 2.0**half - 1
    zero = torch.where(half > 0, middle - 0.5, middle)
    size = (weight * coefficients.square()).sum(-1).clamp_min(1e-30) / _energy(row_format)
    centre = torch.round(8 * torch.log2(size)).long() + UNIT_SCALE
    table = scale_table(coefficients.device).to(coefficients.dtype)
    best = None
    for shift in TRIES:
        exponent = (centre + shift).clamp(0, 255)
        scale = table[exponent][..., None]
        codes = ((coefficients / scale).floor() + middle).clamp_min(0).minimum(top)
        error = (weight * (coefficients - scale * (codes - zero)).square()).sum(-1)
        if best is None:
            best = (error, codes, exponent)
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better[..., None], codes, best[1]),
                torch.where(better, exponent, best[2]),
            )
    assert best is not None
    packed = pack_rows(best[1].long()[None], row_format.widths.long()[None], row_format.row_bytes)[0]
    return packed, best[2].to(torch.uint8)


def _energy(row_format: RowFormat) -> float:
    """What ``sum(weight * coefficient ** 2)`` is on average where the format was fitted."""
    steps = torch.tensor(GAUSSIAN_STEP, device=row_format.widths.device)[row_format.widths.long()]
    return float((row_format.weight.float() / steps.square()).sum())


def _encode_native(native: object, coefficients: Tensor, row_format: RowFormat) -> tuple[Tensor, Tensor]:
    from ctypes import c_float, c_int64

    heads, n, d = coefficients.shape
    x = coefficients.contiguous()
    codes = torch.empty(heads, n, row_format.row_bytes, dtype=torch.uint8)
    scales = torch.empty(heads, n, dtype=torch.uint8)
    widths, weight, table = row_format.widths.contiguous(), row_format.weight.float(), scale_table()
    tries = torch.tensor(TRIES)
    native.hf_ext_encode(  # type: ignore[attr-defined]
        _at(x), c_int64(heads * n), c_int64(d), _at(widths), _at(weight), c_float(_energy(row_format)), _at(table),
        _at(tries), c_int64(len(TRIES)), c_int64(UNIT_SCALE), c_int64(row_format.row_bytes), _at(codes), _at(scales),
        c_int64(torch.get_num_threads()),
    )  # fmt: skip
    return codes, scales


def _decode_native(native: object, codes: Tensor, factors: Tensor, row_format: RowFormat) -> Tensor:
    from ctypes import c_int64

    codes, factors, widths = codes.contiguous(), factors.contiguous(), row_format.widths.contiguous()
    d = len(widths)
    out = torch.empty(*codes.shape[:-1], d)
    native.hf_ext_decode(  # type: ignore[attr-defined]
        _at(codes), _at(factors), c_int64(factors.numel()), c_int64(d), _at(widths), c_int64(row_format.row_bytes),
        c_int64(int(row_format.midrise)), _at(out), c_int64(torch.get_num_threads()),
    )  # fmt: skip
    return out


def _at(tensor: Tensor) -> object:
    from ctypes import c_void_p

    return c_void_p(tensor.data_ptr())


def _fits_native(x: Tensor, row_format: RowFormat) -> bool:
    d = len(row_format.widths)
    return x.is_cpu and x.dtype != torch.float64 and d % 16 == 0 and d <= 128 and 2 <= row_format.row_bytes <= 128


def _roots(metric: Tensor | None, d: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of the metric and its inverse, both ``[d, d]`` float64."""
    identity = torch.eye(d, dtype=torch.float64, device=like.device)
    if metric is None:
        return identity, identity
    metric = metric.double() / (metric.double().diagonal().mean() + 1e-30)
    squares, vectors = torch.linalg.eigh(metric + RIDGE * identity)
    root = squares.clamp_min(RIDGE / 2).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _check_finite(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError("keys or values that are NaN or infinite cannot be quantised.")
