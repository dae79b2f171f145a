"""Options of one SPO round (arXiv 2405.12739), and the plan they and the earlier rounds amount to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_ext.trainers.losses import PREVIOUS_REWARDS, spo_margin_weights, spo_reference_coefficients
from hf_ext.trainers.preference_checks import check_choice, check_number
from hf_ext.trainers.preference_config import PreferenceConfig

# Losses of the difference between the two log-ratios. The others read each side alone, which an unnormalised
# reference shifts by an unknown constant.
DIFFERENCE_LOSSES = ("sigmoid", "hinge", "robust", "exo_pair", "discopop", "sft")


@dataclass
class SPOConfig(PreferenceConfig):
    """DPOConfig with what makes it a round of SPO. With the defaults it is round 1, which is DPO.

    Raises:
        ValueError: an option is out of range, unknown, or does not fit the number of rounds.
    """

    round_index: int | None = field(
        default=None,
        metadata={"help": "n, counted from 1; by default one more than the rounds in the manifest or in prev_betas."},
    )
    dimension: str | None = field(
        default=None, metadata={"help": "Name of this round's preference dimension, for the manifest and the card."}
    )
    manifest: str | None = field(
        default=None,
        metadata={"help": "Output folder of the previous round: its policies, betas and multipliers are read."},
    )
    prev_reward: str = field(
        default="chain",
        metadata={
            "help": "How earlier rewards enter: 'chain' (two frozen policies), 'recursive' (exact, for any "
            "multipliers), 'naive' (beta_j rho_j as the reward of round j).",
            "choices": list(PREVIOUS_REWARDS),
        },
    )
    prev_lambda: float = field(
        default=1.0,
        metadata={"help": "Multiplier lambda of every earlier dimension (alpha in 'chain'). 0 is sequential DPO."},
    )
    prev_lambdas: list[float] | None = field(
        default=None,
        metadata={
            "help": "Multipliers of dimensions 1 to n-1 in place of prev_lambda; or the rows of rounds 2 to n one "
            "after the other, where 'recursive' has no manifest to read the earlier ones from."
        },
    )
    prev_betas: list[float] | None = field(
        default=None, metadata={"help": "beta of rounds 1 to n-1; read from the manifest where there is one."}
    )

    def check(self) -> None:
        """Refuse values that no round can have."""
        super().check()
        check_number("prev_lambda", self.prev_lambda, at_least=0.0)
        check_choice("prev_reward", self.prev_reward, PREVIOUS_REWARDS)
        for name, bound in (("prev_lambdas", {"at_least": 0.0}), ("prev_betas", {"above": 0.0})):
            for value in getattr(self, name) or ():
                check_number(f"An entry of {name}", value, **bound)
        if self.round_index is not None and (not isinstance(self.round_index, int) or self.round_index < 1):
            raise ValueError(f"round_index is {self.round_index!r}; rounds are counted from 1.")


@dataclass(frozen=True)
class SPOPlan:
    """The numbers of round n: betas of rounds 1 to n-1, multiplier rows of rounds 2 to n, and what follows from them.

    Attributes:
        betas: ``beta_1 .. beta_(n-1)``.
        rows: multipliers of rounds 2 to n.
        weights: ``w_1 .. w_(n-1)``.
        coefficients: of ``log pi_0 .. log pi_(n-1)`` in the effective reference.
    """

    betas: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    coefficients: tuple[float, ...]

    @property
    def round_index(self) -> int:
        """n, counted from 1."""
        return len(self.coefficients)

    @property
    def needed(self) -> list[int]:
        """The frozen policies that enter, oldest first; the last is the reference ``pi_(n-1)``."""
        return [k for k, coefficient in enumerate(self.coefficients) if coefficient]

    @property
    def is_dpo(self) -> bool:
        """Whether the loss is DPO's against ``pi_(n-1)``: round 1, or multipliers of 0."""
        return not any(self.weights)


def make_plan(config: SPOConfig, earlier: Sequence[dict[str, Any]] = ()) -> SPOPlan:
    """The plan of a round.

    Args:
        config: the round's options.
        earlier: the manifest's records of rounds 1 to n-1, with "beta" and "lambdas"; none without a manifest.

    Raises:
        ValueError: options and manifest disagree about the number of rounds, or the loss cannot take the reference.
    """
    index = config.round_index or len(earlier or config.prev_betas or ()) + 1
    if earlier and index != len(earlier) + 1:
        raise ValueError(
            f"round_index is {index}, but the manifest {config.manifest!r} ends with round {len(earlier)}; the next "
            f"is round {len(earlier) + 1}."
        )
    betas = tuple(record["beta"] for record in earlier) or tuple(config.prev_betas or ())
    if len(betas) != index - 1:
        raise ValueError(
            f"Round {index} needs prev_betas of {index - 1} values, the beta of each earlier round, or a manifest; "
            f"got {list(betas)}."
        )
    rows = _multiplier_rows(config, index, [record["lambdas"] for record in earlier])
    weights = tuple(spo_margin_weights(betas, rows, config.prev_reward))
    plan = SPOPlan(betas, rows, weights, tuple(spo_reference_coefficients(weights, config.beta)))
    if not plan.is_dpo:
        _check_loss(config)
    return plan


def _multiplier_rows(config: SPOConfig, index: int, earlier: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    given = config.prev_lambdas
    triangle = index * (index - 1) // 2
    if given is None or len(given) == index - 1:
        rows = [tuple(row) for row in earlier[1:]] or [(config.prev_lambda,) * (n - 1) for n in range(2, index)]
        last = (config.prev_lambda,) * (index - 1) if given is None else tuple(given)
        return (*rows, last) if index > 1 else ()
    if len(given) != triangle:
        raise ValueError(
            f"prev_lambdas has {len(given)} values; round {index} takes {index - 1} (dimensions 1 to {index - 1}) or "
            f"{triangle} (the rows of rounds 2 to {index})."
        )
    return tuple(tuple(given[(n - 1) * (n - 2) // 2 : n * (n - 1) // 2]) for n in range(2, index + 1))


def _check_loss(config: SPOConfig) -> None:
    unfit = [name for name in config.loss_type if name not in DIFFERENCE_LOSSES]
    if unfit:
        raise ValueError(
            f"loss_type {unfit} reads chosen and rejected apart, or per token, and SPO's reference beyond round 1 is "
            f"not normalised; allowed: {', '.join(DIFFERENCE_LOSSES)}."
        )
    if config.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"f_divergence_type is {config.f_divergence_type!r}; SPO beyond round 1 is derived for 'reverse_kl' only."
        )
    if config.sync_ref_model:
        raise ValueError("sync_ref_model=True moves the reference, which in SPO is the frozen previous round.")
