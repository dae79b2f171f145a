from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_ext.quant.codebook import fixed_codebook, kmeans, nearest


def sample(n=500, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.rand(n, d, generator=g)


def test_nearest_equals_brute_force():
    vectors, weights = sample()
    table = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    codes, error = nearest(vectors, weights, table)
    gaps = (vectors[:, None].numpy() - table.numpy()) ** 2
    cost = (gaps.astype(np.float64) * weights[:, None].numpy()).sum(-1)
    np.testing.assert_array_equal(codes.numpy(), cost.argmin(1))
    np.testing.assert_allclose(error.numpy(), cost.min(1), atol=1e-5)


def test_one_iteration_moves_codewords_to_their_weighted_means():
    vectors, weights = sample(64)
    start = vectors[:4].clone()
    codes, _ = nearest(vectors, weights, start)
    table = kmeans(vectors, weights, 4, 0, 1, start)
    for k in range(4):
        mine = codes == k
        expected = (weights[mine] * vectors[mine]).sum(0) / weights[mine].sum(0)
        torch.testing.assert_close(table[k], expected)


def test_the_error_never_rises_and_the_seed_decides():
    vectors, weights = sample(2000, 4)
    errors = [float(nearest(vectors, weights, kmeans(vectors, weights, 16, 3, n))[1].sum()) for n in range(1, 9)]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))
    assert torch.equal(kmeans(vectors, weights, 16, 3, 5), kmeans(vectors, weights, 16, 3, 5))


def test_a_codeword_without_vectors_moves_to_the_worst_served():
    vectors = torch.tensor([[0.0], [0.1], [5.0]])
    table = kmeans(vectors, torch.ones(3, 1), 2, 0, 2, torch.tensor([[0.0], [-99.0]]))
    assert sorted(table[:, 0].tolist()) == pytest.approx([0.05, 5.0])


def test_heavier_coordinates_are_served_better():
    vectors, _ = sample(3000)
    weights = torch.tensor([[9.0, 1.0]]).expand_as(vectors)
    table = kmeans(vectors, weights, 16, 0, 15)
    gap = (vectors - table[nearest(vectors, weights, table)[0]]).square().mean(0)
    assert gap[0] < gap[1] / 2


def test_fewer_vectors_than_codewords():
    vectors, weights = sample(3)
    table = kmeans(vectors, weights, 8, 0, 4)
    assert float(nearest(vectors, weights, table)[1].max()) < 1e-6


def test_fixed_codebooks():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    levels = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(fixed_codebook("nf4", 4)[:, 0], levels)
    assert fixed_codebook("uniform", 2)[:, 0].tolist() == [0, 1, 2, 3]
