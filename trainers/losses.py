"""The losses of SPO (arXiv 2405.12739) and ADPO (arXiv 2405.12900) as pure functions of sequence log-probabilities.

The printed loss equations of both papers could not be consulted. What stands here is derived from the objectives they
state: for SPO the reward of round n maximised under a trust region on the previous round's policy and lower bounds on
the rewards of earlier rounds, for ADPO a preference term plus a penalty on toxic responses. docs/spo.md and
docs/adpo.md hold the derivations; readings that the statements leave open are options here.

Notation: ``pi_0`` is the policy before round 1, ``pi_k`` the result of round k, ``rho_k = log pi_k - log pi_(k-1)``,
and ``D f = f(chosen) - f(rejected)``. Log-probabilities are sums over the completion's tokens, in nats.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PREVIOUS_REWARDS = ("chain", "recursive", "naive")
TOXIC_LOSSES = ("additive", "pairwise", "joint")
TOXIC_REFERENCES = ("tox", "ref")


def spo_reward_coefficients(betas: Sequence[float], lambdas: Sequence[Sequence[float]]) -> list[list[float]]:
    """How the implicit reward of each round is made of the policies' log-ratios: ``R_i = sum_j c[i][j] rho_j``.

    The closed form of round i gives ``R_i = beta_i rho_i - sum_(m<i) lambda_(i,m) R_m`` up to a term that cancels
    between two responses to one prompt, because ``pi_i`` already optimises the earlier rewards along with its own.

    Args:
        betas: ``beta_1 .. beta_n``.
        lambdas: one row for each of the rounds 2 to n; the row of round i holds ``lambda_(i,1) .. lambda_(i,i-1)``.

    Returns:
        Row i (counted from 0) has i + 1 coefficients, those of ``rho_1 .. rho_(i+1)``.

    Raises:
        ValueError: a row is missing or has the wrong length.
    """
    _check_rows(lambdas, len(betas))
    rows: list[list[float]] = []
    for i, beta in enumerate(betas):
        earlier = lambdas[i - 1] if i else ()
        rows.append([-_weighted_column(earlier, rows, j) for j in range(i)] + [beta])
    return rows


def spo_margin_weights(
    betas: Sequence[float], lambdas: Sequence[Sequence[float]], previous_reward: str = "chain"
) -> list[float]:
    """The weights ``w_1 .. w_(n-1)`` with which earlier log-ratios enter round n: ``S = sum_j w_j D rho_j``.

    Args:
        betas: ``beta_1 .. beta_(n-1)`` of the earlier rounds. Empty in round 1, which is plain DPO.
        lambdas: the rows of rounds 2 to n (see `spo_reward_coefficients`). "chain" and "naive" read the last one only.
        previous_reward: "recursive" is the exact recursion. "chain" is its special case of geometric multipliers
            (``lambda_(m,i)`` is the product of ``alpha_(i+1) .. alpha_m``), in which only the last weight remains,
            ``alpha_n beta_(n-1)``, ``alpha_n`` being the last entry of the last row; any round then needs two frozen
            policies. "naive" takes ``beta_j rho_j`` for the reward of round j, which counts older dimensions twice
            from round 3 on.

    Raises:
        ValueError: an unknown ``previous_reward`` or rows that do not fit the rounds.
    """
    if previous_reward not in PREVIOUS_REWARDS:
        raise ValueError(f"previous_reward is {previous_reward!r}; allowed: {', '.join(PREVIOUS_REWARDS)}.")
    earlier = len(betas)
    if not earlier:
        return []
    row = lambdas[-1] if lambdas else ()
    if previous_reward == "chain":
        if not row:
            raise ValueError(f"Round {earlier + 1} needs a multiplier for round {earlier}; got none.")
        return [0.0] * (earlier - 1) + [row[-1] * betas[-1]]
    if len(row) != earlier:
        raise ValueError(f"Round {earlier + 1} needs {earlier} multipliers, one for each earlier round; got {row!r}.")
    if previous_reward == "naive":
        return [multiplier * beta for multiplier, beta in zip(row, betas, strict=True)]
    coefficients = spo_reward_coefficients(betas, lambdas[:-1])
    return [_weighted_column(row, coefficients, j) for j in range(earlier)]


def spo_reference_coefficients(weights: Sequence[float], beta: float) -> list[float]:
    """SPO round n is DPO against ``l_n = log pi_(n-1) + (1/beta) sum_j w_j rho_j``; its coefficients of ``log pi_k``.

    Args:
        weights: ``w_1 .. w_(n-1)`` of `spo_margin_weights`.
        beta: ``beta_n`` of the round being trained.

    Returns:
        n coefficients, of ``log pi_0 .. log pi_(n-1)``, which sum to 1. A zero means the policy is not needed.
    """
    padded = [0.0, *weights, 0.0]
    rounds = len(weights)
    coefficients = [(padded[k] - padded[k + 1]) / beta for k in range(rounds + 1)]
    coefficients[rounds] += 1.0
    return [0.0 if abs(value) < 1e-12 else value for value in coefficients]


def spo_reference_logps(frozen_logps: Sequence[Tensor | None], coefficients: Sequence[float]) -> Tensor:
    """``l_n`` of a batch, unnormalised (the normaliser cancels between two responses to one prompt).

    Args:
        frozen_logps: ``log pi_0 .. log pi_(n-1)``, each ``[B]``; None where the coefficient is 0.
        coefficients: of `spo_reference_coefficients`.

    Returns:
        ``[B]``, float32 or wider.
    """
    terms = [
        coefficient * (value if value.dtype == torch.float64 else value.float())
        for value, coefficient in zip(frozen_logps, coefficients, strict=True)
        if coefficient and value is not None
    ]
    return torch.stack(terms).sum(0)


def spo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    frozen_chosen: Sequence[Tensor],
    frozen_rejected: Sequence[Tensor],
    beta: float,
    weights: Sequence[float] = (),
) -> Tensor:
    """``-log sigmoid(beta D rho_theta - sum_j w_j D rho_j)`` for each pair.

    Args:
        policy_chosen: log-probabilities under the policy being trained, ``[B]``.
        policy_rejected: likewise for the rejected responses, ``[B]``.
        frozen_chosen: under ``pi_0 .. pi_(n-1)``, each ``[B]``.
        frozen_rejected: likewise.
        beta: the weight of the trust region on ``pi_(n-1)``.
        weights: ``w_1 .. w_(n-1)``; none in round 1, where this is DPO's sigmoid loss.

    Returns:
        ``[B]``.
    """
    coefficients = spo_reference_coefficients(weights, beta)
    chosen = policy_chosen - spo_reference_logps(frozen_chosen, coefficients)
    rejected = policy_rejected - spo_reference_logps(frozen_rejected, coefficients)
    return -F.logsigmoid(beta * (chosen - rejected))


def adpo_loss(
    policy: tuple[Tensor, Tensor, Tensor],
    reference: tuple[Tensor, Tensor, Tensor],
    beta: float,
    toxic_beta: float,
    toxic_weight: float,
    toxic_loss: str = "additive",
    toxic_margin: float | None = None,
) -> Tensor:
    """The preference term of (chosen, rejected) with the penalty on the toxic response, for each triple.

    Args:
        policy: log-probabilities of (chosen, rejected, toxic) under the policy being trained, each ``[B]``.
        reference: likewise under the reference; the third may be that of the toxic policy (the reference conditioned
            on the control token).
        beta: temperature of the preference term.
        toxic_beta: temperature gamma of the toxic term.
        toxic_weight: weight lambda of the toxic term; 0 leaves DPO.
        toxic_loss: "additive" ``+ lambda * -log sigmoid(-gamma d_t)``; "pairwise" ``+ lambda * -log sigmoid(gamma
            (d_c - d_t))``, the toxic response as a second rejected one; "joint" ``-log sigmoid(beta (d_c - d_r) -
            lambda gamma d_t)``. ``d`` is the log-ratio of policy to reference.
        toxic_margin: nats below its reference at which the toxic response is no longer pushed down; None for never.

    Returns:
        ``[B]``.

    Raises:
        ValueError: ``toxic_loss`` is not one of the three.
    """
    chosen, rejected, toxic = (p - r for p, r in zip(policy, reference, strict=True))
    toxic = cap_toxic_logratio(toxic, toxic_margin)
    if toxic_loss == "joint":
        return -F.logsigmoid(beta * (chosen - rejected) - toxic_weight * toxic_beta * toxic)
    return -F.logsigmoid(beta * (chosen - rejected)) + toxic_weight * adpo_toxic_term(
        chosen, toxic, toxic_beta, toxic_loss
    )


def adpo_toxic_term(chosen: Tensor, toxic: Tensor, toxic_beta: float, toxic_loss: str) -> Tensor:
    """The unweighted toxic term of "additive" and "pairwise" from the log-ratios of chosen and toxic, ``[B]`` each."""
    if toxic_loss == "additive":
        return -F.logsigmoid(-toxic_beta * toxic)
    if toxic_loss == "pairwise":
        return -F.logsigmoid(toxic_beta * (chosen - toxic))
    raise ValueError(f"toxic_loss is {toxic_loss!r}; allowed: {', '.join(TOXIC_LOSSES)}.")


def adpo_joint_reference(rejected: Tensor, toxic: Tensor, beta: float, toxic_beta: float, weight: float) -> Tensor:
    """The rejected response's reference under which plain DPO is the "joint" loss; carries the toxic gradient.

    Args:
        rejected: reference log-probabilities of the rejected responses, ``[B]``.
        toxic: log-ratios of the toxic responses, ``[B]``; 0 where there is none.
        beta: temperature of the preference term.
        toxic_beta: temperature of the toxic term.
        weight: weight of the toxic term.
    """
    return rejected - (weight * toxic_beta / beta) * toxic


def cap_toxic_logratio(toxic: Tensor, toxic_margin: float | None) -> Tensor:
    """Stop pushing a toxic response that already lies ``toxic_margin`` nats below its reference."""
    return toxic if toxic_margin is None else toxic.clamp_min(-toxic_margin)


def _check_rows(lambdas: Sequence[Sequence[float]], rounds: int) -> None:
    lengths = [len(row) for row in lambdas]
    if lengths != list(range(1, rounds)):
        raise ValueError(
            f"{rounds} rounds need rows of multipliers of lengths {list(range(1, rounds))}, those of rounds 2 to "
            f"{rounds}; got lengths {lengths}."
        )


def _weighted_column(row: Sequence[float], coefficients: Sequence[Sequence[float]], j: int) -> float:
    """``sum_(i>=j) row[i] coefficients[i][j]`` over the lower triangle."""
    return sum((row[i] * coefficients[i][j] for i in range(j, len(row))), 0.0)
