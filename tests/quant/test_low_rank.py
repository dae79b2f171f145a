import pytest
import torch

from hf_ext.quant.low_rank import restore_low_rank, store_low_rank, whitened_low_rank


def problem(out, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=g) * torch.linspace(0.2, 3, columns)
    return torch.randn(out, columns, generator=g), x.T @ x / 300, torch.rand(out, generator=g) + 0.1


@pytest.mark.parametrize("out, columns", [(12, 20), (30, 11), (9, 9)])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_hessian", [False, True])
def test_it_is_the_truncated_svd_of_the_whitened_residual(out, columns, with_rows, with_hessian):
    residual, hessian, rows = problem(out, columns)
    hessian, rows = hessian if with_hessian else None, rows if with_rows else None
    lr_a, lr_b = whitened_low_rank(residual, hessian, rows, 3)
    values, vectors = torch.linalg.eigh((torch.eye(columns) if hessian is None else hessian).double())
    root = vectors @ values.sqrt().diag() @ vectors.T
    left = (torch.ones(out) if rows is None else rows).double().sqrt()
    u, s, v = torch.linalg.svd(left[:, None] * residual.double() @ root)
    best = (u[:, :3] * s[:3] @ v[:3]) @ root.inverse() / left[:, None]
    torch.testing.assert_close((lr_b @ lr_a).double(), best, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(lr_a.norm(dim=1), lr_b.norm(dim=0), rtol=1e-3, atol=1e-4)


def test_the_same_residual_gives_the_same_signs():
    residual, hessian, _ = problem(10, 10)
    first, second = (
        whitened_low_rank(residual, hessian, None, 2),
        whitened_low_rank(residual.clone(), hessian, None, 2),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bits, tolerance", [(8, 2e-2), (16, 1e-3), (32, 0.0)])
def test_stored_factors_come_back(bits, tolerance):
    lr_a, lr_b = torch.randn(3, 20), torch.randn(8, 3)
    lr_a *= 100  # however the product is shared between the factors, they come back about alike
    back = restore_low_rank(store_low_rank(lr_a, lr_b, bits))
    assert bits != 8 or 0.3 < back[0].abs().max() / back[1].abs().max() < 3
    gap = (back[1] @ back[0] - lr_b @ lr_a).abs().max() / (lr_b @ lr_a).abs().max()
    assert gap <= tolerance
    assert restore_low_rank({}) is None
