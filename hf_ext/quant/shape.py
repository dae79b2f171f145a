"""`MatrixShape`: how one matrix is stored, and exactly how many bytes that takes.

ReALLM (arXiv 2405.13155) adapts the shape of the latent to each matrix. Here a shape is a vector size, bits per code,
rank, decoder and kind of scales; QLoRA's NF4, LoftQ, round-to-nearest and plain vector quantisation are shapes too.
"""

from dataclasses import dataclass, replace
from math import ceil

from hf_ext.kernels.pack import packed_bytes
from hf_ext.options import Options
from hf_ext.quant.decoder import CONTEXT_HIDDEN, POINTWISE_HIDDEN, decoder_bytes

CODEBOOKS = ("kmeans", "nf4", "uniform")
DECODERS = ("identity", "pointwise", "context")


@dataclass(frozen=True)
class MatrixShape(Options):
    """How one weight ``[out, in]`` is stored.

    Attributes:
        vector_size: columns per code (the paper's d), 1 to 8.
        code_bits: bits per code, 1 to 8; ``code_bits / vector_size`` bits per weight.
        rank: rank of the high-precision term, 0 for none.
        codebook: ``"kmeans"`` learns one per matrix; ``"nf4"`` and ``"uniform"`` are fixed (vector size 1).
        group_size: columns per scale; 0 gives each row one scale.
        affine: also store a zero point per scale.
        permute: store the columns in the order of their importance, which only calibration can tell.
        decoder: from latent to weight: ``"identity"``; ``"pointwise"``, a residual MLP on each codeword, tabulated
            once; ``"context"``, a residual MLP on a codeword and its two neighbours, decoded once.
        decoder_bits: bits per decoder weight (the paper's b_phi), 2 to 8.
        low_rank_bits: 32, 16 (float16) or 8 (int8) bits per element of the high-precision term.
        scale_bits: 16 or 32 bits per scale and zero point.
    """

    vector_size: int = 2
    code_bits: int = 6
    rank: int = 0
    codebook: str = "kmeans"
    group_size: int = 0
    affine: bool = False
    permute: bool = False
    decoder: str = "identity"
    decoder_bits: int = 8
    low_rank_bits: int = 16
    scale_bits: int = 16

    def __post_init__(self) -> None:
        _check_range("vector_size", self.vector_size, 1, 8)
        _check_range("code_bits", self.code_bits, 1, 8)
        _check_range("rank", self.rank, 0, 2**15)
        _check_range("group_size", self.group_size, 0, 2**20)
        _check_range("decoder_bits", self.decoder_bits, 2, 8)
        _check_choice("codebook", self.codebook, CODEBOOKS)
        _check_choice("decoder", self.decoder, DECODERS)
        _check_choice("low_rank_bits", self.low_rank_bits, (8, 16, 32))
        _check_choice("scale_bits", self.scale_bits, (16, 32))
        if self.codebook != "kmeans" and (self.vector_size != 1 or self.decoder != "identity"):
            raise ValueError(f"codebook={self.codebook!r} needs vector_size=1 and decoder='identity', got {self}.")
        if self.codebook == "nf4" and self.code_bits != 4:
            raise ValueError(f"codebook='nf4' has 16 values and needs code_bits=4, got {self.code_bits}.")
        if self.group_size % self.vector_size:
            raise ValueError(
                f"group_size must be a multiple of vector_size ({self.vector_size}), got {self.group_size}."
            )

    @property
    def bits(self) -> float:
        """Bits of code per weight."""
        return self.code_bits / self.vector_size

    def groups(self, in_features: int) -> int:
        """Scales per row."""
        return ceil(in_features / self.group_size) if self.group_size else 1

    def nbytes(self, out_features: int, in_features: int) -> dict[str, int]:
        """Bytes of every stored part of a weight of this shape; their sum is what the file holds for the layer."""
        codewords, size = 2**self.code_bits, self.vector_size
        groups = out_features * self.groups(in_features)
        learned = self.codebook == "kmeans"
        hidden = POINTWISE_HIDDEN if self.decoder == "pointwise" else CONTEXT_HIDDEN
        parts = {
            "codes": out_features * packed_bytes(ceil(in_features / size), self.code_bits),
            "codebook": 0 if self.decoder == "pointwise" else codewords * size * (2 if learned else 4),
            "scales": groups * self.scale_bits // 8 * (2 if self.affine else 1),
            "permutation": index_bytes(in_features) * in_features if self.permute else 0,
            "decoder": 0
            if self.decoder == "identity"
            else decoder_bytes(self.decoder, size, codewords, hidden, self.decoder_bits),
            "low_rank": self.rank * (out_features + in_features) * self.low_rank_bits // 8,
        }
        if self.rank and self.low_rank_bits == 8:
            parts["low_rank"] += 4 * self.rank
        return parts

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """All stored bits over the number of weights."""
        return 8 * sum(self.nbytes(out_features, in_features).values()) / (out_features * in_features)

    def with_rank_for(self, out_features: int, in_features: int) -> "MatrixShape":
        """This shape with its rank cut to what the matrix can have."""
        return replace(self, rank=min(self.rank, out_features, in_features))


def index_bytes(in_features: int) -> int:
    """Bytes of one entry of a permutation of that many columns: int16 where it fits, else int32."""
    return 2 if in_features <= 2**15 else 4


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}.")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
