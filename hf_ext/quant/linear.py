"""`ReALLMLinear`: an ``nn.Linear`` whose weight is kept in a few bits (ReALLM, arXiv 2405.13155)."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_ext.kernels.codebook import CodebookWeight, codebook_linear
from hf_ext.kernels.decoded_linear import LOW_RANK, add_sparse_product, low_rank_product
from hf_ext.kernels.trellis import TrellisWeight, column_slices, trellis_linear
from hf_ext.quant.container import Parts, codebook_weight, dense, dense_quantized, empty_parts, trellis_weight
from hf_ext.quant.low_rank import restore_low_rank, store_low_rank
from hf_ext.quant.outliers import LARGEST
from hf_ext.quant.shape import MatrixShape

DECODE_MODES = ("on_the_fly", "once", "low_memory")
LOW_MEMORY_ROWS = 256  # rows of the weight, or columns of a trellis, that the low-memory mode decodes at a time


class ReALLMLinear(nn.Linear):
    """A linear layer whose weight is decoded from packed codes, plus a few outliers and a low-rank term.

    The parts are buffers under the names of `hf_ext.quant.container`; only a bias is a parameter. They keep their
    types when the model is cast, so that what is saved does not depend on the precision it ran in.

    Attributes:
        shape: how the weight is stored.
        decode_mode: ``"on_the_fly"`` decodes for every call; ``"once"`` keeps the dense weight, as large and as fast
            as an unquantised layer; ``"low_memory"`` decodes 256 rows at a time.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: MatrixShape,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.shape = in_features, out_features, shape
        self._decode_mode = "once" if shape.decoder == "context" else "on_the_fly"
        self._kernel: CodebookWeight | TrellisWeight | None = None
        self._dense: Tensor | None = None
        self._is_hf_initialized = True  # the host must not draw random weights for it
        for name, part in empty_parts(shape, out_features, in_features, device).items():
            self.register_buffer(name, part)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_parts(cls, parts: Parts, shape: MatrixShape, in_features: int, bias: Tensor | None = None) -> Self:
        """A layer around parts that the solver made; ``bias`` is taken over as it is.

        Raises:
            ValueError: the parts are not those of ``shape``.
        """
        layer = cls(in_features, len(parts["scales"]), shape, device="meta")
        if layer._buffers.keys() != parts.keys():
            raise ValueError(f"{shape} is stored in {', '.join(layer._buffers)}, got {', '.join(parts)}.")
        for name, part in parts.items():
            layer._buffers[name] = part
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def parts(self) -> Parts:
        """The stored tensors by name."""
        return {name: part for name, part in self._buffers.items() if part is not None}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight ``[out, in]``, all terms included: computed when asked for, and not a parameter."""
        return dense(self.parts, self.shape, self.in_features, self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of `weight` and of new adapters: that of the bias, else torch's default."""
        return torch.get_default_dtype() if self.bias is None else self.bias.dtype

    @property
    def decode_mode(self) -> str:
        """When codes become weights; see the class."""
        return self._decode_mode

    @decode_mode.setter
    def decode_mode(self, mode: str) -> None:
        if mode not in DECODE_MODES:
            raise ValueError(f"decode_mode must be one of {', '.join(DECODE_MODES)}, got {mode!r}.")
        if self.shape.decoder == "context" and mode != "once":
            raise ValueError(f"A context decoder only decodes once, got decode_mode={mode!r}.")
        self._decode_mode = mode
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in]`` to ``[..., out]``, in the type of ``x``."""
        if self._decode_mode == "on_the_fly":
            return _linear(x, self.kernel(), self.bias)
        once = self._decode_mode == "once"
        y = nn.functional.linear(x, self._decoded(x.dtype)) if once else self._in_slices(x)
        whole = self.kernel()
        if whole.lr_a is not None and whole.lr_b is not None:
            y = y + low_rank_product(x, whole.lr_a, whole.lr_b, whole.lr_scale)
        y = y if once else add_sparse_product(y, x, whole)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def kernel(self) -> CodebookWeight | TrellisWeight:
        """The parts as the kernels take them, prepared once."""
        if self._kernel is None or self._kernel.qweight is not self.qweight:
            if self.shape.decoder == "trellis":
                self._kernel = trellis_weight(self.parts, self.shape, self.in_features)
            else:
                self._kernel = codebook_weight(self.parts, self.shape, self.in_features)
        return self._kernel

    def scale_rows(self, gain: Tensor) -> None:
        """Multiply every row of the weight, low-rank term aside, by its entry of ``gain`` ``[out]``.

        Scales and outliers are rounded to their stored type.
        """
        for name in ("scales", "zeros"):
            if name in self.parts:
                part = self.get_buffer(name)
                self._buffers[name] = (part.float() * gain.float()[:, None]).to(part.dtype)
        if "sparse_values" in self.parts:
            part, rows = self.get_buffer("sparse_values"), self.get_buffer("sparse_rows").long()
            scaled = (part.float() * gain.float()[rows]).clamp(-LARGEST, LARGEST)
            self._buffers["sparse_values"] = scaled.to(part.dtype)
        self._forget()

    def set_low_rank(self, lr_a: Tensor | None, lr_b: Tensor | None, bits: int = 32) -> None:
        """Replace the low-rank term by ``lr_b @ lr_a``, stored on ``bits`` bits an element; None drops it."""
        stored: Parts = {}
        if lr_a is not None and lr_b is not None and len(lr_a):
            stored = store_low_rank(lr_a.detach().float(), lr_b.detach().float(), bits)
        self.set_low_rank_parts(stored, bits)

    def set_low_rank_parts(self, stored: Parts, bits: int) -> None:
        """Replace the low-rank term by stored tensors, such as `low_rank_parts` gave earlier."""
        for name in LOW_RANK:
            self._buffers.pop(name, None)
        for name, part in stored.items():
            self.register_buffer(name, part)
        rank = len(stored["lr_a"]) if stored else 0
        self.shape = MatrixShape(**{**self.shape.to_dict(), "rank": rank, "low_rank_bits": bits if rank else 16})
        self._forget()

    def low_rank_parts(self) -> Parts:
        """The stored tensors of the low-rank term by name; empty without one."""
        return {name: part for name, part in self.parts.items() if name in LOW_RANK}

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The float32 factors ``(lr_a [r, in], lr_b [out, r])`` of the low-rank term, or None without one."""
        return restore_low_rank(self.parts)

    def extra_repr(self) -> str:
        """The sizes and the shape, as ``print(model)`` shows them."""
        bits = self.shape.bits_per_weight(self.out_features, self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits_per_weight={bits:.3f}, rank={self.shape.rank}"
        )

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        if self._dense is None or self._dense.dtype != dtype or self._dense.device != self.qweight.device:
            with torch.inference_mode(False), torch.no_grad():  # kept for calls that may need gradients
                self._dense = self._quantized(dtype)
        return self._dense

    def _quantized(self, dtype: torch.dtype) -> Tensor:
        return dense_quantized(self.parts, self.shape, self.in_features, dtype)

    def _in_slices(self, x: Tensor) -> Tensor:
        """``x`` times the weight of the codes alone, by groups of rows, of a trellis by groups of columns."""
        whole = self.kernel()
        if isinstance(whole, CodebookWeight):
            return torch.cat([codebook_linear(x, part) for part in self._row_slices(whole)], dim=-1)
        parts = column_slices(whole, LOW_MEMORY_ROWS)
        return torch.stack([trellis_linear(x.index_select(-1, columns), part) for columns, part in parts]).sum(0)

    def _row_slices(self, whole: CodebookWeight) -> list[CodebookWeight]:
        return [
            CodebookWeight(
                whole.qweight[at : at + LOW_MEMORY_ROWS],
                whole.table,
                whole.scales[at : at + LOW_MEMORY_ROWS],
                whole.in_features,
                whole.code_bits,
                whole.group,
                None if whole.zeros is None else whole.zeros[at : at + LOW_MEMORY_ROWS],
                whole.perm,
            )
            for at in range(0, self.out_features, LOW_MEMORY_ROWS)
        ]

    def _forget(self) -> None:
        self._kernel = self._dense = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the model, but keep the types of the stored parts when it is cast."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, part in before.items():
            moved = self._buffers[name]
            if part is not None and moved is not None and moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out what is computed from the parts."""
        return {**self.__dict__, "_kernel": None, "_dense": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()


def _linear(x: Tensor, weight: CodebookWeight | TrellisWeight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, TrellisWeight):
        return trellis_linear(x, weight, bias)
    return codebook_linear(x, weight, bias)


def quantized_layers(model: nn.Module) -> dict[str, ReALLMLinear]:
    """Every `ReALLMLinear` of a model by name, adapters looked through."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ReALLMLinear)}


def set_decode_mode(model: nn.Module, mode: str) -> None:
    """Set `ReALLMLinear.decode_mode` on every layer of a model; layers with a context decoder stay decoded.

    Raises:
        ValueError: ``mode`` does not exist, or the model has no such layer.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no ReALLM layers whose decode mode could be set.")
    for layer in layers.values():
        if layer.shape.decoder != "context" or mode not in DECODE_MODES:
            layer.decode_mode = mode
