"""`MatrixShape`: how one matrix is stored, and exactly how many bytes that takes.

ReALLM (arXiv 2405.13155) adapts the shape of the latent to each matrix. Here a shape is a vector size, bits per code
(of a trellis: per column), rank, decoder, kind of scales and number of outliers; QLoRA's NF4, LoftQ, round-to-nearest
and plain vector quantisation are shapes too.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

from hf_ext.kernels.pack import packed_bytes
from hf_ext.kernels.trellis import MAX_WIDTH, STATE_BITS, column_bytes
from hf_ext.options import Options
from hf_ext.quant.decoder import CONTEXT_HIDDEN, POINTWISE_HIDDEN, decoder_bytes
from hf_ext.quant.outliers import index_bytes
from hf_ext.quant.trellis import even_rates

CODEBOOKS = ("kmeans", "nf4", "uniform")
DECODERS = ("identity", "pointwise", "context", "trellis")


@dataclass(frozen=True)
class MatrixShape(Options):
    """How one weight ``[out, in]`` is stored.

    Attributes:
        vector_size: columns per code (the paper's d), 1 to 8.
        code_bits: bits per code, 1 to 8; ``code_bits / vector_size`` bits per weight. Of a trellis only that ratio
            counts: it is the mean over the columns.
        rank: rank of the high-precision term, 0 for none.
        codebook: ``"kmeans"`` learns one per matrix; ``"nf4"`` and ``"uniform"`` are fixed (vector size 1).
        group_size: columns per scale; 0 gives each row one scale.
        affine: also store a zero point per scale.
        permute: store the columns in the order of their importance, which only calibration can tell.
        decoder: from latent to weight: ``"identity"``; ``"pointwise"``, a residual MLP on each codeword, tabulated
            once; ``"context"``, a residual MLP on a codeword and its two neighbours, decoded once; ``"trellis"``, a
            computed table that the bits of several neighbours look up together.
        decoder_bits: bits per decoder weight (the paper's b_phi), 2 to 8.
        low_rank_bits: 32, 16 (float16) or 8 (int8) bits per element of the high-precision term.
        scale_bits: 16 or 32 bits per scale and zero point.
        state_bits: bits that a value of a trellis depends on, 8 to 14.
        rates: columns of a trellis with 1, 2, ... 6 bits a weight; the solver fills it in.
        outliers: weights kept apart from the codes (`hf_ext.quant.outliers`); the solver fills it in.
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
    state_bits: int = 12
    rates: tuple[int, ...] = ()
    outliers: int = 0

    def __post_init__(self) -> None:
        _check_range("vector_size", self.vector_size, 1, 8)
        _check_range("code_bits", self.code_bits, 1, 24 if self.decoder == "trellis" else 8)
        _check_range("rank", self.rank, 0, 2**15)
        _check_range("group_size", self.group_size, 0, 2**20)
        _check_range("outliers", self.outliers, 0, 2**31 - 1)
        _check_range("decoder_bits", self.decoder_bits, 2, 8)
        _check_range("state_bits", self.state_bits, STATE_BITS[0], STATE_BITS[-1])
        _check_choice("codebook", self.codebook, CODEBOOKS)
        _check_choice("decoder", self.decoder, DECODERS)
        _check_choice("low_rank_bits", self.low_rank_bits, (8, 16, 32))
        _check_choice("scale_bits", self.scale_bits, (16, 32))
        if self.codebook != "kmeans" and (self.vector_size != 1 or self.decoder != "identity"):
            raise ValueError(f"codebook={self.codebook!r} needs vector_size=1 and decoder='identity', got {self}.")
        if self.codebook == "nf4" and self.code_bits != 4:
            raise ValueError(f"codebook='nf4' has 16 values and needs code_bits=4, got {self.code_bits}.")
        object.__setattr__(self, "rates", tuple(self.rates))  # JSON has lists
        if self.decoder == "trellis":
            self._check_trellis()
        elif self.rates:
            raise ValueError(f"rates belong to decoder='trellis', got {self.decoder!r}.")
        if self.group_size % self.vector_size:
            raise ValueError(
                f"group_size must be a multiple of vector_size ({self.vector_size}), got {self.group_size}."
            )

    def _check_trellis(self) -> None:
        if self.group_size or self.affine:
            raise ValueError("decoder='trellis' has one scale a row; it needs group_size=0 and affine=False.")
        if not 1 <= self.bits <= MAX_WIDTH:
            raise ValueError(f"decoder='trellis' takes 1 to {MAX_WIDTH} bits per weight, got {self.bits:g}.")
        if self.rates and (len(self.rates) != MAX_WIDTH or any(not isinstance(n, int) or n < 0 for n in self.rates)):
            raise ValueError(f"rates must be {MAX_WIDTH} counts of columns, at least 0, got {list(self.rates)}.")

    @property
    def bits(self) -> float:
        """Bits of code per weight."""
        if self.rates:
            return sum(width * count for width, count in enumerate(self.rates, 1)) / sum(self.rates)
        return self.code_bits / self.vector_size

    def column_rates(self, in_features: int) -> tuple[int, ...]:
        """Columns of each width of a trellis: as solved, else as even as can be."""
        if self.rates and sum(self.rates) != in_features:
            raise ValueError(f"This shape has rates of {sum(self.rates)} columns for a matrix of {in_features}.")
        return self.rates or even_rates(self.bits, in_features)

    def packed_size(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Sizes of the packed codes: rows of bytes, or the one stream of a trellis."""
        if self.decoder != "trellis":
            return out_features, packed_bytes(ceil(in_features / self.vector_size), self.code_bits)
        rates = self.column_rates(in_features)
        return (sum(count * column_bytes(out_features, width) for width, count in enumerate(rates, 1)),)

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
            "codes": prod(self.packed_size(out_features, in_features)),
            "codebook": 0 if self.decoder in ("pointwise", "trellis") else codewords * size * (2 if learned else 4),
            "scales": groups * self.scale_bits // 8 * (2 if self.affine else 1),
            "permutation": index_bytes(in_features) * in_features if self.permute else 0,
            "decoder": 0
            if self.decoder in ("identity", "trellis")
            else decoder_bytes(self.decoder, size, codewords, hidden, self.decoder_bits),
            "low_rank": self.rank * (out_features + in_features) * self.low_rank_bits // 8,
            "outliers": self.outliers * (2 * index_bytes(max(out_features, in_features)) + 2),
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


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}.")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
