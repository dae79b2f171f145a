import pytest
import torch

from hf_ext.quant.container import empty_parts
from hf_ext.quant.shape import MatrixShape

SHAPES = [
    MatrixShape(4, 8, rank=8, permute=True),
    MatrixShape(2, 6, rank=3, low_rank_bits=8),
    MatrixShape(2, 5, rank=3, low_rank_bits=32),
    MatrixShape(1, 4, codebook="nf4", group_size=64, scale_bits=32),
    MatrixShape(1, 3, codebook="uniform", group_size=64, affine=True),
    MatrixShape(4, 8, decoder="pointwise", decoder_bits=6),
    MatrixShape(3, 7, decoder="context", decoder_bits=8, permute=True),
    MatrixShape(2, 6, decoder="trellis", outliers=5),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out, columns", [(192, 576), (37, 41), (1, 1)])
def test_bytes_are_those_of_the_tensors(shape, out, columns):
    shape = MatrixShape(**{**shape.to_dict(), "rank": min(shape.rank, out, columns)})
    parts = empty_parts(shape, out, columns, "cpu")
    stored = sum(part.numel() * part.element_size() for part in parts.values())
    assert sum(shape.nbytes(out, columns).values()) == stored
    assert shape.bits_per_weight(out, columns) == 8 * stored / (out * columns)


def test_a_wide_matrix_has_wider_indices():
    for out, columns in ((1, 2**15 + 1), (2**15 + 1, 1)):
        shape = MatrixShape(outliers=3)
        assert empty_parts(shape, out, columns, "meta")["sparse_rows"].dtype == torch.int32
        assert shape.nbytes(out, columns)["outliers"] == 30
    assert empty_parts(MatrixShape(permute=True), 1, 2**15, "meta")["perm"].dtype == torch.int16
    assert empty_parts(MatrixShape(permute=True), 1, 2**15 + 1, "meta")["perm"].dtype == torch.int32


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"code_bits": 9}, "code_bits must be a whole number from 1 to 8, got 9"),
        ({"vector_size": 0}, "vector_size must be a whole number from 1 to 8"),
        ({"rank": -1}, "rank must be"),
        ({"outliers": -1}, "outliers must be a whole number from 0"),
        ({"codebook": "lattice"}, "codebook must be one of kmeans, nf4, uniform, got 'lattice'"),
        ({"decoder": "hnerv"}, "decoder must be one of identity, pointwise, context"),
        ({"codebook": "nf4"}, "needs vector_size=1"),
        ({"codebook": "nf4", "vector_size": 1, "code_bits": 3}, "needs code_bits=4, got 3"),
        ({"vector_size": 3, "group_size": 64}, "group_size must be a multiple of vector_size"),
        ({"low_rank_bits": 4}, "low_rank_bits must be one of 8, 16, 32"),
        ({"scale_bits": 8}, "scale_bits must be one of 16, 32"),
        ({"decoder_bits": 1}, "decoder_bits must be"),
    ],
)
def test_what_is_out_of_range_is_said(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        MatrixShape(**options)
