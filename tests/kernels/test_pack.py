import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.kernels.pack import pack, packed_bytes, unpack


def oracle(codes: np.ndarray, bits: int) -> np.ndarray:
    """The same bytes through NumPy's own bit functions, one row at a time."""
    table = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(table.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), n=st.integers(0, 75), rows=st.integers(0, 3), seed=st.integers(0, 2**20))
def test_bytes_equal_the_oracle_and_come_back(bits, n, rows, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (rows, 2, n)).astype(np.uint8))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, 2, packed_bytes(n, bits))
    np.testing.assert_array_equal(packed.numpy(), oracle(codes.numpy(), bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_integer_type_gives_the_same_bytes(bits, dtype):
    codes = torch.arange(37) * 11 % 2**bits
    assert torch.equal(pack(codes.to(dtype), bits), pack(codes, bits))


def test_known_bytes():
    assert pack(torch.tensor([1, 2, 3, 4, 5]), 3).tolist() == [0b11010001, 0b01011000]
    assert unpack(torch.tensor([0b11010001, 0b01011000], dtype=torch.uint8), 3, 5).tolist() == [1, 2, 3, 4, 5]


def test_a_code_out_of_range_leaves_its_neighbours_alone():
    assert unpack(pack(torch.tensor([1, 9, 2]), 3), 3, 3).tolist() == [1, 1, 2]


def test_a_strided_view_packs_like_its_copy():
    codes = torch.arange(64).view(8, 8).t() % 8
    assert torch.equal(pack(codes, 3), pack(codes.contiguous(), 3))


def test_packing_gives_new_memory():
    codes = torch.arange(4, dtype=torch.uint8)
    unpack(codes, 8, 4)[0] = 9
    pack(codes, 8)[1] = 9
    assert codes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_outside_1_to_8_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be a whole number from 1 to 8"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)


def test_wrong_tensors_are_refused():
    with pytest.raises(ValueError, match="integer tensor"):
        pack(torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"packed must be uint8 \[..., 2\] for 5 codes of 3 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
