"""SPO and ADPO losses against float64 NumPy, hand-computed numbers, closed forms on a finite set, and their laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.trainers.losses import (
    adpo_joint_reference,
    adpo_loss,
    spo_loss,
    spo_margin_weights,
    spo_reference_coefficients,
    spo_reference_logps,
    spo_reward_coefficients,
)

BETAS = (0.7, 1.3, 0.9, 1.1)


def general_rows(rounds: int) -> list[list[float]]:
    return [[0.3 + 0.2 * i + 0.1 * n for i in range(1, n)] for n in range(2, rounds + 1)]


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]


def numpy_spo(policy, frozen, beta, weights):
    """-log sigma(beta D rho_theta - sum_j w_j D rho_j), written out from the definition; arrays [B], [n, B] pairs."""

    def diff(pair):
        return pair[0] - pair[1]

    z = beta * (diff(policy) - diff(frozen[-1]))
    for j, weight in enumerate(weights, start=1):
        z = z - weight * (diff(frozen[j]) - diff(frozen[j - 1]))
    return np.logaddexp(0.0, -z)


def test_spo_golden_numbers_and_gradient_signs():
    theta_w, theta_l, one_w, one_l, zero_w, zero_l = tensors(-10, -12, -10, -12, -11, -9)
    loss = spo_loss(theta_w, theta_l, [zero_w, one_w], [zero_l, one_l], 0.2, spo_margin_weights([0.1], [[1.0]]))
    assert loss.item() == pytest.approx(0.913015, abs=1e-6)
    loss.sum().backward()
    grads = [x.grad.item() for x in (theta_w, theta_l, one_w, one_l, zero_w, zero_l)]
    assert grads == pytest.approx([-0.119738, 0.119738, 0.179606, -0.179606, -0.059869, 0.059869], abs=1e-6)


@pytest.mark.parametrize("mode", ["chain", "recursive", "naive"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_spo_equals_numpy(mode, rounds):
    rng = np.random.default_rng(rounds)
    policy, frozen = rng.normal(-20, 5, (2, 7)), rng.normal(-20, 5, (rounds, 2, 7))
    weights = spo_margin_weights(BETAS[: rounds - 1], general_rows(rounds), mode)
    loss = spo_loss(
        *map(torch.from_numpy, policy),
        [torch.from_numpy(f[0]) for f in frozen],
        [torch.from_numpy(f[1]) for f in frozen],
        0.35,
        weights,
    )
    np.testing.assert_allclose(loss.numpy(), numpy_spo(policy, frozen, 0.35, weights), rtol=1e-12)


def test_spo_recursion_golden_weights():
    assert spo_margin_weights(BETAS[:1], general_rows(2), "recursive") == pytest.approx([0.49])
    assert spo_margin_weights(BETAS[:2], general_rows(3), "recursive") == pytest.approx([0.07, 1.3])
    assert spo_margin_weights(BETAS[:3], general_rows(4), "recursive") == pytest.approx([0.0, -0.26, 1.17])


def test_spo_recursion_inverts_the_closed_form():
    """Substituting R back into beta_n rho_n = R_n + sum lambda R_i must give rho itself."""
    coefficients = np.zeros((4, 4))
    for i, row in enumerate(spo_reward_coefficients(BETAS, general_rows(4))):
        coefficients[i, : i + 1] = row
    lambdas = np.eye(4)
    for n, row in enumerate(general_rows(4), start=1):
        lambdas[n, :n] = row
    np.testing.assert_allclose(lambdas @ coefficients, np.diag(BETAS), atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0.05, 2.0), min_size=2, max_size=5),
    st.data(),
)
def test_chain_is_the_recursion_with_geometric_multipliers(betas, data):
    alphas = [data.draw(st.floats(0.0, 2.0)) for _ in betas]  # alpha of rounds 2 .. n
    rows = [[math.prod(alphas[i:n]) for i in range(n)] for n in range(1, len(betas) + 1)]
    exact = spo_margin_weights(betas, rows, "recursive")
    assert exact == pytest.approx(spo_margin_weights(betas, [[alphas[-1]]], "chain"), abs=1e-9)


def test_naive_agrees_at_two_rounds_and_differs_at_three():
    assert spo_margin_weights([0.7], [[0.5]], "naive") == spo_margin_weights([0.7], [[0.5]], "recursive")
    rows = [[1.0], [1.0, 1.0]]
    assert spo_margin_weights([0.7, 1.3], rows, "naive") == pytest.approx([0.7, 1.3])
    assert spo_margin_weights([0.7, 1.3], rows, "recursive") == pytest.approx([0.0, 1.3])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-2, 2), max_size=4), st.floats(0.05, 2))
def test_effective_reference_is_an_affine_combination(weights, beta):
    coefficients = spo_reference_coefficients(weights, beta)
    assert sum(coefficients) == pytest.approx(1.0, abs=1e-9)
    assert len(coefficients) == len(weights) + 1


def test_chain_needs_two_frozen_policies_in_any_round():
    for rounds in range(2, 7):
        coefficients = spo_reference_coefficients([0.0] * (rounds - 2) + [0.1], 0.1)
        assert [bool(value) for value in coefficients] == [False] * (rounds - 2) + [True, True]


def test_reference_of_round_one_is_untouched_bits():
    logps = torch.randn(5) * 30
    assert torch.equal(spo_reference_logps([logps], spo_reference_coefficients([], 0.1)), logps)


def test_reference_of_half_precision_is_combined_in_float32():
    logps = [torch.tensor([-301.0], dtype=torch.bfloat16), torch.tensor([-299.0], dtype=torch.bfloat16)]
    combined = spo_reference_logps(logps, [-0.3, 1.3])
    assert combined.dtype == torch.float32
    assert combined.item() == pytest.approx(-0.3 * logps[0].item() + 1.3 * logps[1].item(), rel=1e-6)


def test_start_of_a_round_weighs_pairs_by_their_earlier_margin():
    """sigma(-z) at pi_theta = pi_1: above one half for an agreeing pair, below for a conflicting one."""
    theta_w = torch.tensor([-10.0, -10.0], requires_grad=True)
    frozen_w = [torch.tensor([-12.0, -8.0]), theta_w.detach()]
    frozen_l = [torch.tensor([-11.0, -11.0])] * 2
    spo_loss(theta_w, frozen_l[1], frozen_w, frozen_l, 0.2, [0.1]).sum().backward()
    agreeing, conflicting = (-theta_w.grad / 0.2).tolist()
    assert agreeing > 0.5 > conflicting


def test_spo_of_two_rounds_is_modpo_with_matched_weights():
    """MODPO (arXiv 2310.03708): (1/w0)(b D log(pi/ref) - w1 D margin) with margin = b_m log(pi_1/ref)."""
    rng = np.random.default_rng(3)
    theta, one, zero = rng.normal(-20, 3, (3, 2, 6))
    beta_2, beta_1, lam, w0 = 0.3, 0.2, 0.7, 0.4
    beta, w1_beta_m = beta_2 * w0, (beta_2 + lam * beta_1) * w0
    ratio, margin = theta - zero, one - zero
    z = (beta * (ratio[0] - ratio[1]) - w1_beta_m * (margin[0] - margin[1])) / w0
    expected = np.logaddexp(0.0, -z)
    np.testing.assert_allclose(numpy_spo(theta, [zero, one], beta_2, [lam * beta_1]), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["general", "unit", "geometric"])
def test_tabular_policies_reach_the_closed_form_over_four_rounds(kind):
    """8 outcomes, exact Bradley-Terry labels: log pi_n = log pi_(n-1) + (R_n + sum lambda R_i)/beta_n - log Z."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 8))
    rows = {
        "general": general_rows(4),
        "unit": [[1.0] * n for n in (1, 2, 3)],
        "geometric": [[0.6 ** (n - i) for i in range(n)] for n in (1, 2, 3)],
    }[kind]
    mode = "chain" if kind == "geometric" else "recursive"
    policies = [np.log(rng.dirichlet(np.ones(8)))]
    for n, beta in enumerate(BETAS):
        tilt = rewards[n] + sum((rows[n - 1][i] * rewards[i] for i in range(n)), np.zeros(8))
        theory = policies[-1] + tilt / beta
        theory = theory - np.logaddexp.reduce(theory)
        weights = spo_margin_weights(BETAS[:n], rows[:n], mode)
        trained = train_tabular(policies, rewards[n], beta, weights)
        assert np.abs(trained - theory).max() <= 1e-8
        policies.append(theory)


def train_tabular(policies: list[np.ndarray], reward: np.ndarray, beta: float, weights: list[float]) -> np.ndarray:
    """Minimise the expected SPO loss over all ordered pairs with Bradley-Terry labels, by Newton's method."""
    first, second = np.nonzero(~np.eye(8, dtype=bool))
    label = torch.from_numpy(1 / (1 + np.exp(reward[second] - reward[first])))
    frozen = [torch.from_numpy(p) for p in policies]
    logits = frozen[-1].clone()

    def expected_loss(logits: torch.Tensor) -> torch.Tensor:
        policy = logits.log_softmax(0)
        args = policy[first], policy[second], [f[first] for f in frozen], [f[second] for f in frozen]
        gauge = logits.mean() ** 2  # softmax leaves the mean free; this fixes it without moving the optimum
        return (label * spo_loss(*args, beta, weights)).mean() + 0.1 * gauge

    for _ in range(60):
        step = torch.linalg.solve(
            torch.autograd.functional.hessian(expected_loss, logits),
            torch.autograd.functional.jacobian(expected_loss, logits),
        )
        scale = 1.0
        while expected_loss(logits - scale * step) > expected_loss(logits) + 1e-15 and scale > 1e-4:
            scale /= 2
        logits = logits - scale * step
    return logits.log_softmax(0).numpy()


def test_adpo_golden_numbers():
    c, r, t = tensors(-10, -12, -5)
    reference = tensors(-11, -11, -4)
    loss = adpo_loss((c, r, t), reference, 0.1, 0.3, 0.5)
    assert loss.item() == pytest.approx(0.875317, abs=1e-6)
    loss.sum().backward()
    assert [c.grad.item(), r.grad.item(), t.grad.item()] == pytest.approx([-0.045017, 0.045017, 0.063834], abs=1e-6)


@pytest.mark.parametrize("form", ["additive", "pairwise", "joint"])
def test_adpo_equals_numpy(form):
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(-20, 4, (2, 3, 9))
    c, r, t = policy - reference
    beta, gamma, weight = 0.2, 0.5, 0.8
    if form == "joint":
        expected = np.logaddexp(0, -(beta * (c - r) - weight * gamma * t))
    else:
        toxic = gamma * t if form == "additive" else -gamma * (c - t)
        expected = np.logaddexp(0, -beta * (c - r)) + weight * np.logaddexp(0, toxic)
    actual = adpo_loss(
        tuple(map(torch.from_numpy, policy)), tuple(map(torch.from_numpy, reference)), beta, gamma, weight, form
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_adpo_joint_is_dpo_with_a_shifted_reference():
    policy, reference = torch.randn(2, 3, 5, dtype=torch.float64)
    toxic = policy[2] - reference[2]
    shifted = adpo_joint_reference(reference[1], toxic, 0.2, 0.5, 0.8)
    plain = adpo_loss(tuple(policy), (reference[0], shifted, reference[2]), 0.2, 0.5, 0.0)
    torch.testing.assert_close(plain, adpo_loss(tuple(policy), tuple(reference), 0.2, 0.5, 0.8, "joint"))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-30, 0), min_size=6, max_size=6), st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0.1, 2))
def test_adpo_gradients_have_the_right_signs_and_size(values, beta, gamma, weight):
    for form in ("additive", "pairwise", "joint"):
        c, r, t = tensors(*values[:3])
        reference = [x.detach() for x in tensors(*values[3:])]
        adpo_loss((c, r, t), tuple(reference), beta, gamma, weight, form).sum().backward()
        assert c.grad <= 0 <= r.grad and t.grad >= 0
        if form == "additive":
            expected = weight * gamma * torch.sigmoid(gamma * (t.detach() - reference[2]))
            torch.testing.assert_close(t.grad, expected)


def test_toxic_gradient_depends_on_the_pair_only_in_joint():
    def toxic_gradient(form: str, rejected: float) -> float:
        c, r, t = tensors(-5, rejected, -4)
        adpo_loss((c, r, t), tuple(x.detach() for x in tensors(-6, -6, -5)), 0.5, 0.5, 1.0, form).sum().backward()
        return t.grad.item()

    assert toxic_gradient("additive", -3) == toxic_gradient("additive", -30)
    assert toxic_gradient("joint", -3) > 10 * toxic_gradient("joint", -30)


def test_zero_weight_is_dpo_and_the_margin_stops_the_push():
    policy, reference = torch.randn(2, 3, 4)
    dpo = spo_loss(policy[0], policy[1], [reference[0]], [reference[1]], 0.1)
    for form in ("additive", "pairwise", "joint"):
        torch.testing.assert_close(adpo_loss(tuple(policy), tuple(reference), 0.1, 0.1, 0.0, form), dpo)
    t = torch.tensor([-20.0], requires_grad=True)
    zero = torch.zeros(1)
    adpo_loss((zero, zero, t), (zero, zero, zero), 0.1, 0.1, 1.0, toxic_margin=10.0).sum().backward()
    assert t.grad.item() == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spo_margin_weights([0.1], [[1.0]], "sum"), "chain, recursive, naive"),
        (lambda: spo_margin_weights([0.1, 0.2], [[1.0]], "naive"), "needs 2 multipliers"),
        (lambda: spo_margin_weights([0.1], []), "needs a multiplier"),
        (lambda: spo_margin_weights([0.1, 0.2], [[1.0], [1.0, 1.0], [1.0, 1.0]], "recursive"), "lengths"),
        (lambda: adpo_loss(*[(torch.zeros(1),) * 3] * 2, 0.1, 0.1, 1.0, "sum"), "additive, pairwise, joint"),
    ],
)
def test_bad_arguments_say_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()
